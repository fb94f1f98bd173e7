"""A quantized linear layer as integers.

What simulation computes with floats on a grid is written here as codes and scales. Codes are stored
signed, c = q - 2^(b-1) in [-2^(b-1), 2^(b-1) - 1], and zero points are moved alike, so that

    w = w_scale (codes - w_zero_point)      per row of the weight
    x = x_scale (codes - x_zero_point)      per segment of token positions

Simulated weights lie on their grid exactly, so their codes are recovered from them bit for bit.
`epilogue.py` has the formula of the product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptq.modules import OnlineTransform, QuantLinear
from ptq.numbers.numerics import dequantize
from ptq.numbers.quantizers import DynamicQuantizer, StaticQuantizer
from ptq.sites import Segments
from ptq.spec import ConfigError
from ptq.staq.positions import CompactQParams, TableQuantizer
from ptq.staq.sink_shift import SinkShift
from ptq.stwq import TokenStaticQuantizer

# a product of so many rows at most, as in decoding, has tiles (`gemm.py`) and sums (`modules.py`)
# of its own kind
FEW_ROWS = 1024
UNIT_EPS = 1e-12  # a vector's length counts as this below it, as in `F.normalize`
HEAD_CHANNELS = 64  # of heads whose keys a product norms: half a tile of `gemm.py`
# added to a float32 below 2^22 in magnitude it leaves the nearest integer in the low bits
ROUNDING_CONSTANT = 1.5 * 2**23
ALIGNMENT = 16  # bytes; TMA asks for it of every row, so inputs are padded to a multiple of it


@dataclass(frozen=True)
class WeightCodes:
    """A weight in integers.

    Attributes:
        codes: (O, I) int8.
        scale: (O,) float32.
        zero_point: (O,) int32, of the signed codes.
        bits: of the codes, 8 at most.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    short: bool = False  # scales fit bfloat16 and zero points 16 bits

    def dequantize(self) -> Tensor:
        """The weight (O, I) float32 that the codes stand for, as simulation has it."""
        return (self.codes - self.zero_point[:, None]) * self.scale[:, None]

    def centred(self) -> WeightCodes:
        """The same weight without zero points in all rows where int8 holds what they are taken off.

        That is most rows at six or four bits, few at eight.
        """
        differences = self.codes.int() - self.zero_point[:, None]  # (O, I)
        fits = ((differences >= -128) & (differences <= 127)).all(dim=1)  # (O,)
        codes = torch.where(fits[:, None], differences, self.codes)
        return replace(self, codes=codes.to(torch.int8), zero_point=self.zero_point.where(~fits, 0))


@dataclass(frozen=True)
class InputCodes:
    """How an activation becomes codes, by segment of token positions.

    Attributes:
        scale: (G,) float32.
        zero_point: (G,) int32, of the signed codes.
        group: (P,) int32, the segment of each token position; the last entry is for all positions
            from there on. One segment (`group` of one zero) is per tensor.
        bits: of the codes, 8 at most.
    """

    scale: Tensor
    zero_point: Tensor
    group: Tensor
    bits: int
    short: bool = False  # as in `WeightCodes`

    def by_position(self) -> Tensor:
        """Scale, zero point and their product by token position, float32 (3, P)."""
        scale = self.scale[self.group]  # (P,)
        zero_point = self.zero_point[self.group].float()  # (P,)
        return torch.stack((scale, zero_point, scale * zero_point))


@dataclass(frozen=True)
class OperandCodes:
    """How an operand of attention becomes codes, by head and segment.

    Attributes:
        scale, zero_point: (H, G) float32 and int32, of the signed codes; one row serves all heads.
        group: that of `InputCodes`.
    """

    scale: Tensor
    zero_point: Tensor
    group: Tensor
    bits: int

    def by_position(self) -> Tensor:
        """Scale and zero point by head and token position, float32 (2, H, P)."""
        return torch.stack((self.scale, self.zero_point.float()))[:, :, self.group]


@dataclass(frozen=True)
class DynamicCodes:
    """How an activation becomes codes whose min-max range is found per token at run time.

    With `include_zero` the ranges are stretched to contain zero.
    """

    bits: int
    symmetric: bool
    include_zero: bool = False


@dataclass(frozen=True)
class LinearCodes:
    """A linear layer in integers.

    Attributes:
        bias: (O,) or None.
        transform: makes x' of x in front of the quantizer; None where it is folded.
        down, up: the low-rank branch (r, I) and (O, r) that reads x', or None.
        sink_shift: what is taken off the input of sink tokens, and given back; or None.
    """

    weight: WeightCodes
    input: InputCodes | DynamicCodes
    bias: Tensor | None
    transform: OnlineTransform | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    sink_shift: SinkShift | None = None


def _integer_zero_points(zero_point: Tensor, name: str) -> Tensor:
    are_integers = torch.equal(zero_point, zero_point.round())
    if not are_integers or bool((zero_point.abs() >= 2**31).any()):
        raise ConfigError(
            f"{name}: zero points are not integers below 2^31, the integer path allows nothing else"
        )
    return zero_point.to(torch.int32)


def _require_integers(quantizer: torch.nn.Module, name: str) -> None:
    if quantizer.spec.format != "int":
        raise ConfigError(
            f"{name}: format {quantizer.spec.format} has no integer path, allowed is int"
        )


