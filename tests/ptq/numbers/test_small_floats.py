"""Small floating-point numbers against tables of their bits, and scales of blocks against the rules
of their specifications, value by value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ptq.numbers.numerics import params_from_range, simulate_format
from ptq.numbers.quantizers import GroupQuantizer, fake_quantize_weight, run_time_quantizer
from ptq.numbers.small_floats import E2M1, E2M3, E3M2, NVFP4, FloatGrid
from ptq.spec import ConfigError, QuantSpec

# exponent bits, mantissa bits, bias, as the OCP specification's tables have them
LAYOUTS = {"e2m1": (2, 1, 1), "e2m3": (2, 3, 1), "e3m2": (3, 2, 3)}
GRIDS: dict[str, FloatGrid] = {"e2m1": E2M1, "e2m3": E2M3, "e3m2": E3M2}
MX = {"mxfp4": ("e2m1", 4), "mxfp6_e2m3": ("e2m3", 6), "mxfp6_e3m2": ("e3m2", 6)}
NV = QuantSpec(4, granularity="group", range="minmax", format="nvfp4", group_size=16)


def decode(code: int, layout: tuple[int, int, int]) -> float:
    """The number that the bits of a positive code stand for."""
    _, mantissa_bits, bias = layout
    exponent, mantissa = divmod(code, 2**mantissa_bits)
    if exponent == 0:
        return math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return math.ldexp(2**mantissa_bits + mantissa, exponent - bias - mantissa_bits)


def table(name: str) -> list[float]:
    """All positive numbers of a format, by code."""
    layout = LAYOUTS[name]
    return [decode(code, layout) for code in range(2 ** (layout[0] + layout[1]))]


def nearest(value: float, numbers: list[float]) -> float:
    """The nearest number of a table, of two the one with the even code; negative ones mirrored."""
    distances = [(abs(abs(value) - number), code % 2) for code, number in enumerate(numbers)]
    return math.copysign(numbers[distances.index(min(distances))], value)


def mx_spec(name: str) -> QuantSpec:
    return QuantSpec(MX[name][1], granularity="group", range="minmax", format=name, group_size=32)


def made_up(rows: int = 5, columns: int = 96, seed: int = 0) -> Tensor:
    """Values of many magnitudes, float32, with a block of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    values *= torch.exp2(torch.randint(-12, 12, (rows, columns), generator=generator).float())
    values[0, :32] = 0
    return values


def test_the_table_of_e2m1_is_the_one_in_the_specification() -> None:
    assert table("e2m1") == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (table("e2m3")[-1], table("e3m2")[-1]) == (7.5, 28)
    assert (table("e2m3")[1], table("e3m2")[1]) == (0.125, 0.0625)


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_has_the_numbers_of_the_table_and_rounds_to_the_nearest(name: str) -> None:
    grid = GRIDS[name]
    numbers = table(name)
    assert grid.positive_numbers().tolist() == numbers
    exact = torch.tensor(numbers)
    assert torch.equal(grid.round(exact), exact)
    assert torch.equal(grid.round(-exact), -exact)
    middles = (exact[1:] + exact[:-1]) / 2  # ties
    generator = torch.Generator().manual_seed(1)
    others = (torch.rand(500, generator=generator) * 2 - 1) * grid.largest * 1.2
    values = torch.cat((middles, -middles, others, torch.tensor([1e9, -1e9, 1e-9])))
    expected = [nearest(value, numbers) for value in values.tolist()]
    assert grid.round(values).tolist() == expected
    assert grid.round(values.double()).tolist() == expected


@pytest.mark.parametrize("name", MX)
def test_a_block_of_mx_is_what_the_specification_says(name: str) -> None:
    grid, _ = MX[name]
    numbers = table(grid)
    largest_exponent = math.floor(math.log2(numbers[-1]))
    weight = made_up()
    rounded, params = fake_quantize_weight(weight, mx_spec(name))
    # a power of two is one of e8m0's numbers
    assert torch.equal(params.scale.to(torch.float8_e8m0fnu).float(), params.scale)
    scales = params.scale.view(5, 3)
    for row in range(5):
        for block in range(3):
            values = weight[row, 32 * block : 32 * block + 32]
            largest = float(values.abs().max())
            scale = 1.0
            if largest:
                scale = 2.0 ** (math.frexp(largest)[1] - 1 - largest_exponent)
            assert float(scales[row, block]) == scale
            expected = [scale * nearest(value / scale, numbers) for value in values.tolist()]
            assert rounded[row, 32 * block : 32 * block + 32].tolist() == expected


