"""`ptq4arvg_released` on every family: what it folds changes nothing, and what it needs is asked
for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from models.par import sampler as par_sampler
from models.rar import sampler as rar_sampler
from models.var import sampler as var_sampler
from ptq.numbers.numerics import group_tails, percentile_ranges
from ptq.pipeline import quantize
from ptq.recipe import Recipe
from ptq.released.families import RELEASED
from ptq.released.running_quantizer import quantile_ranges, running_average
from ptq.released.sequence import ReleasedRun, in_blocks
from ptq.sites import Scope
from ptq.types import Adapter, CalibrationSet, ConfigError, QuantSpec, Rows
from tests.ptq.released.released_cases import mar_model, par_model, rar_model, recipe, var_model
from tests.reference import made_up, made_up_ints

LABELS = torch.tensor([1, 5, 3])
# two-block model, tokens of three images
FAMILIES: dict[str, tuple[Callable[[], Adapter], Callable[[], Tensor]]] = {
    "rar": (rar_model, lambda: made_up_ints("tokens", (3, 16), 40)),
    "var": (lambda: var_model((1, 2, 3, 4)), lambda: made_up_ints("tokens", (3, 30), 64)),
    "par": (lambda: par_model(36), lambda: made_up_ints("tokens", (3, 36), 64)),
    "mar": (lambda: mar_model(4), lambda: made_up("tokens", (3, 16, 4))),
}
families = pytest.mark.parametrize("family", FAMILIES)


def calibration(
    adapter: Adapter, family: str, dtype: torch.dtype = torch.float32
) -> CalibrationSet:
    """Both branches of three images in the released layout."""
    adapter.layout = "released"
    tokens = FAMILIES[family][1]()
    kinds = adapter.rows(tokens.to(dtype) if tokens.is_floating_point() else tokens, LABELS)
    return CalibrationSet(
        {k: torch.cat([rows[k] for rows in kinds]) for k in kinds[0]}, torch.arange(6) < 3
    )


def cached(adapter: Adapter, family: str, rows: Rows) -> Tensor:
    """Probabilities that decoding step by step with a cache gives; MAR has none."""
    seen: list[Tensor] = []

    def draw(p: Tensor, step: int) -> Tensor:
        seen.append(p.flatten())
        return p.argmax(-1)

    if family == "rar":
        rar_sampler.generate(adapter.model, LABELS, draw, 1.5, 1.0, 1.0)
    elif family == "var":
        var_sampler.generate(adapter.model, adapter.quantizer, LABELS, draw, 1.5, 0, 0.0)
    elif family == "par":
        par_sampler.generate(adapter.model, LABELS, draw, 1.5)
    else:
        return adapter.model(rows["tokens"], rows["mask"], rows["labels"])
    return torch.cat(seen)


@families
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@torch.no_grad()
def test_what_is_folded_leaves_the_model_unchanged(
    family: str, dtype: torch.dtype, bound: float
) -> None:
    adapter = FAMILIES[family][0]()
    adapter.model.to(dtype)
    if family == "var":
        adapter.quantizer.to(dtype)
    chosen = calibration(adapter, family, dtype)
    adapter.prepare()
    before = [(adapter.forward(chosen.rows), cached(adapter, family, chosen.rows))]
    adapter.layout = "inference"
    before.append((adapter.forward(chosen.rows), before[0][1]))
    adapter.layout = "released"
    run = ReleasedRun(adapter, chosen, recipe(family), 2)
    for stage in (run.smooth, run.first_calibration, run.shift, run.scale):
        stage()
    assert all(bool((t.scale != 1).all()) and bool(t.shift.any()) for t in run.transforms.values())
    run.full_precision()
    for layout, references in zip(("released", "inference"), before):
        adapter.layout = layout
        for value, reference in zip(
            (adapter.forward(chosen.rows), cached(adapter, family, chosen.rows)), references
        ):
            assert float((value - reference).abs().max() / reference.abs().max()) < bound


@families
def test_the_whole_pipeline_runs_and_8_bits_come_closer_than_4(family: str) -> None:
    errors = []
    for bits in (8, 4):
        adapter = FAMILIES[family][0]()
        chosen = calibration(adapter, family)
        with torch.no_grad():
            before = adapter.forward(chosen.rows)
            report = quantize(adapter, chosen, recipe(family, bits), batch=2)
            errors.append(float((adapter.forward(chosen.rows) - before).square().mean()))
        assert all(bool(v.isfinite().all()) for v in report.tensors.values())
        scope = RELEASED[family].scope
        linears = {c for s in adapter.sites if s.kind in scope.kinds for c in s.consumers}
        assert {
            k.removesuffix(".weight.scale") for k in report.tensors if k.endswith(".weight.scale")
        } == linears
        assert any(".qk." in k for k in report.tensors) == scope.matmuls
    assert 0 < errors[0] < errors[1] / 4


def test_another_layout_is_refused() -> None:
    adapter = rar_model()
    chosen = calibration(adapter, "rar")
    adapter.layout = "inference"
    with pytest.raises(ConfigError, match="^calib.layout: 'inference' is not one of released$"):
        quantize(adapter, chosen, recipe("rar"))


def test_a_shared_adaln_is_refused_since_no_block_can_fold_into_it() -> None:
    adapter = var_model((1, 2, 3, 4), shared_aln=True)
    chosen = calibration(adapter, "var")
    with pytest.raises(
        ConfigError, match="^method: ptq4arvg_released needs a norm or AdaLN of its own .*mat_qkv$"
    ):
        quantize(adapter, chosen, recipe("var"))


def test_a_scope_without_products_leaves_them_alone() -> None:
    adapter = rar_model()
    blocks = Recipe(
        QuantSpec(6, granularity="out_channel"),
        QuantSpec(6),
        ("smoothquant", "shift", "gps"),
        stwq=True,
        exclude_sinks=True,
        released=True,
        scope=Scope(("qkv", "proj", "fc1", "fc2"), False),
    )
    report = quantize(adapter, calibration(adapter, "rar"), blocks)
    assert not any("lm_head" in k or ".qk." in k for k in report.tensors)


def test_mar_rows_are_of_the_last_iteration_in_the_released_layout() -> None:
    adapter = mar_model(4)
    tokens = made_up("tokens", (32, 16, 4))
    labels = torch.zeros(32, dtype=torch.long)
    hidden = {}
    for adapter.layout in ("inference", "released"):
        hidden[adapter.layout] = adapter.rows(tokens, labels)[0]["mask"].sum(dim=1)
    assert hidden["inference"].unique().numel() > 4
    assert bool((hidden["released"] == hidden["inference"].min()).all())


def test_minibatches_have_both_kinds_in_their_share() -> None:
    conditional = torch.arange(128) < 64
    mixed = in_blocks(CalibrationSet({"row": torch.arange(128)}, conditional))
    expected = torch.cat(
        [torch.cat((torch.arange(16) + 16 * b, 64 + torch.arange(16) + 16 * b)) for b in range(4)]
    )
    assert torch.equal(mixed.rows["row"], expected)
    assert torch.equal(mixed.conditional, conditional[expected])
    alike = CalibrationSet({"row": torch.arange(40)}, torch.ones(40, dtype=torch.bool))
    assert torch.equal(in_blocks(alike).rows["row"], torch.arange(40))


@pytest.mark.parametrize("n", [2, 104, 384, 2272, 200_000])
def test_ranges_are_those_of_torch_quantile(n: int) -> None:
    values = made_up(f"quantile{n}", (3, n)) ** 3
    ranges = quantile_ranges(*group_tails(values), n)
    for lo, hi, p in zip(*ranges, (0.999, 0.9999, 0.99999)):
        assert torch.equal(lo, torch.quantile(values, 1 - p, dim=1))
        assert torch.equal(hi, torch.quantile(values, p, dim=1))


def test_ranges_beyond_2_to_the_24_values_are_those_of_numpy() -> None:
    n = 2**24 + 1000
    values = torch.linspace(-1, 2, n)[None]
    low = values[:, :20_000]
    high = values[:, -20_000:].flip(1)
    for ours, numbers in zip(
        quantile_ranges(low, high, n), ((1e-3, 1e-4, 1e-5), (0.999, 0.9999, 0.99999))
    ):
        np.testing.assert_allclose(
            ours[:, 0].numpy(), np.percentile(values.numpy(), 100 * np.array(numbers)), 1e-6
        )
    for ours, others in zip(quantile_ranges(low, high, n), percentile_ranges(low, high, n)):
        torch.testing.assert_close(ours, others, rtol=1e-6, atol=0)


def test_averages_keep_nine_tenths_and_round_to_their_type() -> None:
    first = running_average(torch.tensor([10.0, 255.0]), None)
    torch.testing.assert_close(first, torch.tensor([10.0, 255.0]))
    torch.testing.assert_close(
        running_average(torch.tensor([20.0, 155.0]), first), torch.tensor([11.0, 245.0])
    )
    rounded = running_average(torch.tensor([1.003]), torch.tensor([1.2]), torch.bfloat16)
    assert torch.equal(rounded, rounded.bfloat16().float())
