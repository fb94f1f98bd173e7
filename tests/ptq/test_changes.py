"""Weights only, the KV cache alone, bits by kind of site and by block: what is named changes, and
everything else stays bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experiments.config.compose import configure
from experiments.config.recipe import build_recipe
from ptq import recipe
from ptq.modules import QuantLinear, QuantMatMul
from ptq.numbers.quantizers import Passthrough, fake_quantize_weight
from ptq.pipeline import quantize
from ptq.recipe import Change, Recipe
from ptq.rounding import gptq_round, gptq_round_groups, inverse_factor
from ptq.spec import ATTENTION_OPERANDS, ConfigError, QuantSpec
from ptq.types import Adapter
from tests.families import FAMILIES, calibration, decoded, relative, tiny

KINDS = ("qkv", "proj", "fc1", "fc2", "head", "adaln")


def quantized(how: Recipe, family: str = "rar") -> Adapter:
    adapter = tiny(family)
    quantize(adapter, calibration(family, adapter, 2), how, batch=4)
    return adapter


def layers_of(adapter: Adapter) -> dict[str, QuantLinear]:
    modules = adapter.model.named_modules()
    return {name: module for name, module in modules if isinstance(module, QuantLinear)}


def assert_alike(one: Adapter, other: Adapter) -> None:
    """Both models are the same in all tensors and outputs."""
    other_tensors = other.model.state_dict()
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other_tensors[name]), name
    rows = calibration("rar", one, 2).rows
    assert torch.equal(one.forward(rows), other.forward(rows))


def by_kind(*overrides: str) -> Recipe:
    return build_recipe(configure(["method=ptq4arvg", "quant=w4a4", *overrides]))


# --- by kind and by block


def test_all_kinds_by_name_are_the_plain_setting() -> None:
    weights = [f"quant.by_kind.{kind}.weights.bits=6" for kind in KINDS]
    inputs = [f"quant.by_kind.{kind}.activations.bits=6" for kind in KINDS]
    operands = [f"quant.by_kind.{name}.activations.bits=6" for name in ATTENTION_OPERANDS]
    named = by_kind(*weights, *inputs, *operands)
    assert named.weights.bits == 4
    plain = build_recipe(configure(["method=ptq4arvg", "quant=w6a6"]))
    assert_alike(quantized(named), quantized(plain))


def test_what_is_not_named_stays() -> None:
    plain = recipe.named("rtn", "w4a4", "blocks")
    changed = replace(plain, changes=(Change("fc2", "weights", (("bits", 8),)),))
    before = layers_of(quantized(plain))
    for name, layer in layers_of(quantized(changed)).items():
        assert torch.equal(layer.weight, before[name].weight) == (not name.endswith("fc2"))
        assert layer.weight_spec.bits == (8 if name.endswith("fc2") else 4)


def test_a_block_goes_before_its_kind() -> None:
    how = by_kind("quant.by_kind.fc1.weights.bits=8", "quant.by_layer.1.fc1.weights.bits=3")
    layers = layers_of(quantized(how))
    assert layers["blocks.0.mlp.fc1"].weight_spec.bits == 8
    assert layers["blocks.1.mlp.fc1"].weight_spec.bits == 3
    assert layers["blocks.1.mlp.fc2"].weight_spec.bits == 4


def test_layers_of_sixteen_bits_are_left_as_they_are() -> None:
    raw = tiny("rar").model.get_submodule("blocks.0.mlp.fc2").weight
    changes = (
        Change("fc2", "weights", (("bits", 16),)),
        Change("fc2", "activations", (("bits", 16),)),
    )
    layers = layers_of(quantized(replace(recipe.named("rtn", "w4a4", "blocks"), changes=changes)))
    layer = layers["blocks.0.mlp.fc2"]
    assert torch.equal(layer.weight, raw)
    assert layer.weight_params is None
    assert isinstance(layer.input, Passthrough)


REFUSED = {
    "quant.by_kind.fc9.weights.bits=8": "quant.by_kind: 'fc9' is not one of qkv, proj, fc1, fc2,",
    "quant.by_kind.fc2.weight.bits=8": "quant.by_kind.fc2: 'weight' is not one of weights, act",
    "quant.by_kind.fc2.weights.bit=8": "quant.by_kind.fc2.weights: 'bit' is not one of bits, sym",
    "quant.by_kind.fc2.weights.bits=9": "quant.by_kind.fc2.weights.bits: 9 is not an integer from",
    "quant.by_kind.k.weights.bits=8": "quant.by_kind.k: 'weights' is not one of activations",
    "quant.by_kind.fc2=8": "quant.by_kind.fc2: 8 is not a group of fields",
    "quant.by_layer.first.fc2.weights.bits=8": "quant.by_layer.first: no such block, allowed are",
    "quant.by_layer.9.fc2.weights.bits=8": "quant.by_layer.9: the model has no such block, allowed",
    "quant.by_kind.fc2.weights.format=mxfp5": "quant.by_kind.fc2.weights.format: 'mxfp5' is not",
    "quant.by_kind.fc2.weights.granularity=group": "quant.by_kind.fc2.weights.group_size: null do",
    "scope.operands=[k,w]": "scope.operands: 'w' is not one of q, k, p, v",
    "quant.activations.granularity=heads": "quant.activations.granularity: 'heads' is not one of",
    "quant.weights.group_size=many": "quant.weights.group_size: 'many' is not an integer from 1",
}


@pytest.mark.parametrize("given", REFUSED)
def test_misspelt_words_are_refused_with_the_allowed_ones(given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(["method=rtn", given])
    assert str(caught.value).startswith(REFUSED[given])
    assert "\n" not in str(caught.value)


def test_what_changes_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    configure(["method=rtn", "quant.by_kind.fc2.weights.bits=8"])
    assert not caplog.records
    given = "quant.by_kind.adaln.weights.bits=8"
    configure(["method=rtn", "model=par_twin", given])
    configure(["method=rtn", "scope=blocks", "quant.by_kind.k.activations.bits=8"])
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "quant.by_kind.adaln.weights: it changes nothing, no adaln is quantized of this model",
        "quant.by_kind.k.activations: it changes nothing, no k is quantized of this model",
    ]


# --- weights only, and the cache alone


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_only_rounds_no_activation(family: str) -> None:
    how = recipe.named("rtn", "w4a16", "paper")
    adapter = tiny(family)
    plain = {
        name: module.weight.clone()
        for name, module in adapter.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    rows = calibration(family, adapter, 2)
    quantize(adapter, rows, how, batch=4)
    for name, layer in layers_of(adapter).items():
        assert isinstance(layer.input, Passthrough)
        assert torch.equal(layer.weight, fake_quantize_weight(plain[name], how.weights)[0])
    found = adapter.forward(rows.rows)
    # full precision with rounded weights is the same model
    other = tiny(family)
    for name, layer in layers_of(adapter).items():
        other.model.get_submodule(name).weight = torch.nn.Parameter(layer.weight)
    torch.testing.assert_close(found, other.forward(rows.rows))


@pytest.mark.parametrize("bits", ["kv8", "kv4", "kv3", "kv2"])
def test_the_cache_alone_leaves_everything_else(bits: str) -> None:
    raw = tiny("rar")
    adapter = quantized(recipe.named("rtn", bits, "kv"))
    assert not layers_of(adapter)
    for module in adapter.model.modules():
        if isinstance(module, QuantMatMul):
            assert isinstance(module.a, Passthrough)
            assert module.b.spec.bits == int(bits[2])
    tensors = adapter.model.state_dict()
    for name, value in raw.model.state_dict().items():
        assert torch.equal(tensors[name], value)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mar"])
def test_a_cache_that_is_filled_step_by_step_holds_the_same(family: str) -> None:
    adapter = quantized(recipe.named("rtn", "kv4", "kv"), family)
    rows = calibration(family, adapter, 2).rows
    assert relative(decoded(adapter, rows), adapter.forward(rows).detach()) < 1e-12


def test_keys_have_a_scale_per_channel_and_values_one_per_token() -> None:
    adapter = quantized(recipe.named("rtn", "kv4", "kv"))
    attention = adapter.model.blocks[0].attn
    assert attention.qk.b.scale.shape == (4 * 12,)  # heads, channels
    x = torch.randn(2, 4, 5, 12, dtype=torch.float64)
    values = attention.pv.prepare(x)
    # up to 16 values in each token of a head
    assert max(len(row.unique()) for row in values.flatten(0, 2)) <= 16
    assert torch.equal(attention.pv.prepare(x[:, :, 3:4]), values[:, :, 3:4])


# --- GPTQ


def factor_of(columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, columns, generator=generator, dtype=torch.float64)
    x[:, 1:] += 0.5 * x[:, :-1]
    return inverse_factor(x.t() @ x, 0.01)


def weight_of(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def test_gptq_with_one_group_is_gptq_by_row() -> None:
    weight = weight_of(6, 40)
    factor = factor_of(40)
    by_row = QuantSpec(4, granularity="out_channel")
    spec = QuantSpec(4, granularity="group", group_size=64)
    rounded, params = gptq_round_groups(weight, factor, spec, 8)
    own = fake_quantize_weight(weight, by_row)[1]
    assert torch.equal(params.scale, own.scale)
    assert torch.equal(rounded, gptq_round(weight, factor, own, by_row, 8))


@pytest.mark.parametrize("size", [8, 12])
def test_gptq_finds_a_group_when_it_comes_to_it(size: int) -> None:
    """Against the definition: one column after the other, all updates at once."""
    weight = weight_of(6, 40)
    factor = factor_of(40)
    spec = QuantSpec(4, granularity="group", group_size=size)
    by_row = QuantSpec(4, granularity="out_channel")
    left = weight.clone()
    expected = torch.empty_like(weight)
    for column in range(40):
        if column % size == 0:
            params = fake_quantize_weight(left[:, column : column + size], by_row)[1]
        codes = (torch.round(left[:, column] / params.scale) + params.zero_point).clamp(0, 15)
        expected[:, column] = (codes - params.zero_point) * params.scale
        error = (left[:, column] - expected[:, column]) / factor[column, column]
        left[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    for block in (5, 128):
        rounded, _ = gptq_round_groups(weight, factor, spec, block)
        torch.testing.assert_close(rounded, expected)
    correlated = inverse_factor(torch.eye(40, dtype=torch.float64), 0.01)
    nearest, _ = gptq_round_groups(weight, correlated, spec)
    assert torch.equal(nearest, fake_quantize_weight(weight, spec)[0])
