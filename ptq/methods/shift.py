"""Symmetric shift: centre every channel on zero before GPS (released code, not the paper).

With per-channel parameters (d, z) the shift moves the lower end of the channel's range from -z d to
-(2^(b-1) - 1) d:

    shift_i = d_i ((2^(b-1) - 1) - z_i),   x' = x - shift,   b' = b + W shift

The released code writes x' = x / s - p; ours is x' = (x - shift) / scale, that is p = shift /
scale.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ptq.methods.solver import Problem
from ptq.numbers.numerics import QParams
from ptq.numbers.observers import Observer
from ptq.numbers.quantizers import choose_qparams
from ptq.registry.entries import register_transform
from ptq.spec import QuantSpec
from ptq.transform import InputTransform


def centring_shift(params: QParams, bits: int) -> Tensor:
    """Shift per channel (C,) from per-channel parameters."""
    return params.scale * (2 ** (bits - 1) - 1 - params.zero_point)


def per_channel(spec: QuantSpec) -> QuantSpec:
    """The spec at which channels are measured."""
    return replace(spec.at("in_channel"), symmetric=False)


def from_params(params: QParams, bits: int) -> InputTransform:
    """The step that shifts alone, from per-channel parameters (C,)."""
    shift = centring_shift(params, bits)  # (C,)
    return InputTransform(shift.new_ones(shift.shape), shift)


def symmetric_shift(x: Tensor, spec: QuantSpec) -> InputTransform:
    """The shift for inputs x (N, C), from (asymmetric) ranges that `spec` finds per channel."""
    return from_params(choose_qparams(x, per_channel(spec)), spec.bits)


@register_transform("shift", step=40, integers_only=True)
class SymmetricShift:
    """Observes every channel's range."""

    def __init__(self, problem: Problem) -> None:
        self.bits = problem.recipe.activations.bits
        self.observer = Observer(
            per_channel(problem.recipe.activations), rows=problem.rows, name=problem.site.name
        )

    def update(self, x: Tensor) -> None:
        self.observer(x)

    def end_pass(self) -> bool:
        return self.observer.end_pass()

    def solve(self) -> InputTransform:
        return from_params(self.observer.params(), self.bits)
