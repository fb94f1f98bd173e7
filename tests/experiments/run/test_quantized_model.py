"""Quantization of a whole model: folding changes nothing, a decoding step equals the full sequence,
once is enough."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import models
from models.layers import KVCache
from models.rar.adapter import RARAdapter
from models.rar.transformer import RAR
from models.registry import Generator
from ptq import stwq
from ptq.activations import calibrate_activations
from ptq.calibration import Pool, select_rows
from ptq.modules import QuantLinear, QuantMatMul
from ptq.numbers.grouping import broadcast_params
from ptq.numbers.numerics import QParams, fake_quantize
from ptq.pipeline import apply_transforms, quantize, round_weights, solve_transforms
from ptq.recipe import Recipe
from ptq.sites import Scope
from ptq.stwq import TokenStaticQuantizer
from ptq.types import Adapter, CalibrationSet, QuantSpec, Rows
from tests.reference import fill, made_up_ints

CHAINS = [("smoothquant",), ("shift",), ("gps",), ("smoothquant", "shift", "gps")]


def recipe(chain: tuple[str, ...] = CHAINS[-1], stwq: bool = True, bits: int = 6) -> Recipe:
    return Recipe(
        QuantSpec(bits, granularity="out_channel"),
        QuantSpec(bits),
        chain,
        stwq=stwq,
        exclude_sinks=stwq,
    )


def both_branches(adapter: Adapter, tokens: Tensor, labels: Tensor) -> CalibrationSet:
    return select_rows(
        "random", adapter, Pool(*adapter.rows(tokens, labels), labels), 2 * len(labels), 0
    )


def silent(items: object, what: str) -> object:
    return items


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    """Tokens and labels of images that the twin generated."""
    generator = models.load("rar_twin")
    labels = torch.tensor([0, 3, 5, 8])
    return generator.sample(
        labels, 0, torch.arange(4), dict(generator.preset.samplers["official"])
    ), labels


def quantized(
    drawn: tuple[Tensor, Tensor], how: Recipe, double: bool = False
) -> tuple[Generator, CalibrationSet]:
    generator = models.load("rar_twin")
    if double:
        generator.transformer.double()
    chosen = both_branches(generator.adapter, *drawn)
    quantize(generator.adapter, chosen, how, batch=4)
    return generator, chosen


@torch.no_grad()
def decode(model: RAR, rows: Rows) -> Tensor:
    """Logits (B, L, V) of a cached decoder that is fed the given tokens one by one."""
    ids = rows["ids"]
    condition = rows["condition"]
    cache = [KVCache(model.image_seq_len + 1) for _ in model.blocks]
    steps = [model(ids, condition, positions=torch.arange(2), cache=cache)]
    for position in range(2, model.image_seq_len + 1):
        steps.append(model(ids, condition, positions=torch.tensor([position]), cache=cache))
    return torch.cat(steps, dim=1)


def folding_error(adapter: Adapter, chosen: CalibrationSet, chain: tuple[str, ...]) -> float:
    """Largest change of the logits by transforms without quantizers, relative to their absolute
    maximum."""
    before = adapter.forward(chosen.rows)
    weight = adapter.model.get_submodule("blocks.1.mlp.fc1").weight.clone()
    bias = adapter.model.get_submodule("blocks.1.mlp.fc1").bias.clone()
    how = recipe(chain)
    apply_transforms(
        adapter, how, solve_transforms(adapter, chosen.batches(4), len(chosen), how, silent)
    )
    linear = adapter.model.get_submodule("blocks.1.mlp.fc1")
    assert not torch.allclose(linear.weight, weight) or not torch.allclose(linear.bias, bias)
    return float((adapter.forward(chosen.rows) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("chain", CHAINS, ids="+".join)
@torch.no_grad()
def test_transforms_without_quantizers_leave_the_twin_unchanged_in_fp32(
    drawn: tuple[Tensor, Tensor], chain: tuple[str, ...]
) -> None:
    adapter = models.load("rar_twin").adapter
    assert folding_error(adapter, both_branches(adapter, *drawn), chain) < 1e-4


@pytest.mark.parametrize("chain", CHAINS, ids="+".join)
@torch.no_grad()
def test_transforms_without_quantizers_leave_a_model_unchanged_in_fp64(
    chain: tuple[str, ...],
) -> None:
    adapter = RARAdapter(fill(RAR(48, 2, 4, 192, 16, 40, 10)).double())
    chosen = both_branches(
        adapter, made_up_ints("tokens", (6, 16), 40), made_up_ints("labels", (6,), 10)
    )
    assert folding_error(adapter, chosen, chain) < 1e-12


@torch.no_grad()
def test_every_decoding_step_uses_the_parameters_of_the_full_sequence(
    drawn: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, chosen = quantized(drawn, recipe(), double=True)
    # position, scale, zero point by quantizer
    used: dict[int, list[tuple[int, float, float]]] = defaultdict(list)
    calls: list[tuple[int, list[int]]] = []
    original = TokenStaticQuantizer.forward

    def forward(self: TokenStaticQuantizer, x: Tensor, positions: Tensor) -> Tensor:
        calls.append((id(self), positions.tolist()))
        return original(self, x, positions)

    def recorded(x: Tensor, params: QParams, spec: QuantSpec) -> Tensor:
        quantizer, positions = calls[-1]
        used[quantizer] += zip(
            positions, params.scale.flatten().tolist(), params.zero_point.flatten().tolist()
        )
        assert params.scale.numel() == len(positions)
        return fake_quantize(x, params, spec.levels)

    monkeypatch.setattr(TokenStaticQuantizer, "forward", forward)
    monkeypatch.setattr(stwq, "simulate_format", recorded)
    rows = {k: v[:2] for k, v in chosen.rows.items()}
    full = generator.adapter.forward(rows)
    at_once = dict(used)
    used.clear()
    stepwise = decode(generator.transformer, rows)
    sites = [s for s in generator.adapter.sites if len(s.segments) > 1]
    assert len(at_once) == len(sites)
    assert used == at_once
    # positions do differ
    assert all(len({scale for _, scale, _ in entries}) > 1 for entries in used.values())
    # in fp64 sums of another order differ by 1e-15, too little for a rounding flip on these rows
    assert float((stepwise - full).abs().max() / full.abs().max()) < 1e-10


@torch.no_grad()
def test_without_stwq_the_decoder_equals_the_full_sequence_too(
    drawn: tuple[Tensor, Tensor],
) -> None:
    generator, chosen = quantized(drawn, recipe(("smoothquant",), stwq=False), double=True)
    rows = {k: v[:2] for k, v in chosen.rows.items()}
    full = generator.adapter.forward(rows)
    assert (
        float((decode(generator.transformer, rows) - full).abs().max() / full.abs().max()) < 1e-10
    )


class EveryStepMatMul(QuantMatMul):
    """Quantizes the whole second operand, cache and all, in every call."""

    def prepare(self, b: Tensor, positions: Tensor | None = None) -> Tensor:
        return b

    def forward(self, a: Tensor, b: Tensor, positions: Tensor | None = None) -> Tensor:
        # the layout decides the order of sums
        rounded = torch.empty_strided(b.shape, b.stride(), dtype=b.dtype)
        return self.a(a, positions) @ rounded.copy_(self.b(b, positions))


class EveryStepLinear(QuantLinear):
    """Rounds its weight in every call."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        spec = QuantSpec(6, granularity="out_channel")
        rounded = fake_quantize(self.raw, broadcast_params(self.weight_params, spec), spec.levels)
        return F.linear(self.input(x, positions), rounded, self.bias)


