"""Parts of the rivals: shifted duplicates are one finer rounding, formats keep their grids, codes
are balanced, and models come out the same in decoding steps and on the full sequence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ptq.calibration import Pool, Selection, select_rows
from ptq.int8.attentions import find_attentions, simulation_reason
from ptq.int8.exports.encoding import check_integer_path
from ptq.methods.hadamard import HadamardRotation
from ptq.modules import QuantMatMul
from ptq.numbers.numerics import params_from_range, simulate_format
from ptq.numbers.quantizers import StaticQuantizer
from ptq.pipeline import apply_transforms, solve_transforms
from ptq.pipeline import quantize as quantize_model
from ptq.recipe import Recipe, named
from ptq.rivals.group_hadamard import block_size
from ptq.rivals.log2_rows import RowLog2Quantizer
from ptq.rivals.resampling import balance_codes, resample_rows, target_counts
from ptq.rivals.shift_and_sum import (
    MOST,
    AttentionCount,
    ShiftedMatMul,
    round_duplicates,
    search_theta,
)
from ptq.types import ConfigError, QuantSpec, Segments
from tests.families import assert_unchanged, calibration, decoded, relative, tiny
from tests.reference import made_up_ints


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- shift-and-sum


def value_quantizer(values: Tensor, bits: int = 4) -> StaticQuantizer:
    spec = QuantSpec(bits, granularity="head")
    lo = values.amin(dim=(0, 2, 3))
    hi = values.amax(dim=(0, 2, 3))
    return StaticQuantizer(spec, params_from_range(lo, hi, spec))


@pytest.mark.parametrize("n", range(MOST + 1))
def test_the_mean_of_shifted_roundings_is_one_on_a_finer_grid(n: int) -> None:
    values = normal(2, 3, 5, 8)
    quantizer = value_quantizer(values)
    scale = quantizer.scale.view(-1, 1, 1)
    zero_point = quantizer.zero_point.view(-1, 1, 1)
    count = 2**n
    codes = torch.zeros_like(values)
    for i in range(-count // 2, count // 2 if n else 0):
        codes += torch.round(values / scale + (2 * i + 1) / (2 * count)) / count
    if n == 0:
        codes = torch.round(values / scale)
    codes = (codes + zero_point).clamp(0, quantizer.spec.levels - 1)
    expected = (codes - zero_point) * scale
    torch.testing.assert_close(round_duplicates(quantizer, values, n), expected)


def test_without_duplicates_it_is_the_plain_product_with_them_closer() -> None:
    values = normal(2, 3, 14, 8)
    attention = torch.softmax(4 * normal(2, 3, 14, 14, seed=1), dim=-1)
    plain = QuantMatMul()
    plain.b = value_quantizer(values)
    positions = torch.arange(14)
    expected = plain(attention, plain.prepare(values), positions)
    shifted = ShiftedMatMul(plain, Segments((0, 1, 5)))
    torch.testing.assert_close(shifted(attention, values, positions), expected)
    exact = attention @ values
    errors = []
    for theta in (1.0, 0.1, 1e-6):
        shifted.theta = theta
        errors.append(float((shifted(attention, values, positions) - exact).norm()))
    assert errors == sorted(errors, reverse=True)


def test_a_token_has_duplicates_by_the_attention_of_its_calls_queries() -> None:
    attention = torch.tensor([[0.5, 0.5, 0, 0], [0.9, 0, 0.1, 0], [0.1, 0, 0.9, 0]])[None, None]
    shifted = ShiftedMatMul(QuantMatMul(), Segments((0, 1)))
    mean, queries, group = shifted.mean_attention(attention, torch.arange(3))
    assert queries.tolist() == [1, 2]
    assert group.tolist() == [0, 1, 1]
    expected = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0]])
    torch.testing.assert_close(mean[0, 0], expected)


def test_theta_is_the_least_that_keeps_the_budget() -> None:
    attention = torch.rand(1, 2, 3, 40, generator=torch.Generator().manual_seed(0))
    count = AttentionCount(channels=8, bits=6)
    count.add(attention, torch.tensor([1, 4, 9]))
    costs = [count.cost(step) for step in range(0, 640, 8)]
    assert costs == sorted(costs)
    assert count.cost(0) == count.fixed
    budget = count.fixed + 0.5 * (costs[-1] - count.fixed)
    step = round(-64 * torch.tensor(search_theta([count], budget)).log2().item())
    assert count.cost(step) <= budget < count.cost(step + 1)
    assert search_theta([count], 0.0) == 1


@pytest.mark.parametrize(("bits", "scope"), [("w6a6", "paper"), ("w4a4_g128", "paper")])
@torch.no_grad()
def test_a_decoding_step_computes_what_the_full_sequence_does(bits: str, scope: str) -> None:
    adapter = tiny("var")
    rows = calibration("var", adapter)
    recipe = named("shift_and_sum", bits, scope)
    # a large budget: many tokens have duplicates
    options = replace(recipe.options.shift_and_sum, budget=1.0)
    recipe = replace(recipe, options=type(recipe.options)(shift_and_sum=options))
    quantize_model(adapter, rows, recipe, batch=5)
    products = [m for m in adapter.model.modules() if isinstance(m, ShiftedMatMul)]
    assert len(products) == 2
    assert all(product.theta < 1 for product in products)
    assert relative(decoded(adapter, rows.rows), adapter.forward(rows.rows)) < 1e-9


def test_what_shift_and_sum_cannot_have_is_refused() -> None:
    recipe = named("shift_and_sum", "w6a6")
    rar = tiny("rar")
    with pytest.raises(ConfigError, match="^method.shift_and_sum: rar does not have it, allowed"):
        quantize_model(rar, calibration("rar", rar), recipe)
    var = tiny("var")
    dynamic = replace(recipe, changes=())
    with pytest.raises(ConfigError, match="^method.shift_and_sum: true needs values in static"):
        quantize_model(var, calibration("var", var), dynamic)
    with pytest.raises(ConfigError, match="^method.shift_and_sum: true needs values in scope"):
        named("shift_and_sum", "w6a6", "blocks")


@torch.no_grad()
def test_shift_and_sum_has_no_integer_path() -> None:
    adapter = tiny("var")
    recipe = named("shift_and_sum", "w6a6")
    with pytest.raises(ConfigError, match="^method.shift_and_sum: true has no integer path"):
        check_integer_path(adapter, recipe)
    quantize_model(adapter, calibration("var", adapter), recipe, batch=5)
    assert not find_attentions(adapter.model)
    attention = adapter.model.blocks[0].attn
    assert simulation_reason(attention.qk, attention.pv) == ShiftedMatMul.simulated


# --- attention weights, formats, rotation


def test_attention_weights_are_powers_of_two_below_the_largest() -> None:
    p = torch.softmax(3 * normal(2, 2, 6, 10), dim=-1)
    p[..., -1] = 0  # a masked key
    found = RowLog2Quantizer(16)(p)
    largest = p.amax(dim=-1, keepdim=True)
    power = -torch.log2(found / largest)
    rounded = found > 0
    torch.testing.assert_close(power[rounded], power[rounded].round())
    assert bool((found[..., -1] == 0).all())
    assert bool(((found / p)[rounded] - 1).abs().max() <= 2**0.5 - 1)
    torch.testing.assert_close(RowLog2Quantizer(16)(found), found)
    assert bool((RowLog2Quantizer(2)(p) == 0)[p < largest / 2**1.5].all())


@pytest.mark.parametrize(
    ("name", "bits", "below", "above"),
    [
        ("two_sided_int", 6, range(32), range(32)),
        ("two_sided_float", 4, range(8), (0, 0.5, 1, 1.5, 2, 3, 4, 6)),
        (
            "two_sided_float",
            6,
            range(33),
            [
                *(i / 8 for i in range(16)),
                *(i / 4 for i in range(8, 16)),
                *(i / 2 for i in range(8, 16)),
            ],
        ),
    ],
)
def test_either_side_has_its_own_grid(name: str, bits: int, below: range, above: range) -> None:
    spec = QuantSpec(bits, format=name)
    x = 2 * normal(4000).exp() - 2.5
    params = params_from_range(x.min(), x.max(), spec)
    found = simulate_format(x, params, spec)
    assert float(found.max()) == pytest.approx(float(x.max()))
    assert float(found.min()) == pytest.approx(float(x.min()))
    positive = found[found > 0] / params.scale
    negative = -found[found < 0] / params.zero_point
    for values, grid in ((positive, above), (negative, below)):
        distance = (values[:, None] - torch.tensor([float(g) for g in grid])).abs().amin(dim=1)
        assert float(distance.max()) < 1e-9
    torch.testing.assert_close(simulate_format(found, params, spec), found)
    one_sided = params_from_range(torch.tensor(0.5), torch.tensor(3.0), spec)
    assert float(one_sided.zero_point) == 1


def test_blocks_of_the_rotation_divide_the_width() -> None:
    assert [block_size(width, 128) for width in (1920, 768, 192, 48, 7)] == [128, 128, 64, 16, 1]


@torch.no_grad()
def test_the_rotation_leaves_the_model_as_it_is() -> None:
    adapter = tiny("var")
    rows = calibration("var", adapter)
    before = adapter.forward(rows.rows)
    recipe = Recipe(QuantSpec(8, granularity="out_channel"), QuantSpec(8), ("group_hadamard",))
    solution = solve_transforms(
        adapter, rows.batches(5), len(rows), recipe, lambda items, what: items
    )
    apply_transforms(adapter, recipe, solution)
    rotated = [m for m in adapter.model.modules() if isinstance(m, HadamardRotation)]
    assert len(rotated) == 4  # qkv and fc1 of two blocks
    assert_unchanged(adapter, rows.rows, before, 1e-12)


# --- recipes


def test_fc2_stays_as_it_is_under_litevar() -> None:
    adapter = tiny("var")
    weights = {name: p.clone() for name, p in adapter.model.named_parameters() if "fc2.w" in name}
    quantize_model(adapter, calibration("var", adapter), named("litevar", "w6a6"), batch=5)
    for name, weight in weights.items():
        linear = adapter.model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(linear.weight, weight)


@pytest.mark.parametrize("bits", ["fp6", "fp4_g128"])
@torch.no_grad()
def test_fpqvar_quantizes_the_blocks_alone(bits: str) -> None:
    adapter = tiny("var")
    rows = calibration("var", adapter)
    recipe = named("fpqvar", bits, "blocks")
    before = adapter.forward(rows.rows)
    quantize_model(adapter, rows, recipe, batch=5)
    assert relative(adapter.forward(rows.rows), before) < 0.5
    head = adapter.model.get_submodule("head")
    assert isinstance(head, torch.nn.Linear)


# --- resampling


def test_target_counts_are_what_is_expected_in_whole_numbers() -> None:
    probabilities = torch.softmax(2 * normal(30, 7), dim=-1)
    counts = target_counts(probabilities)
    assert int(counts.sum()) == 30
    assert bool(((counts - 30 * probabilities.mean(dim=0)).abs() < 1).all())


def test_codes_occur_as_expected_and_no_more_tokens_change_than_must() -> None:
    probabilities = torch.softmax(2 * normal(6, 5, 9), dim=-1)
    ids = made_up_ints("ids", (6, 5), 9)
    found = balance_codes(ids, probabilities, torch.Generator().manual_seed(0))
    target = target_counts(probabilities.flatten(0, 1))
    assert torch.equal(torch.bincount(found.flatten(), minlength=9), target)
    surplus = (torch.bincount(ids.flatten(), minlength=9) - target).clamp(min=0)
    assert int((found != ids).sum()) == int(surplus.sum())
    again = balance_codes(found, probabilities, torch.Generator().manual_seed(1))
    assert torch.equal(again, found)


def test_the_selector_changes_tokens_alone() -> None:
    adapter = tiny("var")
    conditional, unconditional = adapter.rows(
        made_up_ints("tokens", (6, 14), 40), made_up_ints("labels", (6,), 10)
    )
    pool = Pool(conditional, unconditional, conditional["label"])
    plain = select_rows("random", adapter, pool, 8, seed=3)
    found = select_rows("resample", adapter, pool, 8, seed=3)
    assert torch.equal(found.rows["label"], plain.rows["label"])
    assert not torch.equal(found.rows["ids"], plain.rows["ids"])
    assert found.meta["selector"] == "resample"
    selection = Selection(adapter, pool, 8, 3)
    assert torch.equal(resample_rows(selection, plain.rows)["ids"], found.rows["ids"])
    with pytest.raises(ConfigError, match="^calib.selector: resample is for var, not for rar$"):
        resample_rows(Selection(tiny("rar"), pool, 8, 3), plain.rows)
