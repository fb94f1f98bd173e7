"""How a method looks to the pipeline: a solver per site that returns an InputTransform.

Inputs stream: a solver sees them in parts, pass after pass over the calibration rows, and keeps
what it needs of them. It never touches a module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ptq.numbers.numerics import QParams
from ptq.sites import Site
from ptq.transform import InputTransform

if TYPE_CHECKING:
    from ptq.methods.probe import Judge
    from ptq.recipe import Recipe


@dataclass(frozen=True)
class Problem:
    """One step of a site's transform, to be solved.

    Attributes:
        weight: stacked weights (O, C) of the site's consumers, as the steps before left them.
        rows: calibration rows that one pass brings in all.
        rotated: channels of the blocks in which the input is rotated offline already, 0 if it is
            not.
        probe: gives the judge of candidates for this step on that many calibration rows, the first
            or spread over all; call it in `solve`.
    """

    site: Site
    weight: Tensor
    recipe: Recipe
    rows: int
    probe: Callable[[int, bool], Judge] | None = None
    rotated: int = 0


def stacked_weight(model: nn.Module, site: Site) -> Tensor:
    """The weights (O, C) of all that read the site."""
    return torch.cat([model.get_submodule(name).weight for name in site.consumers])


class Solver(Protocol):
    """What a method does at one site. With a class attribute `streams = False` it needs no pass and
    has `solve` alone.
    """

    def update(self, x: Tensor) -> None:
        """Take a part (..., C) of the inputs in, as earlier steps left them; it may be empty."""

    def end_pass(self) -> bool:
        """All rows have passed; says whether that was the last pass needed."""

    def solve(self) -> InputTransform:
        """The step."""


@runtime_checkable
class FixesInput(Protocol):
    """A solver that also fixes the input quantizer of its site, which calibration then leaves."""

    def input_params(self) -> QParams:
        """Scale and zero point (1,) of the transformed input."""


@runtime_checkable
class SeesTokens(Protocol):
    """A solver that is fed all tokens, sinks included, with their positions."""

    def update_tokens(self, x: Tensor, positions: Tensor | None) -> None:
        """Take inputs (B, T, C) of tokens at positions (T,) in, in place of `update`."""


Method = Callable[[Problem], Solver]