@pytest.mark.parametrize("name", MX)
def test_rounding_to_mx_twice_changes_nothing_and_errors_are_bounded(name: str) -> None:
    weight = made_up(seed=3)
    rounded, params = fake_quantize_weight(weight, mx_spec(name))
    again, same = fake_quantize_weight(rounded, mx_spec(name))
    assert torch.equal(again, rounded)
    assert torch.equal(same.scale, params.scale)
    # what lies beyond the largest number is cut off, by a fourth at most
    scale = params.scale.view(5, 3).repeat_interleave(32, dim=1)
    ratio = (rounded / weight).nan_to_num(1.0)
    normal = weight.abs() >= scale * 2.0 ** GRIDS[MX[name][0]].least_exponent
    assert float(ratio[normal].min()) > 0.75
    assert float(ratio[normal].max()) <= 1.25


@pytest.mark.parametrize("name", MX)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_block_with_no_number_in_it_is_nan(name: str, value: float) -> None:
    spec = mx_spec(name).at("group_dynamic")
    x = made_up()
    expected = run_time_quantizer(spec)(x)
    x[1, 40] = value
    rounded = run_time_quantizer(spec)(x)
    assert bool(rounded[1, 32:64].isnan().all())
    rounded[1, 32:64] = expected[1, 32:64]
    assert torch.equal(rounded, expected)


@pytest.mark.parametrize("name", MX)
def test_scales_end_where_their_exponents_of_eight_bits_end(name: str) -> None:
    largest = math.floor(math.log2(table(MX[name][0])[-1]))
    magnitudes = torch.tensor([2.0**-140, 2.0**-120, 2.0**127])
    weight = magnitudes[:, None].expand(3, 32)
    exponents = [-127, -120 - largest, 127 - largest]
    rounded, params = fake_quantize_weight(weight, mx_spec(name))
    assert params.scale.tolist() == [2.0**exponent for exponent in exponents]
    assert torch.equal(rounded[1:], weight[1:])


def test_a_block_of_nvfp4_is_what_nvidia_says() -> None:
    weight = made_up(columns=64)
    rounded, params = fake_quantize_weight(weight, NV)
    numbers = table("e2m1")
    whole = weight.abs().max() / (448 * 6)
    scales = params.scale.view(5, 4)
    for row in range(5):
        for block in range(4):
            values = weight[row, 16 * block : 16 * block + 16]
            exact = values.abs().max() / 6 / whole
            relative = exact.clamp(2.0**-9).to(torch.float8_e4m3fn).float()
            assert 2.0**-9 <= float(relative) <= 448
            scale = relative * whole
            assert float(scales[row, block]) == float(scale)
            expected = [nearest(value, numbers) for value in (values / scale).tolist()]
            found = rounded[row, 16 * block : 16 * block + 16]
            assert torch.equal(found, torch.tensor(expected) * scale)


def test_the_largest_block_of_nvfp4_has_the_largest_scale() -> None:
    weight = made_up(columns=64)
    _, params = fake_quantize_weight(weight, NV)
    whole = NVFP4.tensor_scale(weight.amin()[None], weight.amax()[None])
    assert float(params.scale.max() / whole) == pytest.approx(448)
    zeros, params = fake_quantize_weight(torch.zeros(2, 16), NV)
    assert not zeros.any()
    assert bool(params.scale.isfinite().all())


def test_blocks_of_an_activation_use_the_scale_of_calibration() -> None:
    x = made_up(seed=5)[:, :64]
    spec = NV.at("group_dynamic")
    fixed = run_time_quantizer(spec, x.abs().amax())
    assert torch.equal(fixed(x), fake_quantize_weight(x, NV)[0])
    # a token's numbers do not depend on the others then
    assert torch.equal(fixed(x)[2:3], fixed(x[2:3]))
    assert not torch.equal(GroupQuantizer(spec)(x)[1:2], GroupQuantizer(spec)(x[1:2]))


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp6_e2m3", "fp6_e3m2"])
def test_without_blocks_the_largest_value_becomes_the_largest_number(name: str) -> None:
    grid = GRIDS[name.partition("_")[2]]
    bits = int(name[2])
    spec = QuantSpec(bits, range="minmax", format=name)
    x = made_up(seed=7)
    params = params_from_range(x.min()[None], x.max()[None], spec)
    assert float(params.scale) == float(x.abs().max() / grid.largest)
    rounded = simulate_format(x, params, spec)
    assert torch.equal(simulate_format(rounded, params, spec), rounded)
    numbers = grid.positive_numbers() * params.scale
    assert bool(torch.isin(rounded.abs(), numbers).all())


def test_what_a_format_has_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^group_size: 16 .* mxfp4, whose blocks are of 32$"):
        QuantSpec(4, granularity="group", range="minmax", format="mxfp4", group_size=16)
    with pytest.raises(ConfigError, match=r"^range: percentile_mse does not go with .* minmax$"):
        QuantSpec(4, granularity="group", format="nvfp4", group_size=16)
    with pytest.raises(ConfigError, match=r"^bits: 8 does not go with the format fp6_e2m3"):
        QuantSpec(8, format="fp6_e2m3")
