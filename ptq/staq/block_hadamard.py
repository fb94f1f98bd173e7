"""A Hadamard rotation of a few neighbouring channels at fc2's input of gated MLPs.

The product of gate and hidden units is heavy-tailed within channels (kurtosis 9 to 21 on PAR's
twin), and no scale or position mends a channel whose own values differ by that much. Mixing 8
neighbours does, for 24 additions per 8 values in the kernel that makes them:

    x' = x R,   W' = W R,    R = blocks of H_8 / sqrt(8), symmetric and its own inverse

Other sites, and MLPs without a gate, gain nothing and are left alone.
"""

from __future__ import annotations

from ptq.methods.hadamard import HadamardRotation
from ptq.methods.solver import Problem
from ptq.registry.entries import register_transform
from ptq.sites import RowsFold, Site
from ptq.transform import InputTransform

ORDER = 8


@register_transform("block_hadamard", step=80, sites=("fc2",))
class BlockHadamard:
    """The rotation of one site, or none."""

    streams = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def solve(self) -> InputTransform:
        weight = self.problem.weight
        identity = InputTransform.identity(weight.shape[1], weight)
        if not is_gated(self.problem.site) or weight.shape[1] % ORDER:
            return identity
        rotation = HadamardRotation(ORDER, device=weight.device)
        return InputTransform(identity.scale, identity.shift, rotation)


def is_gated(site: Site) -> bool:
    """Whether the site's input is a product with a gate, which passes a scale but no shift."""
    return isinstance(site.fold, RowsFold) and not site.fold.shift
