"""What of an export has no integer kernel: weights in groups or in floating-point formats, weights
and activations that are left as they are, activations by group, channel or head.

It is stored as codes all the same, and comes back as simulation computes with it, bit for bit. In
the description (`structure.py`) such a layer has `weight`, and such a quantizer the kind
`simulated`:

    weight      {"bits", "format", "granularity", "group_size"}
    quantizer   {"kind": "simulated", "spec": fields of QuantSpec, "segments", "parameters": how
                 many pairs there are, "whole": whether a scale of the tensor is there, "table"}

Codes of b bits are packed (`packing.py`). Those of a floating-point format are its own bits: sign,
exponent, mantissa. Scales are float32, but for blocks: a power of two is its exponent + 127 in a
byte (e8m0), and a scale of NVFP4 the byte of an 8-bit float (e4m3) beside the tensor's scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor, nn

from ptq.int8.exports.packing import pack_codes, packed_size, unpack_codes
from ptq.int8.exports.structure import Plain
from ptq.modules import QuantLinear
from ptq.numbers.formats import E4M3_MAX
from ptq.numbers.grouping import count_groups, params_of_columns
from ptq.numbers.numerics import QParams, dequantize
from ptq.numbers.quantizers import (
    DynamicQuantizer,
    GroupQuantizer,
    Passthrough,
    StaticQuantizer,
    run_time_quantizer,
)
from ptq.numbers.small_floats import E8M0_BIAS, FloatGrid, exponent_of
from ptq.registry.entries import FORMATS
from ptq.sites import Segments
from ptq.spec import ConfigError, QuantSpec
from ptq.staq.positions import CompactQParams, TableQuantizer
from ptq.stwq import TokenStaticQuantizer, static_quantizer

# granularities that kernels know: of weights, and of activations
KERNEL_WEIGHTS = ("out_channel", "tensor")
KERNEL_INPUTS = ("tensor", "token_static", "token_dynamic")
KEPT_FORMATS = ("int", "fp8_e4m3")  # beside those with a grid
Kind = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor


def weight_obstacle(spec: QuantSpec) -> str | None:
    """What of a weight's spec has no integer kernel, as a message names it; None: nothing."""
    if not spec.is_rounded:
        return f"bits {spec.bits}"
    if spec.format != "int":
        return f"format {spec.format}"
    return None if spec.granularity in KERNEL_WEIGHTS else f"granularity {spec.granularity}"


def input_obstacle(spec: QuantSpec) -> str | None:
    """The same of an activation's spec."""
    if not spec.is_rounded:
        return f"bits {spec.bits}"
    if spec.format != "int":
        return f"format {spec.format}"
    if spec.granularity not in KERNEL_INPUTS:
        return f"granularity {spec.granularity}"
    return None if spec.group_size is None else "granularity group"


def is_kept_format(spec: QuantSpec) -> bool:
    """Whether an export can hold numbers of a format."""
    return spec.format in KEPT_FORMATS or hasattr(FORMATS[spec.format].kind, "grid")


def is_simulated(quantizer: nn.Module) -> bool:
    """Whether a quantizer has no integer counterpart, and an export can hold it."""
    spec = getattr(quantizer, "spec", None)
    if spec is None or not is_kept_format(spec):
        return False
    return isinstance(quantizer, GroupQuantizer) or input_obstacle(spec) is not None


def needs_simulation(linear: QuantLinear) -> bool:
    """Whether a layer has no integer counterpart, and an export can hold it."""
    spec = linear.weight_spec
    if spec is None or not is_kept_format(spec):
        return False
    by_input = isinstance(linear.input, Passthrough) or is_simulated(linear.input)
    return by_input or weight_obstacle(spec) is not None


# --- weights


def describe_weight(spec: QuantSpec) -> Plain:
    return {
        "bits": spec.bits,
        "format": spec.format,
        "granularity": spec.granularity,
        "group_size": spec.group_size,
    }


def make_weight_spec(plain: Plain) -> QuantSpec:
    # the range rule has done its work; blocks know one only
    return QuantSpec(range="minmax", **plain)


def parameter_count(spec: QuantSpec, shape: tuple[int, int]) -> int:
    """How many scales a weight of a shape has."""
    if spec.granularity == "tensor":
        return 1
    rows, columns = shape
    return rows * (count_groups(columns, spec.group_size) if spec.group_size else 1)


