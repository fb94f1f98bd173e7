"""The geometric program: convex, the same optimum from any start, that of a dense grid; its loss is
the error that roundings make."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ptq.gps import gps_transform
from ptq.methods.smoothquant import smoothquant_step
from ptq.numbers.numerics import fake_quantize, params_from_range
from ptq.staq.geometric import (
    PositionStatistics,
    Program,
    centred,
    minimise,
    program_of,
)
from ptq.types import QuantSpec, Segments

LONG = 2000  # steps that leave nothing to be gained


def random_layer(seed: int, tokens: int = 400, channels: int = 12) -> tuple[Tensor, Tensor]:
    """Inputs (N, C) with outlier channels, and a weight (O, C) with wide columns, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(tokens, channels) * (1.5 * normal(channels)).exp() + normal(channels)
    return x, normal(20, channels) * normal(channels).exp()


def random_program(seed: int, bits: tuple[int, int] = (6, 6)) -> Program:
    """The program of a random layer whose tokens are at four positions."""
    x, weight = random_layer(seed)
    statistics = PositionStatistics(weight)
    statistics.update(x.view(-1, 4, x.shape[1]), torch.arange(4))
    centre = torch.zeros(4, x.shape[1], dtype=torch.float64)
    levels = [2**b for b in bits]
    return program_of(statistics, Segments((0, 1)), False, centre, *levels)


def random_starts(count: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return 2 * torch.randn(count, channels, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_the_log_of_the_loss_is_convex_in_the_log_of_the_scale(seed: int) -> None:
    program = random_program(seed)
    for first, second in random_starts(20, 12).view(10, 2, 12):
        middle = program.log_loss((first + second) / 2)
        ends = (program.log_loss(first) + program.log_loss(second)) / 2
        assert middle <= ends + 1e-12


@pytest.mark.parametrize("bits", [(4, 8), (8, 4)])
def test_any_start_leads_to_the_same_loss(bits: tuple[int, int]) -> None:
    program = random_program(0, bits)
    losses = torch.stack(
        [
            program.log_loss(minimise(program, LONG, start))
            for start in [*random_starts(1, 12), program.smoothed(), torch.zeros(12).double()]
        ]
    )
    assert losses.max() - losses.min() < 2e-3


def test_the_optimum_is_that_of_a_dense_grid() -> None:
    x, weight = random_layer(3, channels=3)
    statistics = PositionStatistics(weight)
    statistics.update(x.view(-1, 2, 3), torch.arange(2))
    centre = torch.zeros(2, 3, dtype=torch.float64)
    program = program_of(statistics, Segments((0, 1)), False, centre, 16, 64)
    found = minimise(program, LONG)
    line = torch.linspace(-4, 4, 161, dtype=torch.float64)
    first, second = torch.meshgrid(line, line, indexing="ij")
    grid = torch.stack((first, second, -first - second), dim=-1).flatten(0, 1)  # sums are 0
    losses = torch.stack([program.log_loss(point) for point in grid])
    assert program.log_loss(found) <= losses.min() + 1e-4
    assert (found - grid[losses.argmin()]).abs().max() < 0.1


@pytest.mark.parametrize("bits", [(8, 8), (6, 6), (4, 8), (4, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_its_loss_is_below_that_of_gps_and_smoothquant(seed: int, bits: tuple[int, int]) -> None:
    x, weight = random_layer(seed)
    statistics = PositionStatistics(weight)
    statistics.update(x[:, None], torch.zeros(1, dtype=torch.long))
    centre = torch.zeros(1, x.shape[1], dtype=torch.float64)
    program = program_of(statistics, Segments(), False, centre, *(2**b for b in bits))
    found = program.log_loss(minimise(program, 200))
    specs = [QuantSpec(b, granularity=g) for b, g in zip(bits, ("tensor", "out_channel"))]
    others = (smoothquant_step(x, weight), gps_transform(x, weight, *specs))
    for step in others:
        assert found <= program.log_loss(step.scale.log()) + 1e-6


def test_common_factors_change_nothing_and_scaled_inputs_scale_optima() -> None:
    program = random_program(1)
    start = random_starts(1, 12)[0]
    assert math.isclose(
        float(program.log_loss(start)), float(program.log_loss(start + 3)), rel_tol=1e-12
    )
    factor = random_starts(2, 12)[0].exp()
    scaled = Program(
        program.upper * factor,
        program.lower * factor,
        program.tokens,
        program.energies * factor.square(),
        program.weight / factor,
        program.input_levels,
        program.weight_levels,
    )
    here = program.log_loss(start)
    there = scaled.log_loss(start + factor.log())
    assert math.isclose(float(here), float(there), rel_tol=1e-12)


@pytest.mark.parametrize("scale_seed", range(3))
def test_the_loss_is_the_error_that_both_roundings_make(scale_seed: int) -> None:
    """Rounding errors are uniform within a step, so the error is L / 12."""
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(4000, 24, generator=generator, dtype=torch.float64) - 0.3
    weight = torch.randn(64, 24, generator=generator, dtype=torch.float64)
    log_scale = centred(0.3 * random_starts(3, 24)[scale_seed])
    statistics = PositionStatistics(weight)
    statistics.update(x[:, None], torch.zeros(1, dtype=torch.long))
    centre = torch.zeros(1, 24, dtype=torch.float64)
    program = program_of(statistics, Segments(), False, centre, 256, 256)
    scale = log_scale.exp()
    spec = QuantSpec(8)
    inputs = x / scale
    weights = weight * scale
    rounded = fake_quantize(inputs, params_from_range(inputs.min(), inputs.max(), spec), 256)
    rows = params_from_range(weights.amin(1), weights.amax(1), spec)
    rounded_weight = fake_quantize(weights, rows.view(-1, 1), 256)
    error = (rounded @ rounded_weight.t() - x @ weight.t()).square().sum(dim=1).mean()
    energy = (x @ weight.t()).square().sum(dim=1).mean()
    modelled = program.log_loss(log_scale).exp() / len(x) / 12 * energy
    assert 0.9 < float(modelled / error) < 1.1


def test_statistics_of_parts_are_those_of_all_and_positions_are_arguments() -> None:
    x, weight = random_layer(5)
    tokens = x.view(-1, 8, 12)
    whole = PositionStatistics(weight)
    whole.update(tokens, torch.arange(8))
    parts = PositionStatistics(weight)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    parts.update(tokens[:20, order[:3]], order[:3])
    parts.update(tokens[:20, order[3:]], order[3:])
    parts.update(tokens[20:], torch.arange(8))
    for name in ("counts", "outputs", "sums", "squares", "upper", "lower"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_centred_moments_are_those_of_centred_inputs() -> None:
    x, weight = random_layer(6)
    tokens = x.view(-1, 4, 12)
    centre = random_starts(4, 12)
    plain = PositionStatistics(weight)
    plain.update(tokens - centre, torch.arange(4))
    shifted = PositionStatistics(weight)
    shifted.update(tokens, torch.arange(4))
    shifted.outputs = plain.outputs  # energies are those of the inputs as they are
    zero = torch.zeros_like(centre)
    for per_position in (False, True):
        expected = program_of(plain, Segments((0, 1)), per_position, zero, 64, 64)
        found = program_of(shifted, Segments((0, 1)), per_position, centre, 64, 64)
        for name in ("upper", "lower", "tokens", "energies"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))
