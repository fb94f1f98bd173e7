"""OS+ centres every channel, shrinks those beyond the threshold, and takes the threshold of least
output error."""

from __future__ import annotations

import pytest
import torch

from ptq.folding import apply_transform
from ptq.methods.os_plus import OSPlusSettings as Settings
from ptq.methods.os_plus import channel_midpoints, suppression_step, threshold_grid
from ptq.numbers.numerics import params_from_range
from ptq.numbers.quantizers import StaticQuantizer, fake_quantize_weight
from ptq.options import Options
from ptq.pipeline import apply_transforms, quantize, solve_transforms
from ptq.recipe import Recipe
from ptq.types import Adapter, ConfigError, InputTransform, QuantSpec
from tests.families import FAMILIES, assert_unchanged, calibration, tiny


def recipe(*chain: str, bits: int = 4, **changes: object) -> Recipe:
    settings = Options(os_plus=Settings(steps=20, rows=4))
    weights = QuantSpec(bits, granularity="out_channel")
    return Recipe(
        weights, QuantSpec(bits), chain, sites=("qkv", "fc1"), options=settings, **changes
    )


def silent(items: object, what: str) -> object:
    return items


def solved(family: str, adapter: Adapter, how: Recipe) -> dict[str, InputTransform]:
    chosen = calibration(family, adapter)
    return solve_transforms(adapter, chosen.batches(4), len(chosen), how, silent).transforms


def test_the_grid_ends_at_the_floor_and_is_finer_for_large_activations() -> None:
    assert threshold_grid(3.0, 0.02, 100)[::99] == [3.0, pytest.approx(0.06)]
    assert len(threshold_grid(3.0, 0.02, 100)) == 100
    fine = threshold_grid(200.0, 0.02, 100)
    assert len(fine) == 400
    assert max(a - b for a, b in zip(fine, fine[1:])) < 0.5
    assert len(threshold_grid(1e-6, 0.02, 100)) == 100  # the released grid would be empty
    assert threshold_grid(0.0, 0.02, 100) == []


def test_channels_beyond_the_threshold_end_at_it_others_are_centred() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(300, 16, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 16)
        + 3
    )
    shift, half = channel_midpoints(x.amin(0), x.amax(0))
    for t in (0.5, 3.0, float(half.max())):
        step = suppression_step(shift, half, t)
        y = step(x)
        torch.testing.assert_close(y.amax(0), -y.amin(0))
        assert float(y.abs().max()) <= t * (1 + 1e-12)
        inside = half <= t
        assert torch.equal(step.scale[inside], torch.ones_like(half[inside]))
        torch.testing.assert_close(y.amax(0)[~inside], torch.full_like(half[~inside], t))


@torch.no_grad()
def test_the_threshold_has_the_least_output_error_of_the_grid() -> None:
    adapter = tiny("rar")
    seen = []
    adapter.model.blocks[0].norm2.weight[::7] *= 3  # outlier channels
    linear = adapter.model.blocks[0].mlp.fc1
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    adapter.forward(calibration("rar", adapter).batches(4)[0])
    handle.remove()
    x = seen[0].flatten(0, 1)
    lo = x.amin(0)
    hi = x.amax(0)
    shift = (lo + hi) / 2
    half = (hi - lo) / 2

    def loss(t: float) -> float:
        scale = (half / t).clamp(min=1)
        end = torch.tensor([t], dtype=torch.float64)
        spec = QuantSpec(4)
        rounded = StaticQuantizer(spec, params_from_range(-end, end, spec))((x - shift) / scale)
        weight, _ = fake_quantize_weight(
            linear.weight * scale, QuantSpec(4, granularity="out_channel", range="minmax")
        )
        return float(
            (rounded @ weight.t() - (x - shift) @ linear.weight.t()).square().sum(-1).mean()
        )

    assert float(half.max()) < 10  # no finer grid
    grid = torch.linspace(
        float(half.max()), 0.02 * float(half.max()), 20, dtype=torch.float64
    ).tolist()
    best = min(grid, key=loss)
    assert best not in (grid[0], grid[-1])
    found = solved("rar", adapter, recipe("os_plus"))["blocks.0.mlp.fc1"]
    torch.testing.assert_close(found.shift, shift)
    torch.testing.assert_close(found.scale, (half / best).clamp(min=1))


