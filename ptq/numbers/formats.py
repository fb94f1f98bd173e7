"""Number formats beside the integer grid, as pure functions on tensors: what a value is rounded to.
Their zero point is 0.

    log_sqrt2   k = max(0, round(-2 log2(x / s))),   x^ = s 2^(-k/2) for k < 2^b, else 0
    fp8_e4m3    x^ = s fp8(x / s), the 8-bit float of 4 exponent and 3 mantissa bits, at most 448

`log_sqrt2` is RepQ-ViT's quantizer of attention weights (Li et al., 2023; `LogSqrt2Quantizer` in
the official code). It resolves small weights well, but its largest steps are s, .707 s and .5 s
whatever the bits: a weight of 2^(-1/4) s, near .84 s, is .159 s off, against half a step of
1 / (2^b - 1) for integers. As in the official code, zero is a code beyond the 2^b powers, so that a
kernel needs one more, or gives the smallest power up.

`fp8_e4m3` is a control: a format that current GPUs compute in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.numbers.numerics import QParams, one_for_zero
from ptq.registry.entries import register_format
from ptq.spec import QuantSpec

E4M3_MAX = 448.0


def log_sqrt2(x: Tensor, scale: Tensor, levels: int) -> Tensor:
    """Non-negative x rounded to `scale` times a power of sqrt(2), or to zero; negative x give
    zero."""
    power = torch.round(-2 * torch.log2(x.clamp(min=0) / scale)).clamp_(min=0)
    return torch.where(power < levels, scale * torch.exp2(-power / 2), 0)


def round_to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x rounded to `scale` times the nearest 8-bit float, and to 448 * scale at most."""
    return e4m3_codes(x, scale).to(x.dtype) * scale


def e4m3_codes(x: Tensor, scale: Tensor) -> Tensor:
    """The 8-bit floats (`torch.float8_e4m3fn`) of `round_to_e4m3`."""
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


@register_format("log_sqrt2", operands=("softmax",))
class LogSqrt2:
    """Powers of sqrt(2) below the largest value."""

    @staticmethod
    def choose_params(lo: Tensor, hi: Tensor, spec: QuantSpec) -> QParams:
        return QParams(one_for_zero(hi), torch.zeros_like(hi))

    @staticmethod
    def simulate(x: Tensor, params: QParams, spec: QuantSpec) -> Tensor:
        return log_sqrt2(x, params.scale, spec.levels)


@register_format("fp8_e4m3", operands=("weights", "activations"), bits=8)
class E4M3:
    """8-bit floats, the largest of which stands for the largest magnitude."""

    @staticmethod
    def choose_params(lo: Tensor, hi: Tensor, spec: QuantSpec) -> QParams:
        scale = one_for_zero(torch.maximum(lo.abs(), hi.abs()) / E4M3_MAX)  # (G,)
        return QParams(scale, torch.zeros_like(scale))

    @staticmethod
    def simulate(x: Tensor, params: QParams, spec: QuantSpec) -> Tensor:
        return round_to_e4m3(x, params.scale)
