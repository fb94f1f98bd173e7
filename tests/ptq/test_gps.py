"""GPS minimises the error it models, helps the real layer, and its reciprocal does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq.gps import (
    GPS,
    U_MAX,
    U_MIN,
    Energies,
    error_energies,
    gps_transform,
    optimal_ratio,
    widest_channel,
)
from ptq.methods.shift import symmetric_shift
from ptq.methods.smoothquant import smoothquant_step
from ptq.methods.solver import Problem
from ptq.numbers.numerics import NonFiniteError, fake_quantize
from ptq.numbers.quantizers import choose_qparams, fake_quantize_weight
from ptq.pipeline import solve_transforms
from ptq.recipe import Recipe
from ptq.types import ConfigError, QuantSpec, Site
from tests.families import calibration, tiny

KINDS = ("outlier", "lognormal")


def layer(kind: str, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs (512, 96) with channels of very different size, and weights (64, 96)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 96, generator=generator, dtype=dtype)
    sizes = {
        "outlier": torch.where(torch.arange(96) % 16 == 3, 25.0, 1.0),
        "lognormal": torch.randn(96, generator=generator).exp(),
        "gaussian": torch.rand(96, generator=generator) + 0.5,
    }[kind]
    weight = torch.randn(64, 96, generator=generator, dtype=dtype) / 96**0.5
    return x * sizes.to(dtype), weight


def specs(bits: int) -> tuple[QuantSpec, QuantSpec]:
    return QuantSpec(bits), QuantSpec(bits, granularity="out_channel")


def energies_of(x: Tensor, weight: Tensor, bits: int, form: str = "squares") -> Energies:
    activations, weights = specs(bits)
    k, _ = widest_channel(x)
    return error_energies(
        x,
        weight,
        fake_quantize_weight(weight, weights)[0],
        choose_qparams(x[:, k], activations),
        2**bits,
        form,
    )


def quantized_output(x: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    activations, weights = specs(bits)
    x = x / scale
    return (
        fake_quantize(x, choose_qparams(x, activations), 2**bits)
        @ fake_quantize_weight(weight * scale, weights)[0].t()
    )


def output_error(x: Tensor, weight: Tensor, scale: Tensor, bits: int) -> float:
    return float((quantized_output(x, weight, scale, bits) - x @ weight.t()).square().mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_gps_minimises_the_modelled_loss_of_every_channel_on_a_dense_grid(
    kind: str, bits: int
) -> None:
    x, weight = layer(kind, bits)
    e = energies_of(x, weight, bits)
    u = optimal_ratio(e, "squares")
    free = torch.arange(96) != e.anchor
    assert bool(((u > U_MIN) & (u < U_MAX))[free].all())  # no bound is active
    grid = torch.logspace(math.log2(U_MIN), math.log2(U_MAX), 5001, base=2, dtype=torch.float64)
    losses = torch.stack([e.loss(v.expand(96)) for v in grid])
    assert bool((e.loss(u) <= losses.min(dim=0).values * (1 + 1e-12))[free].all())
    nearest = grid[losses.argmin(dim=0)]
    torch.testing.assert_close(u[free], nearest[free], rtol=0.005, atol=0)
    torch.testing.assert_close(
        e.loss(u)[free], 2 * (e.activation_error * e.weight_error).sqrt()[free]
    )
    torch.testing.assert_close(gps_transform(x, weight, *specs(bits)).scale, e.anchor_scale * u)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("seed", range(3))
def test_gps_beats_no_scaling_and_the_reciprocal_loses(kind: str, bits: int, seed: int) -> None:
    x, weight = layer(kind, seed)
    e = energies_of(x, weight, bits)
    u = optimal_ratio(e, "squares")
    modelled = [float(e.loss(v).sum()) for v in (u, torch.ones_like(u), 1 / u)]
    real = [output_error(x, weight, v, bits) for v in (u, torch.ones_like(u), 1 / u)]
    assert modelled[0] < modelled[1] < modelled[2]
    assert real[0] < 0.7 * real[1]
    assert real[1] < real[2]


def test_the_reciprocal_is_never_better_than_no_scaling() -> None:
    a, b = (
        torch.randn(2, 100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        .mul(4)
        .exp()
    )
    e = Energies(a, b, 0, 1.0)
    assert bool((e.loss((a / b).pow(0.25)) >= e.loss(torch.ones_like(a)) * (1 - 1e-12)).all())


@pytest.mark.parametrize("factor", [4.0, 1 / 256, 37.0])
def test_a_common_factor_of_the_scale_leaves_the_quantized_layer_alone(factor: float) -> None:
    x, weight = layer("lognormal", 0)
    scale = gps_transform(x, weight, *specs(6)).scale
    once, other = (quantized_output(x, weight, s, 6) for s in (scale, factor * scale))
    torch.testing.assert_close(once, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", ["squares", "eq16"])
def test_permuting_the_channels_permutes_the_scale(form: str) -> None:
    x, weight = layer("outlier", 1)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(2))
    plain, permuted = (
        gps_transform(a, w, *specs(6), form).scale
        for a, w in ((x, weight), (x[:, order], weight[:, order]))
    )
    torch.testing.assert_close(permuted, plain[order])


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("seed", range(3))
def test_on_gaussian_layers_the_ratio_is_the_root_of_rms_over_rms(bits: int, seed: int) -> None:
    x, weight = layer("gaussian", seed)
    weight = weight * (
        torch.rand(96, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    )
    e = energies_of(x, weight, bits)
    free = torch.arange(96) != e.anchor
    balance = (x.square().mean(0).sqrt() / weight.square().mean(0).sqrt()).sqrt().log()
    correlation = np.corrcoef(optimal_ratio(e, "squares").log()[free], balance[free])[0, 1]
    assert correlation > 0.9


def test_eq16_is_the_root_of_a_ratio_of_sums_with_the_unrounded_weight() -> None:
    x, weight = layer("lognormal", 4)
    activations, weights = specs(6)
    k = int((x.amax(0) - x.amin(0)).argmax())
    dx = (fake_quantize(x, choose_qparams(x[:, k], activations), 64) - x).numpy()
    dw = (fake_quantize_weight(weight, weights)[0] - weight).numpy()
    u = np.empty(96)
    for i in range(96):
        up = sum(abs(dw[o, i]) for o in range(64)) * sum(abs(v) for v in x[:, i].numpy())
        down = sum(abs(weight[o, i].item()) for o in range(64)) * sum(abs(v) for v in dx[:, i])
        u[i] = math.sqrt(up / down)
    u[k] = 1
    range_x, range_w = (float(v[:, k].max() - v[:, k].min()) for v in (x, weight))
    found = gps_transform(x, weight, activations, weights, "eq16").scale.numpy()
    np.testing.assert_allclose(found, math.sqrt(range_x / range_w) * u, rtol=1e-9)
    assert not np.allclose(
        found, gps_transform(x, weight, activations, weights).scale.numpy(), rtol=0.01
    )


@pytest.mark.parametrize("form", ["squares", "eq16"])
def test_dead_channels_and_vanishing_errors_leave_finite_positive_scales(form: str) -> None:
    x, weight = layer("outlier", 0, torch.float32)
    dead = x.clone()
    dead[:, 5] = 0
    dead[:, 6] = 3.0
    no_column = weight.clone()
    no_row = weight.clone()
    no_column[:, 7] = 0
    no_row[3] = 0
    cases = [
        (dead, weight),
        (x, no_column),
        (dead, no_column),
        (x, no_row),
        (x, torch.zeros_like(weight)),
        (torch.zeros_like(x), weight),
        (torch.ones_like(x), weight),
        (x.abs() + 5, no_column),
        (x[:1], weight[:1]),
        (x[:, :1], weight[:, :1]),
        (1e-20 * x, 1e-20 * weight),
        (1e15 * x, weight),
    ]
    for a, w in cases:
        scale = gps_transform(a, w, *specs(6), form).scale
        assert bool((scale.isfinite() & (scale > 0)).all())
        assert scale.max() / scale.min() <= U_MAX / U_MIN * (1 + 1e-6)


def test_no_error_keeps_the_ratio_one_and_one_sided_errors_stop_at_bounds() -> None:
    e = Energies(torch.tensor([1.0, 0.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 3.0, 0.0]), 0, 1.0)
    assert optimal_ratio(e, "squares").tolist() == [1.0, 1.0, U_MAX, U_MIN]


def test_an_unknown_form_and_non_finite_inputs_are_refused() -> None:
    x, weight = layer("outlier", 0)
    with pytest.raises(ConfigError, match="^method.gps_form: 'cubes' is not one of squares, eq16$"):
        gps_transform(x, weight, *specs(6), "cubes")
    for position in ((0, 3), (0, 4)):
        bad = x.clone()
        bad[position] = math.nan
        with pytest.raises(NonFiniteError):
            gps_transform(bad, weight, *specs(6))
    weight[0, 0] = math.inf
    with pytest.raises(NonFiniteError):
        gps_transform(x, weight, *specs(6))


@pytest.mark.parametrize(("observer", "tolerance"), [("exact", 1e-12), ("histogram", 1e-2)])
@pytest.mark.parametrize("form", ["squares", "eq16"])
@torch.no_grad()
def test_a_site_is_solved_from_its_inputs_in_parts(
    observer: str, tolerance: float, form: str
) -> None:
    x, weight = layer("outlier", 3)
    x[:56, 5] *= 100  # the widest channel, but not of the last part
    how = Recipe(specs(6)[1], QuantSpec(6, observer=observer), ("gps",), gps_form=form)
    solver = GPS(Problem(Site("fc1", "fc1", ("fc1",)), weight, how, rows=64))
    parts = x.view(64, 8, 96).split([7, 30, 1, 26])
    passes = 0
    assert int(widest_channel(x)[0]) != int(widest_channel(parts[-1].flatten(0, 1))[0])
    done = False
    while not done:
        for part in parts:
            solver.update(part)
        solver.update(x[:0])
        done = solver.end_pass()
        passes = passes + 1
    assert passes == (4 if observer == "exact" else 3)
    expected = gps_transform(x, weight, *specs(6), form=form)
    torch.testing.assert_close(solver.solve().scale, expected.scale, rtol=tolerance, atol=0)


@pytest.mark.parametrize("family", ["var", "rar", "par", "mar"])
@pytest.mark.parametrize("name", ["smoothquant", "shift", "gps"])
@torch.no_grad()
def test_sink_tokens_are_left_out_where_the_recipe_says_so(family: str, name: str) -> None:
    adapter, (activations, weights), found = tiny(family), specs(6), {}
    chosen = calibration(family, adapter)
    site = next(s for s in adapter.sites if s.kind == "qkv" and s.sinks)
    seen: list[Tensor] = []
    linear = adapter.model.get_submodule(site.consumers[0])
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    adapter.forward(chosen.rows)
    handle.remove()
    weight = torch.cat(
        [adapter.model.get_submodule(consumer).weight for consumer in site.consumers]
    )
    for exclude in (True, False):
        how = Recipe(weights, activations, (name,), sites=("qkv",), exclude_sinks=exclude)
        solution = solve_transforms(
            adapter, chosen.batches(4), len(chosen), how, lambda items, what: items
        )
        x = torch.cat([part[:, site.sinks if exclude else 0 :].flatten(0, 1) for part in seen])
        expected = {
            "smoothquant": lambda x=x: smoothquant_step(x, weight),
            "shift": lambda x=x: symmetric_shift(x, activations),
            "gps": lambda x=x: gps_transform(x, weight, activations, weights),
        }[name]()
        found[exclude] = solution.transforms[site.name]
        torch.testing.assert_close(found[exclude].scale, expected.scale, rtol=1e-9, atol=0)
        torch.testing.assert_close(found[exclude].shift, expected.shift, rtol=1e-9, atol=1e-12)
    assert not all(
        torch.equal(getattr(found[True], p), getattr(found[False], p)) for p in ("scale", "shift")
    )
