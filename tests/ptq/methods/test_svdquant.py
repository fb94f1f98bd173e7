"""SVDQuant changes nothing with quantizers off, takes the best smoothing of its grid, and stops
where it should."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq import folding
from ptq.methods.probe import Judge
from ptq.methods.solver import Problem
from ptq.methods.svdquant import (
    SVDQuant,
    exponent_grid,
    gram_matrix,
    leading_eigenvectors,
    project_onto,
    smoothing_step,
    truncated_svd,
)
from ptq.methods.svdquant import SVDQuantSettings as Settings
from ptq.modules import QuantLinear
from ptq.numbers.quantizers import DynamicQuantizer, fake_quantize_weight
from ptq.options import Options
from ptq.pipeline import apply_transforms, quantize, solve_transforms
from ptq.recipe import KINDS, Recipe
from ptq.sites import Scope
from ptq.types import Adapter, ConfigError, InputTransform, LowRank, QuantSpec
from tests.families import FAMILIES, calibration, decoded, relative, tiny

SHORT = Settings(rank=6, iterations=1, grid=False)
FULL = Settings(rank=6, iterations=4, rows=4)


def recipe(*chain: str, svd: Settings = SHORT, bits: int = 6, **changes: object) -> Recipe:
    """Everything in scope, activations per token unless `activations` says otherwise."""
    given = {
        "scope": Scope(KINDS),
        "activations": QuantSpec(bits, granularity="token_dynamic"),
        **changes,
    }
    return Recipe(
        QuantSpec(bits, granularity="out_channel"),
        transforms=chain,
        options=Options(svd=svd),
        **given,
    )


def solved(adapter: Adapter, family: str, how: Recipe) -> dict[str, InputTransform]:
    chosen = calibration(family, adapter)
    solution = solve_transforms(
        adapter, chosen.batches(4), len(chosen), how, lambda items, what: items
    )
    apply_transforms(adapter, how, solution)
    return solution.transforms


# --- the decomposition


def product(branch: LowRank) -> Tensor:
    return branch.up @ branch.down


@pytest.mark.parametrize("shape", [(40, 96), (96, 40), (50, 50)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_the_branch_is_the_truncated_svd(
    shape: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        dtype
    )
    u, s, v = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    branch = truncated_svd(weight, 8)
    assert (branch.down.shape, branch.up.shape) == ((8, shape[1]), (shape[0], 8))
    assert branch.down.dtype == branch.up.dtype == dtype
    np.testing.assert_allclose(
        product(branch).double().numpy(), (u[:, :8] * s[:8]) @ v[:8], rtol=0, atol=bound
    )


@pytest.mark.parametrize(
    ("shape", "rank"), [((40, 96), 20), ((6, 96), 3), ((96, 7), 3), ((2, 2), 1)]
)
def test_the_rank_is_at_most_half_of_the_smaller_side(shape: tuple[int, int], rank: int) -> None:
    branch = truncated_svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 32)
    assert branch.down.shape == (rank, shape[1])


def test_a_single_row_has_no_branch_and_a_small_rank_nothing_left() -> None:
    assert truncated_svd(torch.ones(1, 50), 32) is None
    weight = torch.outer(torch.arange(20.0), torch.ones(30)).double()
    torch.testing.assert_close(product(truncated_svd(weight, 2)), weight)


def wide_matrices(count: int = 200) -> dict[str, Tensor]:
    """Weights (n, 2 n) whose singular values fall slowly, fast, after outliers, to nothing, are
    nothing, and equal."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(count, 2 * count, generator=generator, dtype=torch.float64)
    spread = torch.randn(2 * count, generator=generator, dtype=torch.float64)
    outliers = torch.where(spread.abs() > 2.5, 1e4, 1.0)
    u, _, v = torch.linalg.svd(flat, full_matrices=False)
    plateau = torch.where(torch.arange(count) < 8, 1.02, 1.0).double()
    return {
        "flat": flat,
        "spread": flat * (2 * spread).exp(),
        "outliers": flat * outliers,
        "low rank": flat[:, :5] @ flat[:5],
        "zero": 0 * flat,
        "plateau": u * plateau @ v,
    }


