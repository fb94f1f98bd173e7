"""GPTQ keeps the grid, follows the plain algorithm, changes outputs less than nearest, and sees the
right inputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq import rounding
from ptq.inputs import capture_inputs
from ptq.methods.svdquant import SVDQuantSettings
from ptq.modules import QuantLinear
from ptq.numbers.grouping import broadcast_params
from ptq.numbers.numerics import NonFiniteError, QParams, dequantize, quantize
from ptq.numbers.quantizers import choose_qparams, fake_quantize_weight
from ptq.options import Options
from ptq.pipeline import apply_transforms, solve_transforms
from ptq.pipeline import quantize as quantize_model
from ptq.recipe import Recipe
from ptq.rounding import (
    GPTQSettings,
    gptq_round,
    input_correlations,
    inverse_factor,
    round_weights,
    shorten_branch,
)
from ptq.types import Adapter, ConfigError, QuantSpec
from tests.families import FAMILIES, calibration, relative, tiny

DAMPING = 0.01
ROW4 = QuantSpec(4, granularity="out_channel")
SPECS = [
    ROW4,
    QuantSpec(3, symmetric=True, granularity="out_channel"),
    QuantSpec(4),
    QuantSpec(6, granularity="out_channel", range="minmax"),
]


def layer(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs (400, 40) that mostly lie in 10 dimensions, and weights (24, 40)."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    generator = torch.Generator().manual_seed(seed)
    x = normal(400, 10) @ normal(10, 40) + 0.3 * normal(400, 40)
    return x.to(dtype), normal(24, 40).to(dtype)


def by_gptq(weight: Tensor, x: Tensor, spec: QuantSpec, block: int = 128) -> tuple[Tensor, QParams]:
    params = choose_qparams(weight, spec)
    return gptq_round(weight, inverse_factor(x.t() @ x, DAMPING), params, spec, block), params


def plain(weight: Tensor, x: Tensor, params: QParams, levels: int) -> np.ndarray:
    """Optimal brain quantization in a fixed order: the inverse Hessian itself, eliminated column by
    column."""
    w = weight.double().numpy().copy()
    h = (x.t() @ x).double().numpy()
    inverse = np.linalg.inv(h + DAMPING * np.mean(np.diag(h)) * np.eye(len(h)))
    scale, zero = (
        np.broadcast_to(p.double().numpy(), len(w)) for p in (params.scale, params.zero_point)
    )
    rounded = np.empty_like(w)
    for i in range(w.shape[1]):
        rounded[:, i] = (np.clip(np.round(w[:, i] / scale) + zero, 0, levels - 1) - zero) * scale
        w -= np.outer(w[:, i] - rounded[:, i], inverse[i] / inverse[i, i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return rounded


def output_error(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    return float((x @ (rounded - weight).t()).square().sum())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("block", [1, 7, 40, 128])
def test_gptq_is_the_plain_algorithm_whatever_the_block(spec: QuantSpec, block: int) -> None:
    x, weight = layer()
    rounded, params = by_gptq(weight, x, spec, block)
    np.testing.assert_allclose(
        rounded.numpy(), plain(weight, x, params, spec.levels), rtol=0, atol=1e-6
    )
    assert torch.equal(rounded, by_gptq(weight, x, spec)[0])


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_gptq_changes_the_output_on_correlated_inputs_less_than_nearest(
    spec: QuantSpec, seed: int
) -> None:
    x, weight = layer(seed)
    rounded, params = by_gptq(weight, x, spec)
    nearest, same = fake_quantize_weight(weight, spec)
    assert torch.equal(params.scale, same.scale)
    assert output_error(weight, rounded, x) < 0.8 * output_error(weight, nearest, x)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_with_uncorrelated_inputs_gptq_is_nearest(spec: QuantSpec) -> None:
    _, weight = layer()
    factor = inverse_factor(torch.diag(torch.linspace(0, 5, 40, dtype=torch.float64)), DAMPING)
    assert torch.equal(
        gptq_round(weight, factor, choose_qparams(weight, spec), spec),
        fake_quantize_weight(weight, spec)[0],
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_weight_lies_on_the_grid_bit_for_bit(spec: QuantSpec, dtype: torch.dtype) -> None:
    x, weight = layer(dtype=dtype)
    before = weight.clone()
    rounded, params = by_gptq(weight, x, spec)
    on = broadcast_params(params, spec)
    codes = quantize(rounded, on, spec.levels)
    assert torch.equal(weight, before)
    assert rounded.dtype == dtype
    assert (float(codes.min()), float(codes.max())) == (0, spec.levels - 1)
    assert torch.equal(dequantize(codes, on), rounded)


def test_the_factor_is_the_upper_one_of_the_damped_inverse() -> None:
    x, _ = layer()
    h = x.t() @ x
    u = inverse_factor(h, DAMPING)
    assert torch.equal(u, u.triu())
    assert bool((u.diagonal() > 0).all())
    one = torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(
        u.t() @ u @ (h + DAMPING * h.diagonal().mean() * one), one, rtol=0, atol=1e-9
    )


def test_a_dead_input_is_rounded_to_nearest_and_disturbs_no_other() -> None:
    x, weight = layer()
    x[:, 11] = 0
    spec = ROW4
    rest = torch.arange(40) != 11
    params = choose_qparams(weight, spec)
    h = x.t() @ x
    rounded = gptq_round(weight, inverse_factor(h, DAMPING), params, spec)
    assert torch.equal(rounded[:, 11], fake_quantize_weight(weight, spec)[0][:, 11])
    # the mean of the diagonal, zero included, sets the damping
    alone = gptq_round(
        weight[:, rest], inverse_factor(h[rest][:, rest], DAMPING * 39 / 40), params, spec
    )
    assert torch.equal(rounded[:, rest], alone)
    silent = inverse_factor(torch.zeros(40, 40, dtype=torch.float64), DAMPING)
    assert torch.equal(silent, torch.eye(40, dtype=torch.float64))


def test_too_little_damping_for_a_singular_hessian_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^method.options.gptq.damping: 1e-30 leaves a Hessian .*, allowed is more$",
    ):
        inverse_factor(torch.ones(8, 8), 1e-30)


# --- in a model


def recipe(*chain: str, **changes: object) -> Recipe:
    svd = SVDQuantSettings(rank=6, iterations=1, grid=False)
    settings = Options(svd=svd, gptq=GPTQSettings(DAMPING, 16))
    return Recipe(
        ROW4,
        QuantSpec(8, granularity="token_dynamic"),
        chain,
        options=settings,
        rounder="gptq",
        **changes,
    )


def transformed(family: str, how: Recipe, rows: int = 4) -> Adapter:
    """A small model with its transforms applied, nothing rounded."""
    adapter = tiny(family)
    chosen = calibration(family, adapter)
    solution = solve_transforms(
        adapter, chosen.batches(rows), len(chosen), how, lambda items, what: items
    )
    apply_transforms(adapter, how, solution)
    return adapter


def linears(adapter: Adapter) -> dict[str, QuantLinear]:
    return {n: m for n, m in adapter.model.named_modules() if isinstance(m, QuantLinear)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exclude_sinks", [False, True])
@torch.no_grad()
def test_the_hessian_is_that_of_the_inputs_which_the_weight_reads(
    family: str, exclude_sinks: bool
) -> None:
    how = recipe("smoothquant", "svd", exclude_sinks=exclude_sinks)
    adapter = transformed(family, how)
    batches = calibration(family, adapter).batches(5)
    sites = how.scope.sites(adapter)
    raw = capture_inputs(adapter, batches, sites, exclude_sinks)
    online = 0
    for site, hessian in input_correlations(adapter, sites, batches, exclude_sinks):
        linear = adapter.model.get_submodule(site.name)
        x = raw[site.name] if linear.transform is None else linear.transform(raw[site.name])
        assert relative(hessian, x.t() @ x) < 1e-12
        online += linear.transform is not None
    assert (online > 0) == (family != "par")  # where everything folds
    full = {
        site.name: len(x)
        for site, x in zip(sites, capture_inputs(adapter, batches, sites, False).values())
    }
    assert any(len(raw[name]) < count for name, count in full.items()) == exclude_sinks


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_weight_is_that_of_gptq_and_portions_change_nothing(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, QuantLinear]] = []
    passes: list[str] = []
    how = recipe("smoothquant", "svd")

    def track(items: object, what: str) -> object:
        passes.append(what)
        return items

    for limit in (rounding.HESSIAN_BYTES, 60_000):
        monkeypatch.setattr(rounding, "HESSIAN_BYTES", limit)
        adapter = transformed(family, how)
        batches = calibration(family, adapter).batches(4)
        sites = how.scope.sites(adapter)
        for site in sites:
            shorten_branch([adapter.model.get_submodule(name) for name in site.consumers])
        if not found:
            factors = {
                s.name: inverse_factor(h, DAMPING)
                for s, h in input_correlations(adapter, sites, batches, False)
            }
            raw = {name: linear.weight.clone() for name, linear in linears(adapter).items()}
        round_weights(adapter, how, batches, track)
        found.append(linears(adapter))
    assert len(passes) > 3
    assert passes[0] == passes[1] == "input correlations, pass 1"
    differs = 0
    for site in sites:
        for name in site.consumers:
            once = found[0][name]
            again = found[1][name]
            assert torch.equal(once.weight, again.weight)
            assert torch.equal(
                once.weight, gptq_round(raw[name], factors[site.name], once.weight_params, ROW4)
            )
            differs += not torch.equal(once.weight, fake_quantize_weight(raw[name], ROW4)[0])
    assert differs == len(found[0])


@pytest.mark.parametrize("chain", [(), ("smoothquant", "shift", "gps"), ("svd",)], ids="+".join)
@torch.no_grad()
def test_gptq_comes_closer_than_nearest_under_any_transform(
    chain: tuple[str, ...],
) -> None:
    errors = []
    for rounder in ("gptq", "nearest"):
        adapter = tiny("rar")
        chosen = calibration("rar", adapter)
        full = adapter.forward(chosen.rows)
        how = recipe(*chain)
        quantize_model(adapter, chosen, Recipe(**{**vars(how), "rounder": rounder}), batch=4)
        errors.append(float((adapter.forward(chosen.rows) - full).square().mean()))
    assert errors[0] < 0.9 * errors[1]


@torch.no_grad()
def test_the_branch_goes_to_16_bits_and_the_function_stays() -> None:
    adapter = transformed("par", recipe("svd"))
    rows = calibration("par", adapter).rows
    before = adapter.forward(rows)
    gated = [adapter.model.get_submodule(f"layers.0.feed_forward.{name}") for name in ("w1", "w3")]
    assert gated[0].down is gated[1].down
    assert not torch.equal(gated[1].up, gated[1].up.bfloat16().double())
    shorten_branch(gated)
    for linear in gated:
        for part in (linear.down, linear.up):
            assert torch.equal(part, part.bfloat16().double())
    assert gated[0].down is gated[1].down
    assert relative(adapter.forward(rows), before) < 1e-12


def breaks(adapter: Adapter) -> None:
    adapter.model.get_submodule("blocks.0.mlp.fc1").weight[0, 0] = torch.nan


def overflows(adapter: Adapter) -> None:
    adapter.model.get_submodule("blocks.0.norm2").bias[0] = torch.inf


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (breaks, r"^blocks\.0\.mlp\.fc1\.weight: .* NaN or infinity"),
        (overflows, r"^blocks\.0\.mlp\.fc1: activations"),
    ],
)
@torch.no_grad()
def test_weights_and_inputs_that_are_not_finite_are_refused_by_name(
    harm: Callable, said: str
) -> None:
    adapter = transformed("rar", recipe())
    batches = calibration("rar", adapter).batches(4)
    harm(adapter)
    how = recipe() if harm is overflows else Recipe(**{**vars(recipe()), "rounder": "nearest"})
    with pytest.raises(NonFiniteError, match=said):
        round_weights(adapter, how, batches)


def test_the_released_sequence_and_an_unknown_rounder_are_refused() -> None:
    chain = ("smoothquant", "shift", "gps")
    with pytest.raises(ConfigError, match="^method.released: true runs a fixed sequence"):
        Recipe(
            ROW4, QuantSpec(), chain, stwq=True, exclude_sinks=True, released=True, rounder="gptq"
        )
    with pytest.raises(
        ConfigError, match="^method.rounder: 'adaround' is not one of gptaq, gptq, nearest, qronos$"
    ):
        Recipe(ROW4, QuantSpec(), rounder="adaround")


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [96, 300])
def test_a_graph_of_columns_rounds_bit_by_bit_as_they_do_on_a_gpu(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = torch.Generator().manual_seed(0)
    weights = [torch.randn(64, columns, generator=source).cuda() for _ in range(2)]
    x = torch.randn(500, columns, generator=source).cuda()
    factor = inverse_factor(x.t() @ x, DAMPING)
    for weight in weights:  # the second one replays the graphs
        params = choose_qparams(weight, ROW4)
        by_graph = gptq_round(weight, factor, params, ROW4)
        with monkeypatch.context() as patch:
            patch.setattr(rounding, "graphed_columns", rounding.round_columns)
            assert torch.equal(gptq_round(weight, factor, params, ROW4), by_graph)
