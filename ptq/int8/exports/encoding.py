"""Between a quantized model and what its files hold (`export_files.py`).

encode_model(quantized model)        -> Export    what has no place in it is refused
restore_model(fresh model, Export)   -> codes by layer; the rest is put into the model
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ptq.int8.codes import (
    DynamicCodes,
    InputCodes,
    LinearCodes,
    WeightCodes,
    input_codes,
    linear_codes,
    operand_codes,
)
from ptq.int8.exports import simulated, structure
from ptq.int8.exports.export_files import Export, ExportError
from ptq.int8.exports.packing import packed_size, unpack_codes
from ptq.int8.exports.structure import Plain
from ptq.methods.hadamard import AcrossHeads, HadamardRotation
from ptq.modules import QuantLinear, QuantMatMul, swap_module
from ptq.numbers.quantizers import Passthrough
from ptq.recipe import Recipe
from ptq.sites import Adapter
from ptq.spec import ConfigError, QuantSpec, require
from ptq.staq.numerators import NumeratorQuantizer
from ptq.staq.positions import CompactQParams, TableQuantizer
from ptq.staq.sink_shift import SinkShift

WEIGHTS_ALLOWED = {
    "bits": "are 2 to 8",
    "format": "is int",
    "granularity": "are out_channel and tensor",
}
INPUTS_ALLOWED = WEIGHTS_ALLOWED | {"granularity": "are tensor and token_dynamic"}
REST = {"float16": torch.float16, "float32": torch.float32}
Kind = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor


def check_integer_path(adapter: Adapter, recipe: Recipe) -> None:
    """Refuse, before anything is calibrated, what has no integer path whatever calibration finds.

    Raises:
        ConfigError: names the first layer or operand of a product whose number format is none of
            integers, or whose granularity has no kernel.
    """
    if not recipe.scope.sites(adapter):
        raise ConfigError("scope.kinds: no linear layer is quantized that could run in integers")
    if recipe.shift_and_sum:
        raise ConfigError("method.shift_and_sum: true has no integer path, allowed is false")
    for site in recipe.scope.sites(adapter):
        own = recipe.at_site(adapter, site)
        _require_kernel(site.name, simulated.weight_obstacle(own.weights), WEIGHTS_ALLOWED)
        _require_kernel(site.name, simulated.input_obstacle(own.activations), INPUTS_ALLOWED)
    for product in recipe.scope.products(adapter):
        for operand in ("a", "b"):
            spec = recipe.operand(adapter, product, operand)
            # None is left as it is, numerators are integers of another form
            if spec is None or spec.format == "numerators":
                continue
            obstacle = simulated.input_obstacle(spec)
            _require_kernel(f"{product.name}.{operand}", obstacle, INPUTS_ALLOWED)


def _require_kernel(name: str, obstacle: str | None, allowed: Mapping[str, str]) -> None:
    if obstacle is not None:
        raise ConfigError(
            f"{name}: {obstacle} has no integer path, allowed {allowed[obstacle.split()[0]]}"
        )


def check_export(adapter: Adapter, recipe: Recipe) -> None:
    """Refuse, before anything is calibrated, what an export has no place for.

    Raises:
        ConfigError: names the first layer or operand of a product whose number format it is.
    """
    for site in recipe.scope.sites(adapter):
        own = recipe.at_site(adapter, site)
        for spec in (own.weights, own.activations):
            _require_kept_format(site.name, spec)
    for product in recipe.scope.products(adapter):
        for operand in ("a", "b"):
            spec = recipe.operand(adapter, product, operand)
            if spec is not None and spec.format != "numerators":
                _require_kept_format(f"{product.name}.{operand}", spec)


def _require_kept_format(name: str, spec: QuantSpec) -> None:
    if not simulated.is_kept_format(spec):
        raise ConfigError(f"{name}: format {spec.format} has no integer path, allowed is int")


def encode_model(model: nn.Module, bits: int, rest: str = "float16") -> Export:
    """A quantized model as integers.

    Args:
        bits: of the weights.
        rest: number format of what is not quantized.

    Raises:
        ConfigError: a layer or product has no integer path, or is not in float32: names it and says
            why. Or a value of the rest is beyond FP16.
    """
    require("rest", rest, tuple(REST))
    plain: Plain = {"rest": rest, "segments": [], "layers": {}, "products": {}}
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            plain["layers"][name] = _encode_layer(name, module, bits, plain, tensors)
        elif isinstance(module, QuantMatMul):
            plain["products"][name] = _encode_product(name, module, plain["segments"], tensors)
    if not plain["layers"] and not plain["products"]:
        raise ConfigError("model: no layer is quantized, allowed is a quantized model")
    plain["modules"] = structure.describe_modules(model)
    for name, value in unquantized_tensors(model, (*plain["layers"], *plain["products"])).items():
        stored = value.to(REST[rest]) if value.is_floating_point() else value
        if not torch.equal(stored.isinf(), value.isinf()):
            raise ConfigError(
                f"rest: float16 cannot hold {name}, whose values reach {value.abs().max():g}, "
                "allowed is float32"
            )
        tensors[name] = stored
    return Export(
        plain, {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    )


def _encode_layer(
    name: str, linear: QuantLinear, bits: int, plain: Plain, tensors: dict[str, Tensor]
) -> Plain:
    """A layer as integers or, where it has no kernel, as simulation has it."""
    if linear.weight.dtype != torch.float32:
        raise ConfigError(f"{name}: the weight is {linear.weight.dtype}, allowed is torch.float32")
    segments = plain["segments"]
    layer: Plain = {"shape": list(linear.weight.shape)}
    if simulated.needs_simulation(linear):
        spec = linear.weight_spec
        tensors |= simulated.encode_weight(name, linear, REST[plain["rest"]])
        layer |= {"bits": spec.bits, "weight": simulated.describe_weight(spec)}
        described = simulated.describe_quantizer(f"{name}.input", linear.input, segments, tensors)
        is_short = isinstance(linear.weight_params, CompactQParams)
    else:
        codes = linear_codes(linear, bits, name)
        weight = codes.weight
        layer["bits"] = weight.bits
        tensors[f"{name}.weight.codes"] = simulated.stored_codes(weight.codes, weight.bits)
        tensors |= _encode_pairs(f"{name}.weight", weight.scale, weight.zero_point, weight.short)
        described = _encode_input(f"{name}.input", codes.input, segments, tensors)
        is_short = weight.short
    layer |= {
        "bias": linear.bias is not None,
        "input": described,
        "transform": structure.describe_transform(linear.transform),
        "rank": 0 if linear.down is None else len(linear.down),
    }
    if is_short:
        layer["short"] = True
    if linear.sink_shift is not None:
        layer["sinks"] = linear.sink_shift.sinks
    for part, value in _parts_beside(name, linear).items():
        if value is not None:
            tensors[f"{name}.{part}"] = value
    return layer


def _parts_beside(name: str, linear: QuantLinear) -> dict[str, Tensor | None]:
    """What a layer has beside its weight, by the end of its name."""
    parts = {"bias": linear.bias}
    shift = linear.sink_shift
    if shift is not None:
        parts["sink.mean"] = shift.mean.clone()  # linears that read one site share it
        parts["sink.bias"] = shift.bias
    if linear.transform is not None:
        parts["transform.scale"] = linear.transform.scale
        parts["transform.shift"] = linear.transform.shift
    if linear.down is not None:
        parts["down"] = _as_bfloat16(f"{name}.down", linear.down)
        parts["up"] = _as_bfloat16(f"{name}.up", linear.up)
    return parts


def _encode_pairs(name: str, scale: Tensor, zero_point: Tensor, short: bool) -> dict[str, Tensor]:
    """Scales and zero points as they are stored; readers may share theirs, files may not."""
    if short:
        return {f"{name}.scale": scale.bfloat16(), f"{name}.zero": zero_point.to(torch.int16)}
    return {f"{name}.scale": scale.clone(), f"{name}.zero": zero_point}


def _encode_product(
    name: str, product: QuantMatMul, segments: list, tensors: dict[str, Tensor]
) -> Plain:
    plain: Plain = {"rotation": structure.describe_rotation(product.rotation)}
    for operand in ("a", "b"):
        quantizer = getattr(product, operand)
        full = f"{name}.{operand}"
        if isinstance(quantizer, Passthrough):
            plain[operand] = None
        elif simulated.is_simulated(quantizer):
            plain[operand] = simulated.describe_quantizer(full, quantizer, segments, tensors)
        elif isinstance(quantizer, NumeratorQuantizer | TableQuantizer):
            plain[operand] = _encode_operand(full, quantizer, segments, tensors)
        else:
            plain[operand] = _encode_input(full, input_codes(quantizer, full), segments, tensors)
    return plain


def _encode_operand(
    name: str, quantizer: nn.Module, segments: list, tensors: dict[str, Tensor]
) -> Plain:
    """A table of parameters by head, or numerators."""
    if isinstance(quantizer, TableQuantizer):
        codes = operand_codes(quantizer, name)
        tensors |= _encode_pairs(name, codes.scale, codes.zero_point, short=True)
    if quantizer.key_weights is not None:
        tensors[f"{name}.key_weights"] = quantizer.key_weights.clone()
    return structure.describe_operand(quantizer, segments)


def _encode_input(
    name: str, codes: InputCodes | DynamicCodes, segments: list, tensors: dict[str, Tensor]
) -> Plain:
    if isinstance(codes, InputCodes):
        tensors |= _encode_pairs(name, codes.scale, codes.zero_point, codes.short)
    return structure.describe_input(codes, segments)


def _as_bfloat16(name: str, factor: Tensor) -> Tensor:
    rounded = factor.bfloat16()
    if not torch.equal(rounded.to(factor.dtype), factor):
        raise ConfigError(
            f"{name}: the low-rank branch is not in 16 bits, "
            "allowed is one that was rounded to bfloat16"
        )
    return rounded


def unquantized_tensors(model: nn.Module, taken: Iterable[str]) -> dict[str, Tensor]:
    """Parameters and all buffers by name, without those of modules `taken` and of rotations."""
    skipped = [f"{name}." for name in taken]
    for name, module in model.named_modules():
        if isinstance(module, HadamardRotation | AcrossHeads):
            skipped.append(f"{name}.")
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: value for name, value in tensors if not name.startswith(tuple(skipped))}


# --- onto a model


@torch.no_grad()
def restore_model(
    model: nn.Module, export: Export, device: torch.device | None = None
) -> dict[str, LinearCodes]:
    """Put an export into a fresh model of the same name, all but its layers in integers, whose
    codes are returned.

    The model has the full-precision linears of these still; it is not to be used when an error is
    raised.

    Args:
        device: of all that is put in, the model's if left out; a model without memory (on the
            device `meta`) needs it.

    Raises:
        ExportError: the export is of another model: names, shapes and dtypes are compared before
            anything is used.
    """
    plain = export.plain
    device = device or next(model.parameters()).device
    modules = dict(model.named_modules())
    for name, layer in plain["layers"].items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear) or list(linear.weight.shape) != layer["shape"]:
            own = (
                f"one of {tuple(linear.weight.shape)}" if isinstance(linear, nn.Linear) else "none"
            )
            raise ExportError(
                f"export: it has a layer {name} of {tuple(layer['shape'])}, the model has {own}"
            )
    for name in (*plain["products"], *plain["modules"]):
        if name not in modules:
            raise ExportError(f"export: it has a module {name}, the model has none")
    structure.make_modules(model, plain["modules"], device)
    _compare(expected_tensors(model, plain, export.tensors), export.tensors)
    tensors = {name: value.to(device) for name, value in export.tensors.items()}
    for name in plain["products"]:
        swap_module(model, name, _decode_product(name, plain, tensors, device))
    integer_layers = []
    for name, layer in plain["layers"].items():
        if "weight" in layer:
            linear = model.get_submodule(name)
            swap_module(model, name, _decode_simulated(name, linear, plain, tensors))
        else:
            integer_layers.append(name)
    for name in export.rest:
        replace_tensor(
            model,
            name,
            tensors[name].float() if tensors[name].is_floating_point() else tensors[name],
        )
    return {name: _decode_layer(name, plain, tensors) for name in integer_layers}


def expected_tensors(model: nn.Module, plain: Plain, given: Iterable[str] = ()) -> dict[str, Kind]:
    """The tensors of an export with this description onto this model, whose `modules` are in place.

    A bias that the model lacks may be there, where a shift was folded in: it is expected if it is
    `given`.
    """
    found: dict[str, Kind] = {}
    for name, layer in plain["layers"].items():
        found |= _layer_tensors(name, layer, plain)
    for name, product in plain["products"].items():
        for operand in ("a", "b"):
            found |= _input_tensors(f"{name}.{operand}", product[operand], plain["segments"])
    floating = REST[plain["rest"]]
    for name, value in unquantized_tensors(model, (*plain["layers"], *plain["products"])).items():
        found[name] = floating if value.is_floating_point() else value.dtype, tuple(value.shape)
    modules = dict(model.named_modules())
    for name in given:
        owner = modules.get(name.removesuffix(".bias"))
        if name not in found and name.endswith(".bias") and getattr(owner, "bias", 0) is None:
            found[name] = floating, (len(owner.weight),)
    return found


def _layer_tensors(name: str, layer: Plain, plain: Plain) -> dict[str, Kind]:
    rows, channels = layer["shape"]
    rank = layer["rank"]
    transform = layer["transform"] or {}
    if "weight" in layer:
        found = simulated.weight_tensors(layer, REST[plain["rest"]])
    else:
        found = _integer_weight_tensors(layer)
    if layer.get("sinks"):
        found["sink.mean"] = torch.float32, (channels,)
        found["sink.bias"] = torch.float32, (rows,)
    if layer["bias"]:
        found["bias"] = torch.float32, (rows,)
    if rank:
        found |= {"down": (torch.bfloat16, (rank, channels)), "up": (torch.bfloat16, (rows, rank))}
    for part in ("scale", "shift"):
        if transform.get(part):
            found[f"transform.{part}"] = torch.float32, (channels,)
    return {f"{name}.{part}": kind for part, kind in found.items()} | _input_tensors(
        f"{name}.input", layer["input"], plain["segments"]
    )


def _integer_weight_tensors(layer: Plain) -> dict[str, Kind]:
    rows, channels = layer["shape"]
    bits = layer["bits"]
    packed = (torch.uint8, (packed_size(rows * channels, bits),))
    floating, whole = _pair_types(layer)
    return {
        "weight.codes": (torch.int8, (rows, channels)) if bits == 8 else packed,
        "weight.scale": (floating, (rows,)),
        "weight.zero": (whole, (rows,)),
    }


def _input_tensors(name: str, plain: Plain | None, segments: list) -> dict[str, Kind]:
    if plain is None or plain["kind"] == "dynamic":
        return {}
    if plain["kind"] in ("table", "numerators"):
        return _operand_tensors(name, plain, segments)
    if plain["kind"] == "simulated":
        kinds = simulated.quantizer_tensors(plain)
        return {f"{name}.{part}": kind for part, kind in kinds.items()}
    shape = (len(segments[plain["segments"]]),)
    floating, whole = _pair_types(plain)
    return {f"{name}.scale": (floating, shape), f"{name}.zero": (whole, shape)}


def _operand_tensors(name: str, plain: Plain, segments: list) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    if plain["kind"] == "table":
        shape = (plain["heads"], len(segments[plain["segments"]]))
        kinds[f"{name}.scale"] = torch.bfloat16, shape
        kinds[f"{name}.zero"] = torch.int16, shape
    if plain["sinks"]:
        kinds[f"{name}.key_weights"] = torch.float32, (plain["heads"],)
    return kinds


def _pair_types(plain: Plain) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of scales and zero points."""
    if plain.get("short"):
        return torch.bfloat16, torch.int16
    return torch.float32, torch.int32


