"""RepQ: one quantizer after the step does what a quantizer per channel does before it; the model
stays the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from ptq.activations import quantizer_slots
from ptq.methods.repq import RepQ, effective_params, shared_quantizer
from ptq.methods.repq import RepQSettings as Settings
from ptq.methods.solver import Problem
from ptq.numbers.numerics import QParams, fake_quantize
from ptq.numbers.quantizers import StaticQuantizer, choose_qparams
from ptq.options import Options
from ptq.pipeline import Solution, apply_transforms, quantize, solve_transforms
from ptq.recipe import Recipe
from ptq.stwq import TokenStaticQuantizer
from ptq.types import Adapter, ConfigError, QuantSpec, Site
from tests.families import FAMILIES, assert_unchanged, calibration, decoded, relative, tiny

LEVELS = 64


def recipe(
    *chain: str, observer: str = "exact", softmax: str = "log_sqrt2", **changes: object
) -> Recipe:
    specs = QuantSpec(6, granularity="out_channel"), QuantSpec(6, observer=observer)
    return Recipe(*specs, chain, sites=("qkv", "fc1"), softmax=softmax, **changes)


def silent(items: object, what: str) -> object:
    return items


def solved(family: str, adapter: Adapter, how: Recipe) -> Solution:
    chosen = calibration(family, adapter)
    return solve_transforms(adapter, chosen.batches(5), len(chosen), how, silent)


def inputs(seed: int = 0) -> Tensor:
    """(400, 24) channels of different sizes and offsets, some of them far from zero."""
    normal = partial(
        torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return normal(400, 24) * torch.logspace(-2, 1, 24).double() + 5 * normal(24)


@pytest.mark.parametrize("seed", range(3))
def test_the_common_quantizer_does_to_each_channel_what_its_own_does(seed: int) -> None:
    x = inputs(seed)
    own = choose_qparams(x, QuantSpec(6, granularity="in_channel"))
    step, params = shared_quantizer(own, x.amin(0), LEVELS, Settings())
    together = fake_quantize(step(x), params, LEVELS) * step.scale + step.shift
    torch.testing.assert_close(together, fake_quantize(x, own, LEVELS), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(params.scale, own.scale.mean()[None])
    assert float(params.zero_point) == float(own.zero_point.mean().round().clamp(0, LEVELS - 1))
    assert float(own.scale.max() / own.scale.min()) > 100


def test_a_mean_zero_point_inside_the_codes_is_only_rounded() -> None:
    own = QParams(torch.tensor([0.5, 1.0, 3.0]), torch.tensor([10.0, 20.0, 31.0]))
    step, params = shared_quantizer(own, torch.zeros(3), LEVELS, Settings())
    assert (float(params.scale), float(params.zero_point)) == (1.5, 20.0)
    torch.testing.assert_close(step.scale, own.scale / 1.5)
    torch.testing.assert_close(step.shift, own.scale * (20 - own.zero_point))


def test_ratios_stay_in_bounds_and_lower_ends_still_meet() -> None:
    own = QParams(torch.tensor([1e-9, 1.0, 1.0, 1e5]), torch.tensor([3.0, 30.0, 40.0, 7.0]))
    step, params = shared_quantizer(own, torch.zeros(4), LEVELS, Settings(0.01, 2.0))
    assert [round(s, 6) for s in step.scale.tolist()] == [0.01, 0.01, 0.01, 2.0]
    ends = step(-own.zero_point * own.scale)
    torch.testing.assert_close(ends, (-params.zero_point * params.scale).expand(4))


@pytest.mark.parametrize("value", [0.0, -3.5])
def test_a_constant_channel_is_shifted_to_zero_and_counts_for_nothing(value: float) -> None:
    x = inputs()
    x[:, 5] = value
    own = effective_params(
        choose_qparams(x, QuantSpec(6, granularity="in_channel")), x.amin(0), x.amax(0), LEVELS
    )
    assert float(own.scale[5]) == 0
    step, params = shared_quantizer(own, x.amin(0), LEVELS, Settings())
    others = torch.arange(24) != 5
    rest, rest_params = shared_quantizer(own[others], x.amin(0)[others], LEVELS, Settings())
    assert (float(step.scale[5]), float(step.shift[5])) == (1.0, value)
    torch.testing.assert_close((step.scale[others], step.shift[others]), (rest.scale, rest.shift))
    assert torch.equal(params.scale, rest_params.scale)
    dead = shared_quantizer(
        QParams(torch.zeros(2), torch.zeros(2)), torch.tensor([1.0, 2.0]), LEVELS, Settings()
    )
    assert (dead[0].shift.tolist(), dead[0].scale.tolist()) == ([1, 2], [1, 1])
    assert (float(dead[1].scale), float(dead[1].zero_point)) == (1, 0)


def test_a_channel_that_is_rarely_not_constant_gets_a_step_of_its_extent() -> None:
    x = inputs()[:, :8].repeat(300, 1)
    x[:, 5] = 0
    x[7, 5] = 0.3  # beyond every percentile
    spec = QuantSpec(6, granularity="in_channel")
    assert float(choose_qparams(x, spec).scale[5]) > 0.02  # of a range without extent: arbitrary
    own = effective_params(choose_qparams(x, spec), x.amin(0), x.amax(0), LEVELS)
    assert float(own.scale[5]) == pytest.approx(0.3 / 63)
    assert float(own.zero_point[5]) == 0
    others = torch.arange(8) != 5
    assert torch.equal(own.scale[others], choose_qparams(x, spec).scale[others])


@pytest.mark.parametrize("observer", ["exact", "histogram"])
@torch.no_grad()
def test_a_site_is_solved_from_its_inputs_in_parts(observer: str) -> None:
    how = recipe("repq", observer=observer)
    x = inputs().view(40, 10, 24)
    solver = RepQ(
        Problem(Site("fc1", "fc1", ("fc1",)), torch.ones(8, 24, dtype=torch.float64), how, rows=40)
    )
    for _ in range(2 if observer == "exact" else 1):
        for part in x.split(7):
            solver.update(part)
        solver.update(x[:0])
        done = solver.end_pass()
    assert done
    own = choose_qparams(x, QuantSpec(6, granularity="in_channel"))
    step, params = shared_quantizer(own, x.flatten(0, 1).amin(0), LEVELS, Settings())
    tolerance = 1e-12 if observer == "exact" else 0.05
    torch.testing.assert_close(solver.solve().scale, step.scale, rtol=tolerance, atol=0)
    torch.testing.assert_close(solver.input_params().scale, params.scale, rtol=tolerance, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chain", [("repq",), ("smoothquant", "repq")], ids="+".join)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@torch.no_grad()
def test_without_quantizers_the_model_is_unchanged(
    family: str, chain: tuple[str, ...], dtype: torch.dtype, bound: float
) -> None:
    adapter = tiny(family, dtype)
    chosen = calibration(family, adapter)
    how = recipe(*chain)
    before = adapter.forward(chosen.rows)
    solution = solved(family, adapter, how)
    assert all(t.shift.any() and t.scale.std() > 0.01 for t in solution.transforms.values())
    apply_transforms(adapter, how, solution)
    assert_unchanged(adapter, chosen.rows, before, bound)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sites_keep_the_fixed_quantizer_weights_are_rounded_afterwards(family: str) -> None:
    adapter = tiny(family)
    how = recipe("repq")
    solution = solved(family, tiny(family), how)
    chosen = calibration(family, adapter)
    quantize(adapter, chosen, how, batch=5)
    sites = [s for s in adapter.sites if s.kind in ("qkv", "fc1")]
    assert set(solution.input_params) == {s.name for s in sites}
    for site in sites:
        fixed = solution.input_params[site.name]
        for name in site.consumers:
            quantizer = adapter.model.get_submodule(name).input
            assert isinstance(quantizer, StaticQuantizer)
            assert (quantizer.scale, quantizer.zero_point) == (fixed.scale, fixed.zero_point)
        first = adapter.model.get_submodule(site.name)
        raw = (
            tiny(family).model.get_submodule(site.name).weight
            * solution.transforms[site.name].scale
        )
        torch.testing.assert_close(
            first.weight_params.scale, choose_qparams(raw, how.weights).scale
        )


@torch.no_grad()
def test_under_token_wise_quantization_the_ranges_are_calibrated_again() -> None:
    adapter = tiny("rar")
    how = recipe("repq", stwq=True, exclude_sinks=True)
    quantize(adapter, calibration("rar", adapter), how, batch=5)
    quantizer = adapter.model.blocks[0].attn.qkv.input
    assert isinstance(quantizer, TokenStaticQuantizer)
    assert len(quantizer.scale) == 3


@pytest.mark.parametrize("stwq", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_smoothquant_before_repq_cancels(family: str, stwq: bool) -> None:
    outputs = []
    for chain in (("repq",), ("smoothquant", "repq")):
        adapter = tiny(family)
        chosen = calibration(family, adapter)
        quantize(adapter, chosen, recipe(*chain, stwq=stwq), batch=5)
        outputs.append(adapter.forward(chosen.rows))
    assert relative(outputs[1], outputs[0]) < 1e-9


@torch.no_grad()
def test_a_later_step_makes_the_fixed_quantizer_void() -> None:
    assert not solved("rar", tiny("rar"), recipe("repq", "shift")).input_params


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attention_weights_alone_take_the_format_of_the_softmax(family: str) -> None:
    for softmax in ("int", "log_sqrt2"):
        adapter = tiny(family)
        how = recipe("repq", softmax=softmax)
        apply_transforms(adapter, how, solved(family, adapter, how))
        formats = {slot.label: slot.spec.format for slot in quantizer_slots(adapter, how)}
        expected = (
            {f"{p.name}.a" for p in adapter.matmuls if p.kind == "pv"}
            if softmax == "log_sqrt2"
            else set()
        )
        assert {label for label, word in formats.items() if word == "log_sqrt2"} == expected
        assert set(formats.values()) <= {"int", "log_sqrt2"}


@torch.no_grad()
def test_attention_sees_powers_of_the_root_of_two() -> None:
    adapter = tiny("rar")
    quantize(adapter, calibration("rar", adapter), recipe("repq"), batch=5)
    pv = adapter.model.blocks[1].attn.pv
    seen = []
    handle = pv.a.register_forward_hook(lambda module, args, output: seen.append(output))
    stepwise = decoded(adapter, calibration("rar", adapter).rows)
    whole = seen.copy()
    seen.clear()
    full = adapter.forward(calibration("rar", adapter).rows)
    handle.remove()
    assert relative(stepwise, full) < 1e-9
    for p in (*whole, *seen):
        powers = -2 * (p[p > 0] / pv.a.scale).log2()
        assert float((powers - powers.round()).abs().max()) < 1e-9
        assert float(p.max()) <= float(pv.a.scale)


def test_settings_are_checked() -> None:
    with pytest.raises(
        ConfigError, match=r"^method.options.repq.lowest: 0 is not a number above 0"
    ):
        Settings(lowest=0)
    with pytest.raises(
        ConfigError, match=r"^method.options.repq.lowest: 2.0 is not at most 1.0, the highest$"
    ):
        Settings(2.0, 1.0)
    assert Options().repq == Settings(1e-3, 1e3)
