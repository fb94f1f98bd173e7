"""Number formats for the input of fc2: negative and positive numbers have a step and a grid each.

GELU leaves small negative and large positive values, and a grid with one step wastes half its codes
on the negative side. Two methods for VAR give either side its own range:

    | format           | negative numbers      | positive numbers   | from          |
    | two_sided_int    | 2^(b-1) - 1 steps     | 2^(b-1) - 1 steps  | Shift-and-Sum |
    | two_sided_fp4    | 7 steps (e1m2)        | floats, e2m1       | FPQVAR        |
    | two_sided_fp6    | 32 steps (integers)   | floats, e2m3       | FPQVAR        |

Sources: Moon and Ham, 2026, arXiv 2606.16131 (cvlab-yonsei/Shift-and-Sum, `quant/quantizer.py`,
`fc2`), at six bits per token and at four in groups of 64; Wei et al., 2025, arXiv 2505.16335,
"dual format" (PKU-SEC-Lab/FPQVAR, `quant_utils.py`), in groups of 128 and per token. Zero is on
both sides, so a code is one of 2^b - 1, and of 2^b for `two_sided_fp6`.

The parameters of a range are two steps: `scale` of positive numbers and, where other formats have
their zero point, that of negative ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.numbers.numerics import QParams, one_for_zero
from ptq.numbers.small_floats import E2M1, E2M3, FloatGrid
from ptq.registry.entries import register_format
from ptq.spec import QuantSpec


class TwoSided:
    """Uniform steps below zero, and a grid above.

    Attributes:
        steps: below zero; None: as many as integers of the bits have, 2^(b - 1) - 1.
        floats: above zero; None: uniform steps, as many as below.
    """

    steps: int | None = None
    floats: FloatGrid | None = None

    @classmethod
    def negative_steps(cls, spec: QuantSpec) -> int:
        return cls.steps or spec.levels // 2 - 1

    @classmethod
    def choose_params(cls, lo: Tensor, hi: Tensor, spec: QuantSpec) -> QParams:
        negative = cls.negative_steps(spec)
        largest = negative if cls.floats is None else cls.floats.largest
        return QParams(
            one_for_zero(hi.clamp(min=0) / largest), one_for_zero((-lo).clamp(min=0) / negative)
        )

    @classmethod
    def simulate(cls, x: Tensor, params: QParams, spec: QuantSpec) -> Tensor:
        steps = cls.negative_steps(spec)
        above = x.clamp(min=0) / params.scale
        if cls.floats is None:
            above = torch.round(above).clamp(max=steps)
        else:
            above = cls.floats.round(above)
        below = torch.round((-x).clamp(min=0) / params.zero_point).clamp(max=steps)
        return above * params.scale - below * params.zero_point


@register_format("two_sided_int", operands=("activations",))
class TwoSidedIntegers(TwoSided):
    """Shift-and-Sum's."""


@register_format("two_sided_fp4", operands=("activations",), bits=4)
class TwoSidedFP4(TwoSided):
    """FPQVAR's of four bits."""

    steps = 7
    floats = E2M1


@register_format("two_sided_fp6", operands=("activations",), bits=6)
class TwoSidedFP6(TwoSided):
    """FPQVAR's of six bits."""

    steps = 32
    floats = E2M3