def _compare(expected: Mapping[str, Kind], tensors: Mapping[str, Tensor]) -> None:
    kinds = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    faults = {
        "is missing": [name for name in expected if name not in kinds],
        "is not expected": [name for name in kinds if name not in expected],
    }
    for what, names in faults.items():
        if names:
            raise ExportError(
                f"export: {names[0]} {what} ({len(names)} tensors in all), is it of another model?"
            )
    for name, kind in expected.items():
        if kinds[name] != kind:
            raise ExportError(
                f"export: {name} is {kinds[name][0]} {kinds[name][1]}, allowed is "
                f"{kind[0]} {kind[1]}"
            )


def replace_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a buffer or parameter, or make one of None."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(
        owner, leaf, value if leaf in owner._buffers else nn.Parameter(value, requires_grad=False)
    )


def _decode_layer(name: str, plain: Plain, tensors: Mapping[str, Tensor]) -> LinearCodes:
    layer = plain["layers"][name]
    shape = tuple(layer["shape"])
    bits = layer["bits"]
    codes = tensors[f"{name}.weight.codes"]
    scale, zero_point = _decode_pairs(f"{name}.weight", tensors)
    return LinearCodes(
        WeightCodes(
            codes if bits == 8 else unpack_codes(codes, shape, bits),
            scale,
            zero_point,
            bits,
            layer.get("short", False),
        ),
        _decode_input(f"{name}.input", layer["input"], plain, tensors),
        **_decode_beside(name, layer, tensors, like=scale),
    )


