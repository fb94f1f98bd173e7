"""A judge finds no fault with what is exact, the error that is there with what is not, and leaves
the model alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.config.compose import configure
from experiments.config.recipe import build_recipe
from models.layers import attend
from ptq.methods import probe
from ptq.methods.probe import Judge, some_rows
from ptq.numbers.quantizers import (
    Passthrough,
    StaticQuantizer,
    choose_qparams,
    fake_quantize_weight,
)
from ptq.pipeline import quantize, stacked_weight
from ptq.types import Adapter, ConfigError, InputTransform, LowRank, Probe, QuantSpec, Rows, Site
from tests.families import FAMILIES, calibration, tiny

SPEC = QuantSpec(4)
WEIGHTS = QuantSpec(4, granularity="out_channel")


def judge_of(
    family: str,
    adapter: Adapter,
    site: Site,
    chain: InputTransform | None = None,
    rows: int = 5,
    exclude_sinks: bool = False,
) -> Judge:
    weight = stacked_weight(adapter.model, site)
    chain = chain or InputTransform.identity(weight.shape[1], weight)
    return Judge(adapter, site, chain, calibration(family, adapter).batches(3), exclude_sinks, rows)


def random_diagonal(seed: int, channels: int) -> InputTransform:
    scale, shift = torch.randn(
        2, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return InputTransform((0.5 * scale).exp(), shift)


def random_step(seed: int, outputs: int, channels: int) -> InputTransform:
    """Scale, shift, rotation and a branch."""
    normal = partial(
        torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    rotation = torch.linalg.qr(normal(channels, channels)).Q
    diagonal = random_diagonal(seed, channels)
    return InputTransform(
        diagonal.scale,
        diagonal.shift,
        lambda x: x @ rotation,
        LowRank(normal(3, channels), normal(outputs, 3)),
    )


def site_of(adapter: Adapter, kind: str) -> Site:
    return next(site for site in adapter.sites if site.kind == kind)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_exact_candidate_has_no_loss_at_any_site_and_the_model_stays(family: str) -> None:
    adapter = tiny(family)
    modules = dict(adapter.model.named_modules())
    rows = calibration(family, adapter).rows
    before = adapter.forward(rows)
    for seed, site in enumerate(adapter.sites):
        weight = stacked_weight(adapter.model, site)
        chain = random_diagonal(100 + seed, weight.shape[1])
        judge = judge_of(family, adapter, site, chain)
        step = random_step(seed, *weight.shape)
        residual = step.on_weight(chain.on_weight(weight))
        size = sum(c.expected.square().mean() for c in judge.calls)
        assert size > 1e-4
        assert float(judge(step, residual, Passthrough()) / size) < 1e-20
        assert float(judge(step, residual * 1.01, Passthrough()) / size) > 1e-8
    assert dict(adapter.model.named_modules()) == modules
    assert not any(m._forward_pre_hooks for m in modules.values())
    assert torch.equal(adapter.forward(rows), before)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_inputs_are_those_of_the_first_rows_after_the_chain(family: str) -> None:
    adapter = tiny(family)
    site = site_of(adapter, "qkv")
    chain = random_diagonal(0, 48)
    seen = []
    handle = adapter.model.get_submodule(site.name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    for part in calibration(family, adapter).batches(3)[:1]:
        adapter.forward(part)
    handle.remove()
    judge = judge_of(family, adapter, site, chain, rows=3)
    assert sum(len(x) for x in judge.inputs) == 3
    for x, expected in zip(judge.inputs, seen, strict=True):
        torch.testing.assert_close(x, chain(expected))


def candidate(judge: Judge, weight: Tensor) -> tuple[InputTransform, Tensor, StaticQuantizer]:
    """A rounded one."""
    step = random_diagonal(1, weight.shape[1])
    x = torch.cat([step(part).flatten(0, -2) for part in judge.inputs])
    return (
        step,
        fake_quantize_weight(step.on_weight(weight), WEIGHTS)[0],
        StaticQuantizer(SPEC, choose_qparams(x, SPEC)),
    )


@torch.no_grad()
def test_the_loss_of_a_linear_is_the_mean_squared_error_of_its_output() -> None:
    adapter = tiny("rar")
    site = site_of(adapter, "fc1")
    linear = adapter.model.get_submodule(site.name)
    judge = judge_of("rar", adapter, site)
    step, rounded, quantizer = candidate(judge, linear.weight)
    x = torch.cat(judge.inputs)  # (5, T, C)
    output = quantizer(step(x)) @ rounded.t() + linear.bias + linear.weight @ step.shift
    expected = (output - linear(x)).square().sum(-1).mean()
    torch.testing.assert_close(judge(step, rounded, quantizer), expected)
    assert float(expected) > 0


@torch.no_grad()
def test_a_gated_mlp_is_judged_at_the_product() -> None:
    adapter = tiny("par")
    site = site_of(adapter, "fc1")
    mlp = adapter.model.layers[0].feed_forward
    judge = judge_of("par", adapter, site)
    weight = torch.cat((mlp.w1.weight, mlp.w3.weight))
    step, rounded, quantizer = candidate(judge, weight)
    x = torch.cat(judge.inputs)
    gate, up = (quantizer(step(x)) @ rounded.t() + weight @ step.shift).chunk(2, dim=-1)
    expected = (F.silu(gate) * up - F.silu(mlp.w1(x)) * mlp.w3(x)).square().sum(-1).mean()
    torch.testing.assert_close(judge(step, rounded, quantizer), expected)


@torch.no_grad()
def test_attention_is_judged_at_the_output_before_the_projection() -> None:
    adapter = tiny("mar")
    site = site_of(adapter, "qkv")
    attention = adapter.model.encoder_blocks[0].attn
    judge = judge_of("mar", adapter, site)
    step, rounded, quantizer = candidate(judge, attention.qkv.weight)

    def output(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, 4, 12)).permute(2, 0, 3, 1, 4)
        return attend(q, k, v, attention.qk, attention.pv, 12**-0.5)

    errors = [
        output(
            quantizer(step(x)) @ rounded.t()
            + attention.qkv.bias
            + attention.qkv.weight @ step.shift
        )
        - output(attention.qkv(x))
        for x in judge.inputs
    ]
    # rows with different numbers of visible tokens go through the encoder apart
    assert len(errors) > 1
    expected = torch.cat([e.flatten(0, 1) for e in errors]).square().sum(-1).mean()
    torch.testing.assert_close(judge(step, rounded, quantizer), expected)


class Zero(nn.Module):
    """Loses everything."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