@pytest.mark.parametrize("tall", [False, True])
def test_branches_found_together_are_nearly_the_best(tall: bool) -> None:
    weights = {name: w.t() if tall else w for name, w in wide_matrices().items()}
    bases = leading_eigenvectors(torch.stack([gram_matrix(w) for w in weights.values()]), 8)
    for (name, weight), basis in zip(weights.items(), bases):
        remainder = float((weight - product(project_onto(weight, basis))).norm())
        least = float((weight - product(truncated_svd(weight, 8))).norm())
        bound = 2e-3 if name == "plateau" else 1e-4
        assert remainder == pytest.approx(least, rel=bound, abs=1e-9 * float(weight.norm())), name
    assert torch.equal(
        bases, leading_eigenvectors(torch.stack([gram_matrix(w) for w in weights.values()]), 8)
    )


def test_in_small_spaces_branches_found_together_are_exact() -> None:
    weights = [
        torch.randn(40, 96, generator=torch.Generator().manual_seed(n)).double() for n in range(3)
    ]
    for weight, basis in zip(
        weights, leading_eigenvectors(torch.stack([gram_matrix(w) for w in weights]), 8)
    ):
        torch.testing.assert_close(
            product(project_onto(weight, basis)), product(truncated_svd(weight, 8))
        )


