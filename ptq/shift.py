"""Symmetric shift: centre every activation channel on zero before GPS (in the released code, not in the paper).

With per-channel parameters (d, z) the shift moves the lower end of the channel's range from -z d to -(2^(b-1) - 1) d:

    shift_i = d_i ((2^(b-1) - 1) - z_i),   x' = x - shift,   b' = b + W shift

The released code writes x' = x / s - p; ours is x' = (x - shift) / scale, that is p = shift / scale.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ptq.numerics import QParams
from ptq.quantizers import calibrated
from ptq.types import InputTransform, QuantSpec


def centring_shift(params: QParams, bits: int) -> Tensor:
    """Shift per channel (C,) from per-channel parameters."""
    return params.scale * (2 ** (bits - 1) - 1 - params.zero_point)


def symmetric_shift(x: Tensor, spec: QuantSpec) -> InputTransform:
    """The shift for inputs x (N, C), from (asymmetric) ranges that `spec` finds per channel."""
    shift = centring_shift(calibrated(x, replace(spec, granularity="in_channel", symmetric=False)), spec.bits)
    return InputTransform(shift.new_ones(shift.shape), shift)