@torch.no_grad()
def test_sinks_that_are_left_out_are_not_rounded() -> None:
    adapter = tiny("rar")
    site = site_of(adapter, "fc1")
    linear = adapter.model.get_submodule(site.name)
    identity = InputTransform(torch.ones(48), torch.zeros(48))
    whole = judge_of("rar", adapter, site, exclude_sinks=False)
    part = judge_of("rar", adapter, site, exclude_sinks=True)
    x = torch.cat(whole.inputs)
    assert torch.equal(torch.cat(part.inputs), x[:, 2:])
    lost = (linear(x) - linear.bias).square().sum(-1)  # (5, T)
    torch.testing.assert_close(whole(identity, linear.weight, Zero()), lost.mean())
    torch.testing.assert_close(
        part(identity, linear.weight, Zero()), lost[:, 2:].sum() / lost.numel()
    )


@torch.no_grad()
def test_a_failed_candidate_restores_the_model_and_wrong_probes_are_named() -> None:
    adapter = tiny("rar")
    site = site_of(adapter, "qkv")
    judge = judge_of("rar", adapter, site)
    linear = adapter.model.get_submodule(site.name)
    identity = InputTransform(torch.ones(48), torch.zeros(48))
    with pytest.raises(RuntimeError):
        judge(identity, linear.weight[:, 1:], Passthrough())
    assert adapter.model.get_submodule(site.name) is linear
    wrong = Site(site.name, "qkv", site.consumers, probe=Probe("blocks.0.attn", "blocks.0.mlp.fc1"))
    with pytest.raises(ConfigError, match=r"blocks.0.attn does not call blocks.0.mlp.fc1"):
        judge_of("rar", adapter, wrong)


@pytest.mark.parametrize(
    ("rows", "spread", "expected"),
    [
        (3, False, [0, 1, 2]),
        (3, True, [0, 3, 6]),
        (10, True, range(10)),
        (99, True, range(10)),
        (4, True, [0, 2, 5, 7]),
    ],
)
def test_rows_are_the_first_or_lie_evenly_over_all_and_keep_their_batches(
    rows: int, spread: bool, expected: Sequence[int]
) -> None:
    batches = [{"x": torch.arange(0, 4)}, {"x": torch.arange(4, 8)}, {"x": torch.arange(8, 10)}]
    found = some_rows(batches, rows, spread)
    assert torch.cat([part["x"] for part in found]).tolist() == list(expected)
    assert [part["x"].tolist() for part in found] == [
        kept
        for kept in ([i for i in batch["x"].tolist() if i in expected] for batch in batches)
        if kept
    ]


@pytest.mark.parametrize(
    ("overrides", "spread"),
    [
        (["method=os_plus"], True),
        (["method=svdquant"], True),
        (["method=ptq4arvg", "method.os_plus=true"], False),
        (["method=os_plus", "method.options.os_plus.spread=false"], False),
        (["method=svdquant", "method.options.svd.spread=false"], False),
    ],
)
def test_searches_are_judged_on_spread_rows_or_without_it_on_the_first(
    overrides: list[str], spread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny("rar")
    seen = []
    chosen = calibration("rar", adapter)
    first = next(iter(chosen.rows.values()))[:2]

    def watched(batches: Sequence[Rows], *options: object) -> list[Rows]:
        parts = some_rows(batches, *options)
        seen.append(torch.equal(torch.cat([next(iter(part.values())) for part in parts]), first))
        return parts

    monkeypatch.setattr(probe, "some_rows", watched)
    few = ["method.options.os_plus.rows=2", "method.options.os_plus.steps=2"]
    few += ["method.options.svd.rows=2", "method.options.svd.iterations=1"]
    quantize(adapter, chosen, build_recipe(configure(["quant=w6a6", *overrides, *few])), batch=4)
    assert seen
    assert all(was_first != spread for was_first in seen)
