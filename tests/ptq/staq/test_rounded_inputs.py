"""Rounding for rounded inputs: the target is the least-squares weight, the order of columns is
free, and outputs on what the layer really gets come closer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq.numbers.numerics import fake_quantize, params_from_range
from ptq.numbers.quantizers import choose_qparams, fake_quantize_weight
from ptq.rounding import gptq_round, inverse_factor
from ptq.staq.rounded_inputs import (
    corrected_target,
    energy_weights,
    moments_of,
    ordered_factor,
    weighted_mean,
)
from ptq.types import QuantSpec, Segments

ROW4 = QuantSpec(4, granularity="out_channel")
ONES = torch.ones(600, dtype=torch.float64)


def layer(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs (600, 24), the same rounded to 3 bits, and a weight (16, 24), float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(600, 8) @ normal(8, 24) + 0.2 * normal(600, 24)
    params = params_from_range(x.min(), x.max(), QuantSpec(3))
    return x, fake_quantize(x, params, 8), normal(16, 24)


def output_error(weight: Tensor, rounded_weight: Tensor, x: Tensor, rounded: Tensor) -> float:
    return float((x @ weight.t() - rounded @ rounded_weight.t()).square().sum())


def test_the_whole_step_leads_to_the_least_squares_weight() -> None:
    x, rounded, weight = layer()
    target = corrected_target(weight, moments_of(x, rounded, ONES), 1.0, 0.0)
    expected = torch.linalg.lstsq(rounded, x @ weight.t()).solution.t()
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-8)


def test_no_correction_is_the_weight_and_half_lies_between() -> None:
    x, rounded, weight = layer()
    moments = moments_of(x, rounded, ONES)
    none, half, whole = (corrected_target(weight, moments, c, 0.01) for c in (0.0, 0.5, 1.0))
    assert torch.equal(none, weight)
    torch.testing.assert_close(half, (none + whole) / 2)
    errors = [output_error(weight, target, x, rounded) for target in (none, half, whole)]
    assert errors[0] > errors[1] > errors[2]


def test_unrounded_inputs_ask_for_no_correction() -> None:
    x, _, weight = layer()
    target = corrected_target(weight, moments_of(x, x, ONES), 1.0, 0.01)
    torch.testing.assert_close(target, weight)


def test_parts_of_the_tokens_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rounded, _ = layer()
    weights = torch.linspace(0.1, 2, 600, dtype=torch.float64)
    whole = moments_of(x, rounded, weights)
    monkeypatch.setattr("ptq.staq.rounded_inputs.CHUNK", 37)
    parts = moments_of(x, rounded, weights)
    torch.testing.assert_close(whole.hessian, parts.hessian)
    torch.testing.assert_close(whole.cross, parts.cross)
    expected = (rounded * weights[:, None]).t() @ rounded / weights.sum()
    torch.testing.assert_close(whole.hessian, expected)
    mean = (x * weights[:, None]).sum(dim=0) / weights.sum()
    torch.testing.assert_close(weighted_mean(x, weights), mean)


def test_the_order_is_gptq_on_permuted_columns_and_the_grid_is_kept() -> None:
    x, rounded, weight = layer()
    hessian = moments_of(x, rounded, ONES).hessian
    params = choose_qparams(weight, ROW4)
    found = ordered_factor(hessian, 0.01).round_weight(weight, params, ROW4, 8)
    order = hessian.diagonal().argsort(descending=True)
    factor = inverse_factor(hessian[order][:, order], 0.01)
    expected = gptq_round(weight[:, order], factor, params, ROW4)
    torch.testing.assert_close(found[:, order], expected)
    codes = found / params.scale[:, None] + params.zero_point[:, None]
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_outputs_for_rounded_inputs_come_closer_than_by_plain_gptq(seed: int) -> None:
    x, rounded, weight = layer(seed)
    moments = moments_of(x, rounded, ONES)
    target = corrected_target(weight, moments, 0.5, 0.01)
    params = choose_qparams(target, ROW4)
    ours = ordered_factor(moments.hessian, 0.01).round_weight(target, params, ROW4, 128)
    params = choose_qparams(weight, ROW4)
    theirs = gptq_round(weight, inverse_factor(x.t() @ x, 0.01), params, ROW4)
    nearest = fake_quantize_weight(weight, ROW4)[0]
    errors = [output_error(weight, w, x, rounded) for w in (ours, theirs, nearest)]
    assert errors[0] < errors[1] < errors[2]


def test_a_token_counts_by_the_inverse_of_its_segments_output_energy() -> None:
    x, _, weight = layer()
    positions = torch.arange(6).repeat(100)
    x = torch.where((positions < 2)[:, None], 50 * x, x)
    weights = energy_weights(x, positions, weight, Segments((0, 1, 2)))
    energy = (x @ weight.t()).square().mean(dim=1)
    for segment in (positions == 0, positions == 1, positions >= 2):
        own = weights[segment]
        assert torch.equal(own, own[:1].expand_as(own))
        torch.testing.assert_close(own[0] * energy[segment].mean(), energy[positions >= 2].mean())
    assert float(weights[-1]) == 1
