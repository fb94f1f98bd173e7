"""What has no integer kernel comes back from an export as simulation has it, bit for bit, in as
many bytes as its numbers have bits; `mode=int8` refuses it by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ptq import recipe
from ptq.int8.exports.encoding import check_export, check_integer_path, encode_model, restore_model
from ptq.int8.exports.export_files import Export, read_export, save_export
from ptq.int8.modules import to_int8
from ptq.modules import QuantLinear
from ptq.pipeline import quantize
from ptq.recipe import Change, Recipe
from ptq.spec import ConfigError
from ptq.types import Adapter
from tests.families import FAMILIES, calibration, tiny

# by bits: method, bytes of codes over weights, bytes of the scales and zero points of a row of 48
CASES = {
    "w4a4_g64": ("rtn", 1 / 2, 8),
    "w3a16": ("rtn", 3 / 8, 8),
    "w4a16": ("gptq", 1 / 2, 8),
    "mxfp4": ("rtn", 1 / 2, 2),
    "mxfp6": ("rtn_dynamic", 3 / 4, 2),
    "nvfp4": ("rtn", 1 / 2, 3),
    "fp6": ("rtn", 3 / 4, 4),
    "fp8": ("rtn", 1, 4),
}


def quantized(how: Recipe, family: str = "rar") -> Adapter:
    adapter = tiny(family, torch.float32)
    quantize(adapter, calibration(family, adapter, 2), how, batch=4)
    return adapter


def exported(adapter: Adapter, folder: Path) -> Export:
    """What a file of the model's export holds."""
    save_export(encode_model(adapter.model, 8, "float32"), folder / "config.json", {})
    return read_export(folder / "config.json")


def assert_same_model(adapter: Adapter, export: Export, family: str = "rar") -> None:
    """The model of an export has the same weights and outputs."""
    other = tiny(family, torch.float32)
    to_int8(other.model, restore_model(other.model, export))
    for name, layer in adapter.model.named_modules():
        if isinstance(layer, QuantLinear):
            restored = other.model.get_submodule(name)
            assert torch.equal(restored.weight, layer.weight)
            assert restored.weight_spec.bits == layer.weight_spec.bits
    rows = calibration(family, adapter, 2).rows
    assert torch.equal(other.forward(rows), adapter.forward(rows))


@pytest.mark.parametrize("bits", CASES)
def test_codes_are_packed_without_loss(bits: str, tmp_path: Path) -> None:
    method, share, row_bytes = CASES[bits]
    adapter = quantized(recipe.named(method, bits, "paper"))
    export = exported(adapter, tmp_path)
    assert export.plain["version"] == 2
    for name, layer in adapter.model.named_modules():
        if not isinstance(layer, QuantLinear):
            continue
        count = layer.weight.numel()
        assert export.tensors[f"{name}.weight.codes"].nbytes == count * share
        scales = 0
        for part in ("scale", "zero"):
            stored = export.tensors.get(f"{name}.weight.{part}")
            scales += 0 if stored is None else stored.nbytes
        if layer.weight.shape[1] == 48:
            assert scales == row_bytes * len(layer.weight)
    assert_same_model(adapter, export)


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_come_back_in_every_family(family: str, tmp_path: Path) -> None:
    how = recipe.named("ptq4arvg", "w4a4_g64", "blocks")
    groups = replace(how.activations, group_size=20)  # 48 = 20 + 20 + 8
    adapter = quantized(replace(how, activations=groups), family)
    assert_same_model(adapter, exported(adapter, tmp_path), family)


@pytest.mark.parametrize("granularity", ["head", "head_segment", "channel", "group_dynamic"])
def test_operands_of_attention_come_back(granularity: str, tmp_path: Path) -> None:
    how = recipe.named("rtn", "w8a8", "paper")
    settings = [("granularity", granularity)]
    if granularity == "group_dynamic":
        settings.append(("group_size", 8))
    changes = [Change(kind, "activations", tuple(settings)) for kind in ("q", "k", "v")]
    how = replace(how, changes=tuple(changes))
    adapter = quantized(replace(how, scope=replace(how.scope, kinds=())), "var")
    export = exported(adapter, tmp_path)
    assert_same_model(adapter, export, "var")
    with pytest.raises(ConfigError, match=f"^blocks.0.attn.qk.a: granularity {granularity} has no"):
        check_integer_path(tiny("var"), how)


def test_layers_with_and_without_a_kernel_are_told_apart(tmp_path: Path) -> None:
    how = recipe.named("rtn", "w8a8", "blocks")
    changes = (
        Change("fc2", "weights", (("granularity", "group"), ("group_size", 64))),
        Change("fc1", "weights", (("bits", 4),)),
        Change("proj", "weights", (("bits", 16),), block=0),
    )
    adapter = quantized(replace(how, changes=changes))
    export = exported(adapter, tmp_path)
    layers = export.plain["layers"]
    simulated = [name for name, layer in layers.items() if "weight" in layer]
    assert simulated == ["blocks.0.attn.proj", "blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]
    assert {name: layer["bits"] for name, layer in layers.items() if "fc1" in name} == {
        "blocks.0.mlp.fc1": 4,
        "blocks.1.mlp.fc1": 4,
    }
    other = tiny("rar", torch.float32)
    codes = restore_model(other.model, export)
    assert set(codes) == set(layers) - set(simulated)
    for name, layer in adapter.model.named_modules():
        if name in codes:
            assert torch.equal(codes[name].weight.dequantize(), layer.weight)
        elif name in simulated:
            assert torch.equal(other.model.get_submodule(name).weight, layer.weight)


REFUSED = {
    "w4a4_g64": "granularity group has no integer path, allowed are out_channel and tensor",
    "mxfp4": "format mxfp4 has no integer path, allowed is int",
    "w8a16": "bits 16 has no integer path, allowed are 2 to 8",
}


@pytest.mark.parametrize("bits", REFUSED)
def test_what_has_no_kernel_is_refused_by_name(bits: str) -> None:
    how = recipe.named("rtn", bits, "blocks")
    adapter = tiny("rar")
    with pytest.raises(ConfigError) as caught:
        check_integer_path(adapter, how)
    assert str(caught.value) == f"blocks.0.attn.qkv: {REFUSED[bits]}"
    check_export(adapter, how)


def test_the_cache_alone_has_no_layer_to_run_in_integers() -> None:
    with pytest.raises(ConfigError, match="^scope.kinds: no linear layer is quantized that could"):
        check_integer_path(tiny("rar"), recipe.named("rtn", "kv4", "kv"))