def _decode_simulated(
    name: str, linear: nn.Linear, plain: Plain, tensors: Mapping[str, Tensor]
) -> QuantLinear:
    """A layer without kernel, as simulation has it."""
    layer = plain["layers"][name]
    restored = QuantLinear(linear)
    simulated.restore_weight(restored, name, layer, tensors)
    full = f"{name}.input"
    restored.input = simulated.make_quantizer(full, layer["input"], plain["segments"], tensors)
    for part, value in _decode_beside(name, layer, tensors, like=restored.weight).items():
        setattr(restored, part, value)
    return restored


def _decode_beside(
    name: str, layer: Plain, tensors: Mapping[str, Tensor], like: Tensor
) -> dict[str, object]:
    """What a layer has beside its weight, by attribute of `LinearCodes` and `QuantLinear`."""
    shift = None
    if layer.get("sinks"):
        mean = tensors[f"{name}.sink.mean"]
        shift = SinkShift(mean, tensors[f"{name}.sink.bias"], layer["sinks"])
    transform = structure.make_transform(
        layer["transform"],
        like,
        layer["shape"][1],
        tensors.get(f"{name}.transform.scale"),
        tensors.get(f"{name}.transform.shift"),
    )
    parts = {"bias": tensors.get(f"{name}.bias"), "transform": transform, "sink_shift": shift}
    for branch in ("down", "up"):
        value = tensors.get(f"{name}.{branch}")
        parts[branch] = None if value is None else value.float()
    return parts