def encode_weight(name: str, linear: QuantLinear, rest: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a weight, by name.

    Args:
        rest: number format of a weight that is left as it is.

    Raises:
        ConfigError: the weight does not lie on the grid of its spec.
    """
    spec = linear.weight_spec
    weight = linear.weight
    if not spec.is_rounded:
        return {f"{name}.weight.values": weight.to(rest)}
    params = linear.weight_params
    by_value = params_of_columns(params, spec, weight)
    if spec.format == "int":
        codes = torch.round(weight / by_value.scale) + by_value.zero_point
        codes = codes - 2 ** (spec.bits - 1)
    else:
        codes = float_codes(weight / by_value.scale, spec)
    tensors = {f"{name}.weight.codes": stored_codes(codes.to(torch.int8), spec.bits)}
    tensors |= encode_scales(f"{name}.weight", params, spec)
    if not torch.equal(decode_weight(name, tensors, spec, tuple(weight.shape)), weight):
        raise ConfigError(f"{name}: the weight does not lie on a grid of {spec.format}")
    return tensors


def stored_codes(codes: Tensor, bits: int) -> Tensor:
    return codes if bits == 8 else pack_codes(codes, bits)


def float_codes(numbers: Tensor, spec: QuantSpec) -> Tensor:
    """Bits of numbers of a format, as signed codes: minus half of what they can be."""
    if spec.format == "fp8_e4m3":
        return numbers.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.int8)
    half = 2 ** (spec.bits - 1)
    table = grid_of(spec).positive_numbers().to(numbers)
    # division by the scale may have moved a number off the grid by a rounding error
    middles = (table[1:] + table[:-1]) / 2
    magnitude = torch.bucketize(numbers.abs().contiguous(), middles)
    return magnitude + half * numbers.signbit() - half


def float_numbers(codes: Tensor, spec: QuantSpec) -> Tensor:
    """The numbers of a format, float32, that codes of `float_codes` stand for."""
    if spec.format == "fp8_e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    half = 2 ** (spec.bits - 1)
    bits = codes.int() + half
    table = grid_of(spec).positive_numbers().to(codes.device)
    magnitude = table[bits % half]
    return torch.where(bits >= half, -magnitude, magnitude)


def grid_of(spec: QuantSpec) -> FloatGrid:
    return FORMATS[spec.format].kind.grid


def encode_scales(name: str, params: QParams, spec: QuantSpec) -> dict[str, Tensor]:
    """Scales as they are stored, and zero points of integers."""
    scale = params.scale.float()
    number_format = FORMATS[spec.format]
    if spec.format == "int":
        zero_point = params.zero_point.to(torch.int32) - 2 ** (spec.bits - 1)
        if isinstance(params, CompactQParams):
            return {f"{name}.scale": scale.bfloat16(), f"{name}.zero": zero_point.to(torch.int16)}
        return {f"{name}.scale": scale.clone(), f"{name}.zero": zero_point}
    if number_format.tensor_scale:
        whole, relative = split_scales(name, scale)
        return {f"{name}.scale": relative.view(torch.uint8), f"{name}.whole": whole}
    if number_format.scale_bytes == 1:
        return {f"{name}.scale": (exponent_of(scale) + E8M0_BIAS).to(torch.uint8)}
    return {f"{name}.scale": scale.clone()}


def split_scales(name: str, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The tensor's scale (1,), and those of its blocks relative to it as 8-bit floats.

    Raises:
        ConfigError: they are no such products.
    """
    largest = scale.max()[None]  # of the block with the relative scale 448
    guess = largest / E4M3_MAX
    for whole in (guess, guess.nextafter(largest), guess.nextafter(torch.zeros_like(guess))):
        relative = (scale / whole).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
        if torch.equal(relative.to(scale.dtype) * whole, scale):
            return whole, relative
    raise ConfigError(f"{name}: scales of blocks are no 8-bit floats times one of the tensor")


def decode_scales(name: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QParams:
    """Scales and zero points as simulation has them."""
    stored = tensors[f"{name}.scale"]
    number_format = FORMATS[spec.format]
    if spec.format == "int":
        zero_point = tensors[f"{name}.zero"].float() + 2 ** (spec.bits - 1)
        kind = CompactQParams if stored.dtype == torch.bfloat16 else QParams
        return kind(stored.float(), zero_point)
    if number_format.tensor_scale:
        scale = stored.view(torch.float8_e4m3fn).float() * tensors[f"{name}.whole"]
    elif number_format.scale_bytes == 1:
        exponent = stored.int() - E8M0_BIAS
        scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    else:
        scale = stored
    return QParams(scale, torch.zeros_like(scale))


def decode_weight(
    name: str, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, int]
) -> Tensor:
    """The weight (O, I) as simulation has it."""
    if not spec.is_rounded:
        return tensors[f"{name}.weight.values"].float()
    codes = tensors[f"{name}.weight.codes"]
    codes = codes if spec.bits == 8 else unpack_codes(codes, shape, spec.bits)
    params = decode_scales(f"{name}.weight", tensors, spec)
    by_value = params_of_columns(params, spec, codes)
    if spec.format == "int":
        return dequantize(codes.float() + 2 ** (spec.bits - 1), by_value)
    return float_numbers(codes, spec) * by_value.scale


def weight_tensors(layer: Plain, rest: torch.dtype) -> dict[str, Kind]:
    """The tensors of a layer's weight with their dtypes and shapes, by the end of their names."""
    spec = make_weight_spec(layer["weight"])
    shape = tuple(layer["shape"])
    if not spec.is_rounded:
        return {"weight.values": (rest, shape)}
    packed = (torch.uint8, (packed_size(shape[0] * shape[1], spec.bits),))
    kinds = {"weight.codes": (torch.int8, shape) if spec.bits == 8 else packed}
    count = (parameter_count(spec, shape),)
    number_format = FORMATS[spec.format]
    if spec.format == "int":
        short = layer.get("short", False)
        kinds["weight.scale"] = (torch.bfloat16 if short else torch.float32, count)
        kinds["weight.zero"] = (torch.int16 if short else torch.int32, count)
        return kinds
    is_byte = number_format.scale_bytes == 1
    kinds["weight.scale"] = (torch.uint8 if is_byte else torch.float32, count)
    if number_format.tensor_scale:
        kinds["weight.whole"] = (torch.float32, (1,))
    return kinds


def restore_weight(
    linear: QuantLinear, name: str, layer: Plain, tensors: Mapping[str, Tensor]
) -> None:
    """Give a layer the weight that was stored."""
    spec = make_weight_spec(layer["weight"])
    linear.weight = decode_weight(name, tensors, spec, tuple(layer["shape"]))
    linear.weight_spec = spec
    if spec.is_rounded:
        linear.weight_params = decode_scales(f"{name}.weight", tensors, spec)


# --- quantizers of activations


def describe_quantizer(
    name: str, quantizer: nn.Module, segments: list[list[int]], tensors: dict[str, Tensor]
) -> Plain | None:
    """A quantizer in front of a layer without kernel, or of an operand; its tensors are added.

    Args:
        segments: those of all inputs so far, to which these are added if they are new.

    Raises:
        ConfigError: an export has no place for it.
    """
    if isinstance(quantizer, Passthrough):
        return None
    known = StaticQuantizer | TokenStaticQuantizer | TableQuantizer
    dynamic = DynamicQuantizer | GroupQuantizer
    if not isinstance(quantizer, known | dynamic) or not is_kept_format(quantizer.spec):
        raise ConfigError(
            f"{name}: {type(quantizer).__name__} has no place in an export, allowed are "
            "static and dynamic quantizers"
        )
    plain: Plain = {
        "kind": "simulated",
        "spec": asdict(quantizer.spec),
        "segments": None,
        "parameters": [],
        "whole": False,
        "table": isinstance(quantizer, TableQuantizer),
    }
    if isinstance(quantizer, dynamic):
        whole = getattr(quantizer, "whole", None)
        if whole is not None:
            plain["whole"] = True
            tensors[f"{name}.whole"] = whole.float().view(1)
        return plain
    if isinstance(quantizer, TokenStaticQuantizer | TableQuantizer):
        own = list(quantizer.segments.starts)
        if own not in segments:
            segments.append(own)
        plain["segments"] = segments.index(own)
    plain["parameters"] = list(quantizer.scale.shape)
    tensors[f"{name}.scale"] = quantizer.scale.float().clone()
    tensors[f"{name}.zero"] = quantizer.zero_point.to(torch.int32)
    return plain


def quantizer_tensors(plain: Plain) -> dict[str, Kind]:
    """The tensors of a quantizer with their dtypes and shapes, by the end of their names."""
    kinds: dict[str, Kind] = {}
    if plain["whole"]:
        kinds["whole"] = torch.float32, (1,)
    if plain["parameters"]:
        shape = tuple(plain["parameters"])
        kinds["scale"] = torch.float32, shape
        kinds["zero"] = torch.int32, shape
    return kinds


def make_quantizer(
    name: str, plain: Plain | None, segments: list[list[int]], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """The quantizer that was described."""
    if plain is None:
        return Passthrough()
    spec = QuantSpec(**plain["spec"])
    if plain["whole"]:
        return GroupQuantizer(spec, tensors[f"{name}.whole"][0])
    if not plain["parameters"]:
        return run_time_quantizer(spec)
    scale = tensors[f"{name}.scale"]
    params = QParams(scale, tensors[f"{name}.zero"].to(scale.dtype))
    own = Segments() if plain["segments"] is None else Segments(tuple(segments[plain["segments"]]))
    if plain["table"]:
        return TableQuantizer(spec, params, own)
    return static_quantizer(spec, params, own)