# --- exactness


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chain", [("svd",), ("smoothquant", "shift", "gps", "svd")], ids="+".join)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@torch.no_grad()
def test_without_quantizers_the_model_stays_the_same(
    family: str, chain: tuple[str, ...], dtype: torch.dtype, bound: float
) -> None:
    adapter = tiny(family, dtype)
    rows = calibration(family, adapter).rows
    before = adapter.forward(rows)
    stepwise = decoded(adapter, rows)
    transforms = solved(adapter, family, recipe(*chain))
    assert transforms.keys() == {site.name for site in adapter.sites}
    for site in adapter.sites:
        outputs = len(transforms[site.name].low_rank.up)
        channels = len(transforms[site.name].scale)
        for linear in map(adapter.model.get_submodule, site.consumers):
            assert linear.down.shape == (min(6, outputs // 2, channels // 2), channels)
            assert len(linear.up) == len(linear.weight)
            assert (linear.transform is None) == (site.fold is not None)
    assert relative(adapter.forward(rows), before) < bound
    if stepwise is not None:
        assert relative(decoded(adapter, rows), stepwise) < bound


@pytest.mark.parametrize("family", ["var", "rar"])
@torch.no_grad()
def test_a_fold_into_a_linear_must_not_forget_its_branch(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weight_alone(linear: torch.nn.Module, rows: slice, scale: Tensor) -> None:
        linear.weight[rows] /= scale[:, None]

    monkeypatch.setattr(folding, "_divide_rows", weight_alone)
    adapter = tiny(family)
    rows = calibration(family, adapter).rows
    before = adapter.forward(rows)
    solved(adapter, family, recipe("svd"))
    assert relative(adapter.forward(rows), before) > 1e-2


@torch.no_grad()
def test_applying_a_solution_leaves_it_as_it_is() -> None:
    adapter = tiny("rar")
    how = recipe("svd")
    chosen = calibration("rar", adapter)
    solution = solve_transforms(
        adapter, chosen.batches(4), len(chosen), how, lambda items, what: items
    )
    before = {
        name: transform.low_rank.up.clone() for name, transform in solution.transforms.items()
    }
    apply_transforms(adapter, how, solution)
    projection = "blocks.0.adaLN_modulation.1"
    # qkv and fc1 fold into it
    assert not torch.equal(adapter.model.get_submodule(projection).up, before[projection])
    for name, up in before.items():
        assert torch.equal(solution.transforms[name].low_rank.up, up)


# --- smoothing and iterations


def test_the_grid_is_the_official_one() -> None:
    pairs = exponent_grid()
    assert len(pairs) == len(set(pairs)) == 39
    assert pairs[0] == (0, 0)
    assert {(0.5, 0.5), (0.5, 0.0), (0.05, 0.95), (0.95, 0.0)} < set(pairs)
    assert all(b in (0, 1 - a) and 0 <= a < 1 for a, b in pairs)


def test_smoothing_divides_powers_of_the_largest_input_and_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    peaks = torch.rand(12, generator=generator) + 0.1
    weight = torch.randn(7, 12, generator=generator)
    expected = peaks.numpy() ** 0.3 / np.abs(weight.numpy()).max(0) ** 0.7
    np.testing.assert_allclose(
        smoothing_step(peaks, weight, 0.3, 0.7).scale.numpy(), expected, rtol=1e-5
    )
    assert smoothing_step(peaks, weight, 0.0, 0.0).is_diagonal_identity()
    dead = smoothing_step(0 * peaks, 0 * weight, 0.5, 0.5).scale
    assert bool((dead.isfinite() & (dead > 0)).all())


def one_site(family: str, kind: str, how: Recipe) -> tuple[SVDQuant, Judge]:
    """A solver that has seen all rows of the first site of a kind, and its judge."""
    adapter = tiny(family)
    site = next(s for s in adapter.sites if s.kind == kind)
    chosen = calibration(family, adapter)
    weight = torch.cat([adapter.model.get_submodule(name).weight for name in site.consumers])
    identity = InputTransform.identity(weight.shape[1], weight)

    def probe(rows: int, spread: bool = False) -> Judge:
        return Judge(adapter, site, identity, chosen.batches(4), how.exclude_sinks, rows, spread)

    solver = SVDQuant(Problem(site, weight, how, len(chosen), probe))
    everything = probe(len(chosen))
    for x in everything.inputs:
        solver.update(x)
    assert solver.end_pass()
    return solver, probe(how.options.svd.rows)


def loss(solver: SVDQuant, judge: Judge, step: InputTransform) -> float:
    rounded, _ = fake_quantize_weight(step.on_weight(solver.weight), solver.recipe.weights)
    return float(judge(step, rounded, DynamicQuantizer(solver.recipe.activations)))


@pytest.mark.parametrize(
    ("family", "kind"), [("var", "qkv"), ("rar", "fc2"), ("par", "fc1"), ("mar", "diffusion")]
)
@torch.no_grad()
def test_the_smoothing_has_the_least_output_error_of_the_grid(family: str, kind: str) -> None:
    solver, judge = one_site(family, kind, recipe("svd", bits=4, svd=replace(FULL, iterations=1)))
    chosen = solver.solve()
    losses = []
    for a, b in exponent_grid():
        step = smoothing_step(solver.peaks, solver.weight, a, b)
        branch = truncated_svd(step.on_weight(solver.weight), 6)
        losses.append(loss(solver, judge, replace(step, low_rank=branch)))
    assert loss(solver, judge, chosen) == pytest.approx(min(losses), rel=1e-9)
    assert min(losses) < 0.98 * losses[0]
    assert len(set(losses)) > 30


@pytest.mark.parametrize(
    ("family", "kind"), [("var", "qkv"), ("rar", "fc1"), ("par", "fc1"), ("mar", "proj")]
)
@torch.no_grad()
def test_iterations_alternate_and_stop_at_the_first_that_is_no_better(
    family: str, kind: str
) -> None:
    solver, judge = one_site(
        family, kind, recipe("svd", bits=4, svd=replace(FULL, grid=False, iterations=100))
    )
    step = smoothing_step(solver.peaks, solver.weight, 0.5, 0.5)
    smooth = step.on_weight(solver.weight)
    rounded = torch.zeros_like(solver.weight)
    losses = []
    branches = []
    while len(losses) < 2 or losses[-1] < losses[-2]:
        branches.append(truncated_svd(smooth - rounded, 6))
        rounded, _ = fake_quantize_weight(smooth - product(branches[-1]), solver.recipe.weights)
        tried = replace(step, low_rank=branches[-1])
        losses.append(float(judge(tried, rounded, DynamicQuantizer(solver.recipe.activations))))
    found = solver.solve()
    torch.testing.assert_close(product(found.low_rank), product(branches[-2]))
    assert loss(solver, judge, found) == pytest.approx(losses[-2], rel=1e-9)
    once = recipe("svd", bits=4, svd=replace(FULL, grid=False, iterations=1))
    capped = SVDQuant(replace(solver.problem, recipe=once))
    capped.peaks = solver.peaks
    torch.testing.assert_close(product(capped.solve().low_rank), product(branches[0]))


@torch.no_grad()
def test_alternating_helps_some_site() -> None:
    gains = []
    for kind in ("qkv", "proj", "fc1", "fc2"):
        solver, judge = one_site(
            "rar", kind, recipe("svd", bits=4, svd=replace(FULL, grid=False, iterations=100))
        )
        once = solver.with_branch(solver.smoothings()[0], torch.zeros_like(solver.weight))
        gains.append(loss(solver, judge, solver.solve()) / loss(solver, judge, once))
    assert max(gains) <= 1 + 1e-12
    assert min(gains) < 0.97


def test_one_candidate_and_one_iteration_need_no_judge() -> None:
    problem = Mock(weight=torch.eye(8, dtype=torch.float64), recipe=recipe("svd"))
    solver = SVDQuant(problem)
    solver.update(torch.ones(2, 3, 8, dtype=torch.float64))
    solver.update(torch.ones(2, 0, 8, dtype=torch.float64))
    assert len(solver.solve().low_rank.down) == 4
    problem.probe.assert_not_called()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_after_a_rotation_only_the_branch_is_left(family: str) -> None:
    adapter = tiny(family)
    rows = calibration(family, adapter).rows
    before = adapter.forward(rows)
    for name, transform in solved(
        adapter, family, recipe("hadamard", "svd", svd=replace(FULL, iterations=1))
    ).items():
        assert transform.is_diagonal_identity(), name
        assert transform.low_rank is not None, name
    assert relative(adapter.forward(rows), before) < 1e-12


def test_the_branch_takes_outliers_of_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(64, 96, generator=generator, dtype=torch.float64)
    weight = flat + 40 * torch.outer(
        torch.randn(64, generator=generator), torch.randn(96, generator=generator)
    )
    spec = QuantSpec(4, granularity="out_channel")
    branch = truncated_svd(weight, 4)
    with_branch = fake_quantize_weight(weight - product(branch), spec)[0] + product(branch)
    alone = fake_quantize_weight(weight, spec)[0]
    assert float((with_branch - weight).norm()) < 0.1 * float((alone - weight).norm())


# --- whole models


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how",
    [
        recipe("svd"),
        recipe("smoothquant", "svd", activations=QuantSpec(6), stwq=True, exclude_sinks=True),
        recipe(
            "svd",
            svd=replace(FULL, iterations=2),
            activations=QuantSpec(6),
            scope=Scope(("qkv", "fc2"), False),
        ),
    ],
    ids=["paper", "stwq", "static"],
)
@torch.no_grad()
def test_every_family_is_quantized_with_branches(family: str, how: Recipe) -> None:
    adapter = tiny(family)
    chosen = calibration(family, adapter)
    full = adapter.forward(chosen.rows)
    found = quantize(adapter, chosen, how, batch=4).tensors
    assert all(bool(torch.isfinite(v).all()) for v in found.values())
    for name, linear in adapter.model.named_modules():
        if isinstance(linear, QuantLinear):
            assert torch.equal(found[f"{name}.down"], linear.down)
            assert torch.equal(found[f"{name}.up"], linear.up)
    error = float((adapter.forward(chosen.rows) - full).square().mean().sqrt() / full.std())
    assert 0 < error < 0.3


def test_wrong_settings_are_refused() -> None:
    for changes, said in [
        ({"rank": 0}, "rank: 0 is not an integer from 1 to 65536"),
        ({"iterations": 0}, "iterations: 0 is not an integer from 1 to 100000"),
        ({"rows": -1}, "rows: -1 is not an integer from 1 to 100000"),
        ({"alpha": 1.5}, "alpha: 1.5 is not a number from 0 to 1"),
    ]:
        with pytest.raises(ConfigError, match=f"^method.options.svd.{said}$"):
            Settings(**changes)
    with pytest.raises(
        ConfigError, match="^method.options.svd.sites: 'qkw' is not one of qkv, proj,"
    ):
        recipe("svd", svd=Settings(sites=("qkw",)))
