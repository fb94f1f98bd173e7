"""An export as torchao's static int8, `Int8StaticActivationInt8WeightConfig`, where every layer
fits.

torchao knows int8 weights without zero points, per row or tensor, and int8 activations with one
static scale and zero point per tensor. Everything else is refused, with the reason: token-wise or
dynamic activations, asymmetric weights, other bits, transforms that run online, low-rank branches,
quantized attention products.

The file holds a state dict whose quantized weights are torchao's `Int8Tensor`s, flattened as
torchao does it (`torchao.prototype.safetensors`, for which every name begins with `model.`), with
the buffers into which scales were folded beside them. torchao quantizes x * (1 / scale) where we
quantize x / scale, so a value that lies on the border of two codes may be rounded otherwise.
torchao is not needed by anything else (`requirements-extra.txt`; written for 0.18).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ptq.files import DamagedFile, read_tensors, write_tensors
from ptq.int8.codes import DynamicCodes, LinearCodes, linear_codes
from ptq.int8.exports import structure
from ptq.int8.exports.encoding import replace_tensor, unquantized_tensors
from ptq.int8.exports.export_files import ExportError
from ptq.modules import QuantLinear, QuantMatMul
from ptq.spec import ConfigError

PREFIX = "model."  # torchao cannot read back a tensor whose name has no dot


def require_torchao() -> None:
    """Raise `ConfigError` unless torchao is installed."""
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "export: torchao is not installed, it comes with pip install -r requirements-extra.txt"
        ) from error


def refusal_reason(codes: LinearCodes) -> str | None:
    """Why torchao's static int8 cannot hold a layer; None if it can."""
    if (codes.weight.bits, codes.input.bits) != (8, 8):
        return (
            f"it has {codes.weight.bits}-bit weights and {codes.input.bits}-bit activations, "
            "allowed is 8 and 8"
        )
    if bool(codes.weight.zero_point.any()):
        return "its weight has zero points, allowed is quant.weights.symmetric=true"
    if isinstance(codes.input, DynamicCodes):
        return "its activation has dynamic ranges, allowed are static ones"
    if len(codes.input.scale) > 1:
        return (
            "its activation has parameters per token position, "
            "allowed is one pair per tensor (method.stwq=false)"
        )
    if codes.sink_shift is not None:
        return "its sink tokens are shifted, allowed is method.sink_shift=false"
    if codes.transform is not None:
        return "a scale, shift or rotation runs in front of it, allowed are folded ones"
    if codes.down is not None:
        return "it has a low-rank branch, allowed is none"
    return None


def encode_state(model: nn.Module, bits: int) -> dict[str, Tensor]:
    """The state dict of a quantized model and its buffers, with an `Int8Tensor` for each weight.

    Raises:
        ConfigError: a layer or product does not fit torchao's static int8: names it and says why.
            Or torchao is not installed.
    """
    layers: dict[str, LinearCodes] = {}
    for name in structure.describe_modules(model):
        raise ConfigError(
            f"{name}: a rotation has taken the norm's place, torchao's static int8 allows "
            "plain models"
        )
    for name, module in model.named_modules():
        if isinstance(module, QuantMatMul):
            raise ConfigError(
                f"{name}: torchao has no quantized attention products, allowed is "
                "scope.matmuls=false"
            )
        if isinstance(module, QuantLinear):
            codes = linear_codes(module, bits, name)
            reason = refusal_reason(codes)
            if reason is not None:
                raise ConfigError(f"{name}: torchao's static int8 cannot hold it: {reason}")
            layers[name] = codes
    require_torchao()
    state = {f"{name}.weight": _int8_tensor(codes) for name, codes in layers.items()}
    for name, codes in layers.items():
        if codes.bias is not None:
            state[f"{name}.bias"] = codes.bias
    state |= unquantized_tensors(model, layers)
    return {name: value.detach() for name, value in state.items()}


def _int8_tensor(codes: LinearCodes) -> Tensor:
    """A layer's weight as torchao has it, with the parameters of its activation (B, T, C)."""
    from torchao.quantization import Int8Tensor, MappingType, PerTensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    weight = codes.weight
    input_params = codes.input
    return Int8Tensor(
        weight.codes,
        weight.scale[:, None],
        block_size=[1, weight.codes.shape[1]],
        dtype=torch.float32,
        zero_point=torch.zeros_like(weight.zero_point[:, None], dtype=torch.int8),
        act_quant_scale=input_params.scale.view(1, 1, 1),
        act_quant_zero_point=input_params.zero_point.view(1, 1, 1),
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(PerTensor(), MappingType.ASYMMETRIC),
    )


def save_state(state: Mapping[str, Tensor], path: Path, about: structure.Plain) -> None:
    """Write a state dict of `encode_state` as safetensors; the file appears whole or not at all.

    Raises:
        ExportError: it cannot be written.
    """
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors, metadata = flatten_tensor_state_dict(
        {f"{PREFIX}{name}": value for name, value in state.items()}
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = {**metadata, "about": json.dumps(about, allow_nan=False)}
        write_tensors(tensors, path, texts)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"export: {path} cannot be written ({error})") from error


@torch.no_grad()
def load_state(model: nn.Module, path: Path) -> None:
    """Put such a file into a fresh model of the same name, whose linears torchao then runs.

    Raises:
        ExportError: the file is missing, damaged, or of another model.
        ConfigError: torchao is not installed.
    """
    require_torchao()
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    try:
        tensors, metadata = read_tensors(path, sealed=False)  # older ones have no digest
        state, left = unflatten_tensor_state_dict(tensors, metadata)
    except DamagedFile as error:
        raise ExportError(f"export: {error}") from error
    except (ValueError, TypeError, KeyError) as error:  # of a foreign file
        raise ExportError(
            f"export: {path} cannot be read ({' '.join(str(error).split())})"
        ) from error
    state = {name.removeprefix(PREFIX): value for name, value in state.items()}
    misfits = [*_find_misfits(model, state), *left]
    if misfits:
        raise ExportError(
            f"export: {path} does not fit: {misfits[0]} is missing here or there, "
            "or of another shape"
        )
    for name, value in state.items():
        replace_tensor(model, name, value)


def _find_misfits(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that are only in one of model and state, or of another shape there."""
    own = unquantized_tensors(model, ())
    modules = dict(model.named_modules())
    misfits: list[str] = []
    for name, value in own.items():
        if name not in state or value.shape != state[name].shape:
            misfits.append(name)
    for name in state:
        owner, _, leaf = name.rpartition(".")
        # a bias that a shift was folded into is None in a fresh model
        if name not in own and not hasattr(modules.get(owner), leaf):
            misfits.append(name)
    return misfits
