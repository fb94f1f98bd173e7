"""Group-wise Hadamard rotation of 128 channels (FPQVAR, Wei et al., 2025, arXiv 2505.16335).

    x' = x R,   W' = W R,     R = blocks of H_128 / sqrt(128)

at the inputs of qkv and fc1, online (`rotate_utils` of PKU-SEC-Lab/FPQVAR). Their blocks have
random signs, the same in every block; here they have none. A width that 128 does not divide is cut
into blocks of the largest power of two that does.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptq.methods.hadamard import HadamardRotation
from ptq.methods.solver import Problem
from ptq.options import SITES, Settings, setting
from ptq.ranges import Integer
from ptq.registry.entries import register_settings, register_transform
from ptq.transform import InputTransform


@register_settings("group_hadamard")
@dataclass(frozen=True)
class GroupHadamardSettings(Settings):
    """sites: whose inputs are rotated. size: channels of a block at most, a power of two."""

    sites: tuple[str, ...] = setting(("qkv", "fc1"), SITES)
    size: int = setting(128, Integer(2, 65_536))


@register_transform("group_hadamard", step=75)
class GroupHadamard:
    """The rotation of one site."""

    streams = False

    def __init__(self, problem: Problem) -> None:
        self.weight = problem.weight
        self.size = problem.recipe.options.group_hadamard.size

    def solve(self) -> InputTransform:
        channels = self.weight.shape[1]
        identity = InputTransform.identity(channels, self.weight)
        rotation = HadamardRotation(block_size(channels, self.size), device=self.weight.device)
        return InputTransform(identity.scale, identity.shift, rotation)


def block_size(channels: int, largest: int) -> int:
    """The largest power of two that divides `channels` and is at most `largest`."""
    size = 1
    while 2 * size <= largest and channels % (2 * size) == 0:
        size *= 2
    return size