@torch.no_grad()
def test_left_out_sinks_do_not_count_for_shift_and_threshold() -> None:
    shifts = []
    for exclude in (False, True):
        adapter = tiny("rar")
        adapter.model.cls_token *= 50
        shifts.append(
            solved("rar", adapter, recipe("os_plus", exclude_sinks=exclude))[
                "blocks.0.attn.qkv"
            ].shift
        )
    adapter = tiny("rar")  # the ordinary tokens of the first block do not see the sink
    ordinary = solved("rar", adapter, recipe("os_plus", exclude_sinks=True))[
        "blocks.0.attn.qkv"
    ].shift
    torch.testing.assert_close(shifts[1], ordinary)
    assert not torch.allclose(shifts[0], shifts[1], rtol=1e-2)


def test_an_input_that_never_changes_is_only_shifted() -> None:
    adapter = tiny("mar")
    norm = adapter.model.encoder_blocks[0].norm1
    norm.weight.zero_()
    found = solved("mar", adapter, recipe("os_plus"))["encoder_blocks.0.attn.qkv"]
    torch.testing.assert_close(found.shift, norm.bias.detach())
    assert bool((found.scale == 1).all())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@torch.no_grad()
def test_without_quantizers_the_model_is_unchanged(
    family: str, dtype: torch.dtype, bound: float
) -> None:
    adapter = tiny(family, dtype)
    chosen = calibration(family, adapter)
    how = recipe("smoothquant", "os_plus")
    before = adapter.forward(chosen.rows)
    weights = adapter.model.state_dict()
    weights = {k: v.clone() for k, v in weights.items()}
    solution = solve_transforms(adapter, chosen.batches(4), len(chosen), how, silent)
    assert len(solution.transforms) == sum(s.kind in ("qkv", "fc1") for s in adapter.sites)
    assert all(t.shift.any() and (t.scale != 1).any() for t in solution.transforms.values())
    # the search leaves no trace
    assert all(torch.equal(v, weights[k]) for k, v in adapter.model.state_dict().items())
    apply_transforms(adapter, how, solution)
    assert_unchanged(adapter, chosen.rows, before, bound)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_on_outlier_channels_os_plus_is_better_than_rounding_alone(family: str) -> None:
    errors = []
    for chain in ((), ("os_plus",)):
        adapter = tiny(family)
        for site in adapter.sites:
            # what is folded the other way makes outlier channels with an offset
            if site.kind in ("qkv", "fc1"):
                outlier = torch.arange(48) % 16 == 3
                scale = torch.where(outlier, 1 / 30, 1.0).double()
                apply_transform(
                    adapter.model,
                    site,
                    InputTransform(scale, torch.where(outlier, -2.0, 0.0).double()),
                )
        chosen = calibration(family, adapter)
        before = adapter.forward(chosen.rows)
        quantize(adapter, chosen, recipe(*chain, bits=6), batch=4)
        errors.append(float((adapter.forward(chosen.rows) - before).square().mean()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"floor": 0.0}, "floor: 0.0 is not a number above 0 and below 1"),
        ({"floor": 1.0}, "floor: 1.0 is not a number above 0 and below 1"),
        ({"steps": 0}, "steps: 0 is not an integer from 1 to 100000"),
        ({"rows": 0}, "rows: 0 is not an integer from 1 to 100000"),
    ],
)
def test_settings_are_checked(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^method.options.os_plus.{said}$"):
        Settings(**changes)