@torch.no_grad()
def test_quantizing_weights_keys_values_once_equals_doing_it_every_step(
    drawn: tuple[Tensor, Tensor],
) -> None:
    generator = models.load("rar_twin")
    adapter = generator.adapter
    model = generator.transformer
    how = recipe()
    chosen = both_branches(adapter, *drawn)
    batches = chosen.batches(4)
    solution = solve_transforms(adapter, batches, len(chosen), how, silent)
    apply_transforms(adapter, how, solution)
    raw = {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    round_weights(adapter, how)
    calibrate_activations(adapter, batches, len(chosen), how, silent, solution.input_params)
    rows = {k: v[:2] for k, v in chosen.rows.items()}
    once = decode(model, rows)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantMatMul):
            module.__class__ = EveryStepMatMul
        if isinstance(module, QuantLinear):
            module.__class__ = EveryStepLinear
            module.raw, module.weight = raw[name], torch.full_like(module.weight, torch.nan)
    assert torch.equal(decode(model, rows), once)


@torch.no_grad()
def test_more_bits_come_closer_to_full_precision(drawn: tuple[Tensor, Tensor]) -> None:
    reference = models.load("rar_twin")
    errors = []
    for bits in (8, 6, 4):
        generator, chosen = quantized(drawn, recipe(bits=bits))
        full = reference.adapter.forward(chosen.rows)
        errors.append(
            float(
                (generator.adapter.forward(chosen.rows) - full).square().mean().sqrt() / full.std()
            )
        )
    assert errors[0] < 0.1
    assert errors[0] < errors[1] / 2 < errors[2] / 4


@torch.no_grad()
def test_the_same_calibration_set_gives_the_same_parameters(drawn: tuple[Tensor, Tensor]) -> None:
    reports = []
    for _ in range(2):
        adapter = models.load("rar_twin").adapter
        reports.append(quantize(adapter, both_branches(adapter, *drawn), recipe(), batch=4).tensors)
    assert reports[0].keys() == reports[1].keys()
    assert all(torch.equal(v, reports[1][k]) for k, v in reports[0].items())


@torch.no_grad()
def test_full_precision_modules_outside_the_scope_stay(drawn: tuple[Tensor, Tensor]) -> None:
    adapter = models.load("rar_twin").adapter
    linear = adapter.model.get_submodule("lm_head")
    how = Recipe(
        QuantSpec(6, granularity="out_channel"), QuantSpec(6), scope=Scope(("qkv",), False)
    )
    quantize(adapter, both_branches(adapter, *drawn), how, batch=8)
    kinds = {n: type(m) for n, m in adapter.model.named_modules()}
    assert adapter.model.get_submodule("lm_head") is linear
    assert {n for n, kind in kinds.items() if kind is QuantLinear} == {
        f"blocks.{i}.attn.qkv" for i in range(5)
    }
    assert QuantMatMul not in kinds.values()
