"""GPTAQ and Qronos are the papers' algorithms, are GPTQ where inputs are not rounded, and come
closer to the outputs that are wanted than rounding to nearest."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ptq.methods.qronos import QronosSettings, mean_damping, qronos_target
from ptq.numbers.grouping import broadcast_params, params_of_columns
from ptq.numbers.numerics import QParams, fake_quantize, params_from_range
from ptq.numbers.quantizers import choose_qparams, fake_quantize_weight
from ptq.options import Options
from ptq.pipeline import quantize as quantize_model
from ptq.recipe import Recipe
from ptq.registry.entries import ROUNDERS
from ptq.rounding import gptq_round
from ptq.staq.gptaq import GPTAQSettings, round_by_columns
from ptq.staq.inputs import SiteData
from ptq.staq.rounded_inputs import Moments, moments_of, ordered_factor
from ptq.types import ConfigError, QuantSpec
from tests.families import calibration, tiny

ROW4 = QuantSpec(4, granularity="out_channel")
DAMPING = 1e-9


def layer(seed: int = 0, channels: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs (500, C), the same rounded to 3 bits, and a weight (12, C), float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(500, 6) @ normal(6, channels) + 0.3 * normal(500, channels)
    params = params_from_range(x.min(), x.max(), QuantSpec(3))
    return x, fake_quantize(x, params, 8), normal(12, channels)


def second_moments(x: Tensor, rounded: Tensor) -> Moments:
    return moments_of(x, rounded, torch.ones(len(x), dtype=x.dtype))


def gptaq(
    weight: Tensor, moments: Moments, correction: float = 1.0, block: int = 128, order: bool = False
) -> Tensor:
    factor = ordered_factor(moments.hessian, DAMPING, order)
    params = choose_qparams(weight, ROW4)
    return round_by_columns(
        weight, moments, factor, params, ROW4, correction=correction, block=block
    )


def qronos(weight: Tensor, moments: Moments, order: bool = False) -> Tensor:
    factor = ordered_factor(moments.hessian, DAMPING, order)
    target = qronos_target(weight, moments, factor, DAMPING)
    return factor.round_weight(target, choose_qparams(weight, ROW4), ROW4, 128)


def round_column(column: Tensor, params: QParams) -> Tensor:
    return fake_quantize(column[:, None], broadcast_params(params, ROW4), ROW4.levels)[:, 0]


def plain_gptaq(weight: Tensor, x: Tensor, rounded: Tensor) -> Tensor:
    """The paper's steps: later columns make up, by least squares, for what column i leaves open."""
    w = weight.clone()
    params = choose_qparams(weight, ROW4)
    for i in range(w.shape[1]):
        column = w[:, i].clone()
        w[:, i] = round_column(column, params)
        if i + 1 < w.shape[1]:
            left = torch.outer(x[:, i] - rounded[:, i], column)  # (N, O)
            left += torch.outer(rounded[:, i], column - w[:, i])
            w[:, i + 1 :] += torch.linalg.lstsq(rounded[:, i + 1 :], left).solution.t()
    return w


def plain_qronos(weight: Tensor, x: Tensor, rounded: Tensor) -> Tensor:
    """The paper's definition, an exact minimum at every step."""
    w = weight.clone()
    params = choose_qparams(weight, ROW4)
    wanted = x @ weight.t()  # (N, O)
    for i in range(w.shape[1]):
        a = rounded[:, i]
        others = rounded @ w.t() - torch.outer(a, w[:, i])
        best = (wanted - others).t() @ a / a.square().sum()
        w[:, i] = round_column(best, params)
        if i + 1 < w.shape[1]:
            left = wanted - rounded[:, : i + 1] @ w[:, : i + 1].t()
            w[:, i + 1 :] = torch.linalg.lstsq(rounded[:, i + 1 :], left).solution.t()
    return w


def output_error(weight: Tensor, found: Tensor, x: Tensor, rounded: Tensor) -> float:
    return float((x @ weight.t() - rounded @ found.t()).square().sum())


@pytest.mark.parametrize("seed", range(3))
def test_gptaq_by_columns_is_the_plain_algorithm(seed: int) -> None:
    x, rounded, weight = layer(seed)
    expected = plain_gptaq(weight, x, rounded)
    found = gptaq(weight, second_moments(x, rounded))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [1, 7, 20])
def test_blocks_do_not_change_gptaq(block: int) -> None:
    x, rounded, weight = layer()
    moments = second_moments(x, rounded)
    torch.testing.assert_close(gptaq(weight, moments, block=block), gptaq(weight, moments))


@pytest.mark.parametrize("seed", range(3))
def test_qronos_is_the_plain_algorithm(seed: int) -> None:
    x, rounded, weight = layer(seed)
    expected = plain_qronos(weight, x, rounded)
    found = qronos(weight, second_moments(x, rounded))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [False, True])
def test_with_inputs_that_are_not_rounded_both_are_gptq(order: bool) -> None:
    x, _, weight = layer()
    moments = second_moments(x, x)
    factor = ordered_factor(moments.hessian, DAMPING, order)
    expected = factor.round_weight(weight, choose_qparams(weight, ROW4), ROW4, 128)
    assert torch.equal(qronos(weight, moments, order), expected)
    torch.testing.assert_close(gptaq(weight, moments, order=order), expected, rtol=0, atol=1e-9)