def _require_tokens(quantizer: torch.nn.Module, name: str) -> None:
    """Refuse parameters by group of channels, channel or head: kernels have those of tokens."""
    spec = quantizer.spec
    granularity = spec.granularity
    if spec.group_size is not None and granularity == "token_static":
        granularity = "group"
    if granularity in ("group", "channel", "head", "head_segment"):
        raise ConfigError(
            f"{name}: granularity {granularity} has no integer path, allowed are tensor, "
            "token_static and token_dynamic"
        )


def weight_codes(linear: QuantLinear, bits: int, name: str = "weight") -> WeightCodes:
    """The codes of a rounded weight.

    Raises:
        ConfigError: the weight is not rounded, or not to an integer grid of so many bits.
    """
    params = linear.weight_params
    if params is None:
        raise ConfigError(f"{name}: the weight is not quantized, allowed is a quantized model")
    if len(params.scale) not in (1, len(linear.weight)):
        raise ConfigError(
            f"{name}: granularity group has no integer path, allowed are out_channel and tensor"
        )
    grid = params.view(-1, 1)  # (O, 1), or (1, 1) per tensor
    zero_point = _integer_zero_points(params.zero_point, name)
    codes = torch.round(linear.weight / grid.scale) + grid.zero_point  # (O, I)
    on_grid = torch.equal(dequantize(codes, grid), linear.weight)
    if not on_grid or bool(((codes < 0) | (codes >= 2**bits)).any()):
        raise ConfigError(f"{name}: the weight does not lie on an integer grid of {bits} bits")
    half = 2 ** (bits - 1)  # taken off, it makes the codes signed
    # per tensor, all rows have the same scale and zero point
    rows = len(linear.weight)
    return WeightCodes(
        codes=(codes - half).to(torch.int8),
        scale=params.scale.float().expand(rows).contiguous(),
        zero_point=(zero_point - half).expand(rows).contiguous(),
        bits=bits,
        short=isinstance(params, CompactQParams),
    )


def input_codes(quantizer: torch.nn.Module, name: str = "input") -> InputCodes | DynamicCodes:
    """How a simulated activation quantizer makes codes.

    Raises:
        ConfigError: it has no integer counterpart.
    """
    if isinstance(quantizer, DynamicQuantizer):
        _require_integers(quantizer, name)
        spec = quantizer.spec
        return DynamicCodes(spec.bits, spec.symmetric, spec.include_zero)
    if not isinstance(quantizer, StaticQuantizer | TokenStaticQuantizer | TableQuantizer):
        raise ConfigError(
            f"{name}: {type(quantizer).__name__} has no integer path, "
            "allowed are static and dynamic quantizers"
        )
    _require_integers(quantizer, name)
    _require_tokens(quantizer, name)
    half = 2 ** (quantizer.spec.bits - 1)
    scale = quantizer.scale.flatten().float()  # (G,)
    zero_point = _integer_zero_points(quantizer.zero_point.flatten(), name) - half  # (G,)
    if isinstance(quantizer, TokenStaticQuantizer):
        group = quantizer.group.to(torch.int32)
    elif isinstance(quantizer, TableQuantizer) and quantizer.scale.dim() == 1:
        group = position_groups(quantizer.segments, scale.device)
    elif len(scale) == 1:
        group = torch.zeros(1, dtype=torch.int32, device=scale.device)
    else:
        raise ConfigError(f"{name}: granularity {quantizer.spec.granularity} has no integer path")
    short = isinstance(quantizer, TableQuantizer)
    return InputCodes(scale, zero_point, group, quantizer.spec.bits, short)


def operand_codes(quantizer: torch.nn.Module, name: str) -> OperandCodes:
    """How a simulated quantizer of queries, keys or values makes codes.

    Raises:
        ConfigError: it has no integer counterpart.
    """
    _require_integers(quantizer, name)
    _require_tokens(quantizer, name)
    half = 2 ** (quantizer.spec.bits - 1)
    zero_point = _integer_zero_points(quantizer.zero_point, name) - half
    scale = quantizer.scale.float()  # (H, G), or (G,)
    segments = quantizer.segments if isinstance(quantizer, TableQuantizer) else Segments()
    if scale.dim() < 2:
        scale = scale.view(1, -1)
        zero_point = zero_point.view(1, -1)
    group = position_groups(segments, scale.device)
    return OperandCodes(scale, zero_point, group, quantizer.spec.bits)


def position_groups(segments: Segments, device: torch.device) -> Tensor:
    """The segment (P,) int32 of every position up to the one that begins the last segment."""
    return segments.index(torch.arange(segments.starts[-1] + 1, device=device)).to(torch.int32)


def linear_codes(linear: QuantLinear, bits: int, name: str = "linear") -> LinearCodes:
    """A quantized linear layer in integers; `bits` are those of its weight, where it does not say.

    Raises:
        ConfigError: it has no integer counterpart; the message names the layer.
    """
    if linear.weight_spec is not None:
        bits = linear.weight_spec.bits
    # inputs first: theirs are the commoner errors
    codes_of_input = input_codes(linear.input, name)
    return LinearCodes(
        weight=weight_codes(linear, bits, name),
        input=codes_of_input,
        bias=linear.bias,
        transform=linear.transform,
        down=linear.down,
        up=linear.up,
        sink_shift=linear.sink_shift,
    )
