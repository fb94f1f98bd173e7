"""What of a quantized model is not a tensor, as plain values for a JSON file, and the modules made
of them again.

    rotation    {"kind": "hadamard", "order": n, "signs": text or null, "width": number of signs}
                {"kind": "across_heads", "heads", "size"}
    input       {"kind": "static", "bits", "segments", "short"} |
                {"kind": "dynamic", "bits", "symmetric", "include_zero"}
    operand     an input, or {"kind": "table", "bits", "segments", "heads", "sinks"},
                or {"kind": "numerators", "bits", "heads", "sinks"}
    module      {"kind": "rms_norm", "eps"}, {"kind": "entry", "centred", "rotation"},
                or {"kind": "exit", "rotation"}

`segments` is the number of a list of first positions, of the groups of tokens that share parameters
([0]: per tensor); a table has parameters per head, too, and `sinks` first keys that key weights
belong to, or 0. `short` is there where scales fit bfloat16 and zero points 16 bits. The lists of
segments stand once, by themselves, since hundreds of positions recur in every
block. Matrices of rotations are built anew, which is exact: their entries are integers. Their
random signs, which another version of PyTorch might draw otherwise, are written down, 8 in two
hexadecimal digits, 1 for plus. The modules are those that an offline rotation of a residual stream
leaves behind (`ptq/methods/quarot.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq.int8.codes import DynamicCodes, InputCodes
from ptq.methods.hadamard import AcrossHeads, HadamardRotation
from ptq.methods.quarot import Entry, Exit, RMSNorm
from ptq.modules import OnlineTransform, swap_module
from ptq.numbers.numerics import QParams
from ptq.numbers.quantizers import DynamicQuantizer, Passthrough, StaticQuantizer
from ptq.sites import Segments
from ptq.spec import ConfigError, QuantSpec
from ptq.staq.numerators import NumeratorQuantizer
from ptq.staq.positions import TableQuantizer
from ptq.transform import InputTransform, Rotation

Plain = dict[str, Any]  # of strings, numbers, booleans, None, and lists and dictionaries of these


def describe_rotation(rotation: Rotation | None) -> Plain | None:
    if rotation is None:
        return None
    if isinstance(rotation, AcrossHeads):
        return {"kind": "across_heads", "heads": rotation.heads, "size": rotation.size}
    if not isinstance(rotation, HadamardRotation):
        raise ConfigError(
            f"rotation: {type(rotation).__name__} has no place in an export, allowed are Hadamard's"
        )
    if rotation.signs is None:
        return {"kind": "hadamard", "order": rotation.order, "signs": None, "width": 0}
    signs = np.packbits((rotation.signs > 0).cpu().numpy()).tobytes().hex()
    return {
        "kind": "hadamard",
        "order": rotation.order,
        "signs": signs,
        "width": len(rotation.signs),
    }


def make_rotation(plain: Plain | None, device: torch.device) -> nn.Module | None:
    if plain is None:
        return None
    if plain["kind"] == "across_heads":
        return AcrossHeads(plain["heads"], plain["size"], device)
    rotation = HadamardRotation(plain["order"], device=device)
    if plain["signs"] is not None:
        bits = np.unpackbits(
            np.frombuffer(bytes.fromhex(plain["signs"]), np.uint8), count=plain["width"]
        )
        rotation.signs = torch.from_numpy(2.0 * bits.astype(np.float32) - 1).to(device)
    return rotation


def segment_starts(group: Tensor) -> list[int]:
    """The first position of each segment, of the segment (P,) of each position."""
    return [0, *((group[1:] != group[:-1]).nonzero().flatten() + 1).tolist()]


def describe_input(codes: InputCodes | DynamicCodes, segments: list[list[int]]) -> Plain:
    """`segments`: those of all inputs so far, to which these are added if they are new."""
    if isinstance(codes, DynamicCodes):
        return {
            "kind": "dynamic",
            "bits": codes.bits,
            "symmetric": codes.symmetric,
            "include_zero": codes.include_zero,
        }
    own = segment_starts(codes.group)
    if own not in segments:
        segments.append(own)
    plain = {"kind": "static", "bits": codes.bits, "segments": segments.index(own)}
    return plain | {"short": True} if codes.short else plain


def describe_operand(quantizer: nn.Module, segments: list[list[int]]) -> Plain:
    """A table of parameters by head, or numerators; its tensors are in the file."""
    sinks = 0 if quantizer.key_weights is None else quantizer.sinks
    if isinstance(quantizer, NumeratorQuantizer):
        bits = quantizer.levels.bit_length() - 1
        heads = len(quantizer.key_weights) if sinks else 0
        return {"kind": "numerators", "bits": bits, "heads": heads, "sinks": sinks}
    own = list(quantizer.segments.starts)
    if own not in segments:
        segments.append(own)
    return {
        "kind": "table",
        "bits": quantizer.spec.bits,
        "segments": segments.index(own),
        "heads": len(quantizer.scale),
        "sinks": sinks,
    }


def make_operand(
    plain: Plain,
    segments: list[list[int]],
    scale: Tensor | None,
    zero: Tensor | None,
    key_weights: Tensor | None,
) -> nn.Module:
    """The simulated quantizer of `describe_operand`; zero points are those of signed codes."""
    if plain["kind"] == "numerators":
        return NumeratorQuantizer(2 ** plain["bits"], key_weights, plain["sinks"])
    params = QParams(scale, zero.to(scale.dtype) + 2 ** (plain["bits"] - 1))
    starts = Segments(tuple(segments[plain["segments"]]))
    return TableQuantizer(QuantSpec(plain["bits"]), params, starts, key_weights, plain["sinks"])


def make_input(
    plain: Plain, segments: list[list[int]], scale: Tensor | None, zero: Tensor | None
) -> InputCodes | DynamicCodes:
    """Codes as `describe_input` got them; `scale` and `zero` are None for dynamic ones."""
    if plain["kind"] == "dynamic":
        return DynamicCodes(plain["bits"], plain["symmetric"], plain["include_zero"])
    segments = Segments(tuple(segments[plain["segments"]]))
    group = segments.index(torch.arange(segments.starts[-1] + 1, device=scale.device))
    short = plain.get("short", False)
    return InputCodes(scale, zero, group.to(torch.int32), plain["bits"], short)


def make_quantizer(codes: InputCodes | DynamicCodes | None) -> nn.Module:
    """The simulated quantizer of an attention product's operand."""
    if codes is None:
        return Passthrough()
    if isinstance(codes, DynamicCodes):
        spec = QuantSpec(
            codes.bits, codes.symmetric, "token_dynamic", include_zero=codes.include_zero
        )
        return DynamicQuantizer(spec)
    zero_point = (codes.zero_point + 2 ** (codes.bits - 1)).to(codes.scale.dtype)
    return StaticQuantizer(QuantSpec(codes.bits), QParams(codes.scale, zero_point))