def test_gptaq_without_correction_is_gptq_for_rounded_inputs() -> None:
    x, rounded, weight = layer()
    moments = second_moments(x, rounded)
    factor = ordered_factor(moments.hessian, DAMPING, False).factor
    expected = gptq_round(weight, factor, choose_qparams(weight, ROW4), ROW4)
    torch.testing.assert_close(gptaq(weight, moments, 0.0), expected, rtol=0, atol=1e-9)


def test_the_order_is_the_algorithm_on_permuted_columns() -> None:
    x, rounded, weight = layer()
    moments = second_moments(x, rounded)
    order = moments.hessian.diagonal().argsort(descending=True)
    permuted = second_moments(x[:, order], rounded[:, order])
    for method in (gptaq, qronos):
        found = method(weight, moments, order=True)
        expected = method(weight[:, order], permuted)
        torch.testing.assert_close(found[:, order], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_outputs_come_closer_than_by_gptq_and_by_nearest(seed: int) -> None:
    x, rounded, weight = layer(seed)
    moments = second_moments(x, rounded)
    nearest = fake_quantize_weight(weight, ROW4)[0]
    found = [qronos(weight, moments), gptaq(weight, moments), gptaq(weight, moments, 0.0), nearest]
    errors = [output_error(weight, w, x, rounded) for w in found]
    assert errors == sorted(errors)


@pytest.mark.parametrize("seed", range(3))
def test_of_inputs_without_correlation_qronos_finds_the_best_of_all_codes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rounded = torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))  # H is diagonal
    x = rounded + 0.4 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    params = choose_qparams(weight, ROW4)
    grid = (torch.arange(ROW4.levels) - params.zero_point) * params.scale
    candidates = [torch.stack(codes)[None] for codes in itertools.product(grid, repeat=3)]
    best = min(candidates, key=lambda w: output_error(weight, w, x, rounded))
    found = qronos(weight, second_moments(x, rounded))
    torch.testing.assert_close(found, best)


def test_a_dead_input_is_rounded_to_nearest() -> None:
    x, rounded, weight = layer()
    rounded[:, 0] = 0
    moments = second_moments(x, rounded)
    nearest = fake_quantize_weight(weight, ROW4)[0]
    for found in (qronos(weight, moments), gptaq(weight, moments)):
        assert bool(found.isfinite().all())
        torch.testing.assert_close(found[:, 0], nearest[:, 0])


def test_damping_is_a_share_of_the_largest_eigenvalue() -> None:
    hessian = torch.diag(torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64))
    assert mean_damping(hessian, 0.5) * 4 == pytest.approx(4)
    assert mean_damping(torch.zeros(3, 3), 0.5) == 0.5


@pytest.mark.parametrize("method", ["gptaq", "qronos"])
def test_groups_keep_their_grids_and_one_of_the_whole_row_is_out_channel(method: str) -> None:
    x, rounded, weight = layer()
    own = QronosSettings(damping=1e-4) if method == "qronos" else GPTAQSettings(form="columns")
    data = SiteData(
        exact=x,
        given=x,
        rounded=rounded,
        is_sink=torch.zeros(len(x), dtype=torch.bool),
        shift=None,
        token_weights=torch.ones(len(x)),
    )
    found = []
    for spec in (ROW4, QuantSpec(4, granularity="group", group_size=weight.shape[1])):
        how = Recipe(spec, QuantSpec(6), rounder=method, options=Options(**{method: own}))
        rounder = ROUNDERS[method].make(how, data)
        found.append(rounder(weight, None)[0])
    torch.testing.assert_close(found[0], found[1])
    spec = QuantSpec(4, granularity="group", group_size=8)
    how = Recipe(spec, QuantSpec(6), rounder=method, options=Options(**{method: own}))
    grouped, params = ROUNDERS[method].make(how, data)(weight, None)
    by_column = params_of_columns(params, spec, weight)
    codes = grouped / by_column.scale + by_column.zero_point
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-9)


# --- in a model


def recipe(rounder: str, **settings: object) -> Recipe:
    return Recipe(ROW4, QuantSpec(6), rounder=rounder, sequential=True, options=Options(**settings))


@pytest.mark.parametrize("family", ["rar", "var"])
def test_models_come_closer_than_by_nearest(family: str) -> None:
    errors = {}
    columns = GPTAQSettings(form="columns", correction=1.0)
    recipes = {
        "nearest": recipe("nearest"),
        "gptaq": recipe("gptaq", gptaq=columns),
        "qronos": recipe("qronos", qronos=QronosSettings(damping=1e-4)),
    }
    with torch.no_grad():
        for name, how in recipes.items():
            adapter = tiny(family)
            rows = calibration(family, adapter)
            batch = rows.batches(4)[0]
            exact = adapter.forward(batch)
            quantize_model(adapter, rows, how, batch=4)
            errors[name] = float((adapter.forward(batch) - exact).square().mean())
    assert errors["gptaq"] < errors["nearest"]
    assert errors["qronos"] < errors["nearest"]


def test_both_are_for_integers_alone() -> None:
    for rounder in ("gptaq", "qronos"):
        with pytest.raises(ConfigError, match="^quant.weights.format: fp8_e4m3 does not go with"):
            Recipe(
                QuantSpec(8, granularity="out_channel", format="fp8_e4m3"),
                QuantSpec(8),
                rounder=rounder,
            )
