"""A quantized linear layer as integers: what simulation computes with floats on a grid, written as
codes and scales.

Codes are stored signed, c = q - 2^(b-1) in [-2^(b-1), 2^(b-1) - 1], and zero points are moved
alike, so that a weight is w = sw (cw - zw) per row and an activation x = sx (cx - zx) per segment
of token positions. Then

    y = x w^T + bias = sx sw [ cx cw^T - zx sum cw - zw sum cx + K zx zw ] + bias        (sums over
    the K inputs)

Simulated weights lie on their grid exactly, so their codes are recovered from them bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptq.modules import OnlineTransform, QuantLinear
from ptq.numbers.numerics import dequantize
from ptq.numbers.quantizers import DynamicQuantizer, StaticQuantizer
from ptq.spec import ConfigError
from ptq.stwq import TokenStaticQuantizer

# rows of a product at most, as in decoding, for other tiles (`gemm.py`) and other sums
# (`modules.py`)
FEW_ROWS = 1024


@dataclass(frozen=True)
class WeightCodes:
    """codes (O, I) int8; scale (O,) float32; zero (O,) int32, of the signed codes."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    def values(self) -> Tensor:
        """The weight (O, I) float32 that the codes stand for, as simulation has it."""
        return (self.codes - self.zero[:, None]) * self.scale[:, None]

    def centred(self) -> WeightCodes:
        """The same weight with the zero points taken off the codes in all rows where these fit int8
        still: most at six or four bits, few at eight."""
        codes = self.codes.int() - self.zero[:, None]
        fits = ((codes >= -128) & (codes <= 127)).all(dim=1)
        return replace(
            self,
            codes=torch.where(fits[:, None], codes, self.codes).to(torch.int8),
            zero=self.zero.where(~fits, 0),
        )


@dataclass(frozen=True)
class InputCodes:
    """How an activation becomes codes: by segment scale (G,) float32 and zero (G,) int32, of the
    signed codes.

    `group` (P,) int32 is the segment of each token position, its last entry that of all positions
    from there on. One segment (`group` of one zero) is per tensor.
    """

    scale: Tensor
    zero: Tensor
    group: Tensor
    bits: int

    def by_position(self) -> Tensor:
        """Scale, zero point and their product by token position, float32 (3, P)."""
        scale = self.scale[self.group]
        zero = self.zero[self.group].float()
        return torch.stack((scale, zero, scale * zero))


@dataclass(frozen=True)
class DynamicCodes:
    """An activation whose min-max range, stretched to `include_zero` or not, is found per token at
    run time."""

    bits: int
    symmetric: bool
    include_zero: bool = False


@dataclass(frozen=True)
class LinearCodes:
    """A linear layer in integers.

    Attributes:
        bias: (O,) or None. transform: makes x' of x in front of the quantizer, None where that is
            folded.
        down, up: the low-rank branch (r, I) and (O, r) that reads x', or None.
    """

    weight: WeightCodes
    input: InputCodes | DynamicCodes
    bias: Tensor | None
    transform: OnlineTransform | None = None
    down: Tensor | None = None
    up: Tensor | None = None


def _integers(value: Tensor, what: str) -> Tensor:
    if not torch.equal(value, value.round()) or bool((value.abs() >= 2**31).any()):
        raise ConfigError(
            f"{what}: zero points are not integers below 2^31, the integer path allows nothing else"
        )
    return value.to(torch.int32)


def _integer_format(quantizer: torch.nn.Module, name: str) -> None:
    if quantizer.spec.format != "int":
        raise ConfigError(
            f"{name}: format {quantizer.spec.format} has no integer path, allowed is int"
        )


def weight_codes(linear: QuantLinear, bits: int, name: str = "weight") -> WeightCodes:
    """The codes of a rounded weight.

    Raises:
        ConfigError: the weight is not rounded, or not to an integer grid of so many bits.
    """
    params = linear.weight_params
    if params is None:
        raise ConfigError(f"{name}: the weight is not quantized, allowed is a quantized model")
    grid = params.view(-1, 1)
    zero = _integers(params.zero_point, name)
    codes = torch.round(linear.weight / grid.scale) + grid.zero_point
    if not torch.equal(dequantize(codes, grid), linear.weight) or bool(
        ((codes < 0) | (codes >= 2**bits)).any()
    ):
        raise ConfigError(f"{name}: the weight does not lie on an integer grid of {bits} bits")
    # per tensor, all rows have the same scale and zero point
    half = 2 ** (bits - 1)
    rows = len(linear.weight)
    scale = params.scale.float().expand(rows)
    zero = (zero - half).expand(rows)
    return WeightCodes((codes - half).to(torch.int8), scale.contiguous(), zero.contiguous(), bits)


def input_codes(quantizer: torch.nn.Module, name: str = "input") -> InputCodes | DynamicCodes:
    """How a simulated activation quantizer makes codes.

    Raises:
        ConfigError: it has no integer counterpart.
    """
    if isinstance(quantizer, DynamicQuantizer):
        _integer_format(quantizer, name)
        return DynamicCodes(
            quantizer.spec.bits, quantizer.spec.symmetric, quantizer.spec.include_zero
        )
    if not isinstance(quantizer, StaticQuantizer | TokenStaticQuantizer):
        raise ConfigError(
            f"{name}: {type(quantizer).__name__} has no integer path, allowed are static and dynamic "
            "quantizers"
        )
    _integer_format(quantizer, name)
    half = 2 ** (quantizer.spec.bits - 1)
    scale = quantizer.scale.flatten().float()
    zero = _integers(quantizer.zero_point.flatten(), name) - half
    if isinstance(quantizer, TokenStaticQuantizer):
        group = quantizer.group.to(torch.int32)
    elif len(scale) == 1:
        group = torch.zeros(1, dtype=torch.int32, device=scale.device)
    else:
        raise ConfigError(f"{name}: granularity {quantizer.spec.granularity} has no integer path")
    return InputCodes(scale, zero, group, quantizer.spec.bits)


def linear_codes(linear: QuantLinear, bits: int, name: str = "linear") -> LinearCodes:
    """A quantized linear layer in integers; `bits` are those of its weight.

    Raises:
        ConfigError: it has no integer counterpart; the message names the layer.
    """
    reads = input_codes(linear.input, name)
    return LinearCodes(
        weight_codes(linear, bits, name),
        reads,
        linear.bias,
        linear.transform,
        linear.down,
        linear.up,
    )