def describe_transform(transform: OnlineTransform | None) -> Plain | None:
    """Which parts it has; its scale and shift are tensors of the file."""
    if transform is None:
        return None
    return {
        "scale": transform.scale is not None,
        "shift": transform.shift is not None,
        "rotation": describe_rotation(transform.rotation),
    }


def make_transform(
    plain: Plain | None, like: Tensor, channels: int, scale: Tensor | None, shift: Tensor | None
) -> OnlineTransform | None:
    if plain is None:
        return None
    identity = InputTransform.identity(channels, like)
    return OnlineTransform(
        InputTransform(
            identity.scale if scale is None else scale,
            identity.shift if shift is None else shift,
            make_rotation(plain["rotation"], like.device),
        )
    )


def describe_modules(model: nn.Module) -> dict[str, Plain]:
    """The modules that a fresh model has otherwise, by name."""
    found: dict[str, Plain] = {}
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            found[name] = {"kind": "rms_norm", "eps": module.eps}
        elif isinstance(module, Entry):
            rotation = describe_rotation(module.rotation)
            found[name] = {"kind": "entry", "centred": module.centred, "rotation": rotation}
        elif isinstance(module, Exit):
            found[name] = {"kind": "exit", "rotation": describe_rotation(module.rotation)}
    return found


def make_modules(model: nn.Module, plain: Mapping[str, Plain], device: torch.device) -> None:
    """Put those modules in the places of a fresh model's norms."""
    for name, each in plain.items():
        norm = model.get_submodule(name)
        if each["kind"] == "rms_norm":
            swap_module(model, name, RMSNorm(norm.weight, each["eps"]))
        elif each["kind"] == "entry":
            swap_module(
                model, name, Entry(norm, make_rotation(each["rotation"], device), each["centred"])
            )
        else:
            swap_module(model, name, Exit(norm, make_rotation(each["rotation"], device)))