def _decode_product(
    name: str, plain: Plain, tensors: Mapping[str, Tensor], device: torch.device
) -> QuantMatMul:
    given = plain["products"][name]
    product = QuantMatMul(structure.make_rotation(given["rotation"], device))
    for operand in ("a", "b"):
        if given[operand] is not None:
            full = f"{name}.{operand}"
            setattr(product, operand, _decode_operand(full, given[operand], plain, tensors))
    return product


def _decode_operand(
    name: str, given: Plain, plain: Plain, tensors: Mapping[str, Tensor]
) -> nn.Module:
    if given["kind"] == "simulated":
        return simulated.make_quantizer(name, given, plain["segments"], tensors)
    if given["kind"] not in ("table", "numerators"):
        return structure.make_quantizer(_decode_input(name, given, plain, tensors))
    scale, zero_point = _decode_pairs(name, tensors)
    weights = tensors.get(f"{name}.key_weights")
    return structure.make_operand(given, plain["segments"], scale, zero_point, weights)


def _decode_pairs(
    name: str, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Scales float32 and zero points int32, or None of what has none."""
    scale = tensors.get(f"{name}.scale")
    if scale is None:
        return None, None
    return scale.float(), tensors[f"{name}.zero"].int()


def _decode_input(
    name: str, given: Plain, plain: Plain, tensors: Mapping[str, Tensor]
) -> InputCodes | DynamicCodes:
    return structure.make_input(given, plain["segments"], *_decode_pairs(name, tensors))
