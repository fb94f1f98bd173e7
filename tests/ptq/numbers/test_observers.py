"""Streaming statistics equal those of all values at once, however the values arrive, and stay
small."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ptq.numbers.grouping import split_groups
from ptq.numbers.numerics import NonFiniteError, QParams, fake_quantize
from ptq.numbers.observers import Observer, Tails
from ptq.numbers.quantizers import choose_qparams
from ptq.types import QuantSpec, Segments

GRANULARITIES = {
    "tensor": Segments(),
    "in_channel": Segments(),
    "few": Segments((0, 1, 2)),
    "uneven": Segments((0, 1, 5, 9)),
    "every": Segments(tuple(range(13))),
}
POSITIONS = torch.arange(13)


def activations(rows: int = 40, seed: int = 0) -> Tensor:
    """Inputs (rows, 13, 24) with outlier channels, sink tokens and heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 13, 24, generator=generator) * torch.rand(
        rows, 13, 24, generator=generator
    ).pow(-0.3)
    return x * (1 + 20 * (torch.arange(24) % 11 == 3)) * (1 + 9 * (POSITIONS < 2))[
        :, None
    ] + torch.linspace(-2, 5, 24)


def spec_of(name: str, **kwargs: object) -> QuantSpec:
    return QuantSpec(
        granularity=name if name in ("tensor", "in_channel") else "token_static", **kwargs
    )


def observe(
    spec: QuantSpec, segments: Segments, calls: list[tuple[Tensor, Tensor]], rows: int
) -> QParams:
    observer = Observer(spec, segments, rows)
    for _ in range(observer.passes):
        for x, positions in calls:
            assert observer(x, positions) is x
        observer.end_pass()
    return observer.params()


def squared_error(values: Tensor, params: QParams) -> float:
    """Of one group at 6 bits."""
    return float((fake_quantize(values, params, 64) - values).double().square().sum())


def same(a: QParams, b: QParams) -> bool:
    return torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)


@pytest.mark.parametrize("name", GRANULARITIES)
@pytest.mark.parametrize("rule", ["minmax", "percentile_mse"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_any_split_of_the_rows_gives_the_parameters_of_all_rows_at_once(
    name: str, rule: str, seed: int
) -> None:
    x = activations(seed=seed)
    spec = spec_of(name, bits=6, range=rule)
    segments = GRANULARITIES[name]
    cuts = sorted(
        torch.randperm(39, generator=torch.Generator().manual_seed(seed))[:5].add(1).tolist()
    )
    calls = [(part, POSITIONS) for part in x.tensor_split(cuts)]
    assert len({len(part) for part, _ in calls}) > 1
    assert same(
        observe(spec, segments, calls, len(x)), choose_qparams(x, spec, POSITIONS, segments)
    )


@pytest.mark.parametrize("name", GRANULARITIES)
@pytest.mark.parametrize("observer", ["exact", "histogram"])
@pytest.mark.parametrize("rule", ["minmax", "percentile_mse"])
def test_a_call_may_bring_any_positions_in_any_number(name: str, observer: str, rule: str) -> None:
    x = activations()
    segments = GRANULARITIES[name]
    spec = spec_of(name, bits=6, range=rule, observer=observer)
    # as a decoder feeds them: the prefix, then one position after the other
    calls = [(x[:, :2], POSITIONS[:2])]
    calls += [(x[:, t : t + 1], POSITIONS[t : t + 1]) for t in range(2, 13)]
    # the rest is one token
    calls += [(x[:, 12:].flip(0), POSITIONS[12:]), (x, POSITIONS), (x[:, :3], POSITIONS[:3])]
    if name == "tensor":
        groups = [torch.cat([part.flatten() for part, _ in calls])[None]]
    elif name == "in_channel":
        groups = [torch.cat([part.reshape(-1, 24).t() for part, _ in calls], dim=1)]
    else:
        index = segments.index
        groups = [
            torch.cat([part[:, index(p) == g].flatten() for part, p in calls])[None]
            for g in range(len(segments))
        ]
    exact = [choose_qparams(g, spec.at("out_channel")) for g in groups]
    scale, zero = (
        torch.cat([getattr(e, field) for e in exact]) for field in ("scale", "zero_point")
    )
    found = observe(spec, segments, calls, len(x))
    if spec.observer == "exact" or rule == "minmax":
        assert same(found, QParams(scale, zero))
    else:
        for g, values in enumerate(groups if len(groups) > 1 else [v[None] for v in groups[0]]):
            i = torch.tensor([g])
            assert squared_error(values, found[i]) <= 1.1 * squared_error(
                values, QParams(scale, zero)[i]
            )


def test_rows_are_counted_right_where_the_first_dimension_is_tokens() -> None:
    """A diffusion head sees (tokens, C): more values than rows suggest, in unequal batches, the
    last one heavy."""
    x = activations(rows=400).flatten(0, 1)  # 5200 tokens of 16 rows
    for name in ("tensor", "in_channel"):
        spec = spec_of(name, bits=6)
        calls = [
            (part, POSITIONS) for part in (x[:300], 3 * x[300:700], x[700:4000], 10 * x[4000:])
        ]
        everything = torch.cat([part for part, _ in calls])
        assert same(observe(spec, Segments(), calls, rows=16), choose_qparams(everything, spec))


def test_a_lost_percentile_is_an_error_and_never_a_wrong_range() -> None:
    wide = 100 * torch.rand(50, 20)
    tame = torch.rand(100_000, 20)
    observer = Observer(QuantSpec(6, granularity="tensor"), rows=1, name="blocks.3.proj")
    observer(wide)
    observer(tame)
    with pytest.raises(RuntimeError, match="blocks.3.proj.*observer=histogram"):
        observer.end_pass()
    # with a right guess of the number of rows the same stream is exact
    calls = [(wide, POSITIONS), (tame, POSITIONS)]
    expected = choose_qparams(torch.cat((wide, tame)), QuantSpec(6))
    assert same(observe(QuantSpec(6), Segments(), calls, rows=100_050), expected)


@pytest.mark.parametrize("rows", [1, 8])
def test_what_an_exact_observer_keeps_is_under_one_percent_of_what_passes(rows: int) -> None:
    observer = Observer(QuantSpec(6, granularity="token_static"), Segments((0, 1, 2)), rows)
    generator = torch.Generator().manual_seed(0)
    total = 0
    for _ in range(8):
        x = torch.randn(1, 300, 500, generator=generator)
        observer(x, torch.arange(300))
        total += x.numel()
        tails = [s for _, s in observer.statistics if isinstance(s, Tails)]
        kept = sum(t.low.kept.numel() + t.high.kept.numel() for t in tails)
    assert len(tails) == 2  # the two single positions together, and the rest
    assert 0.002 * total <= kept <= 0.01 * total
    observer.end_pass()
    assert all(t.low is None and t.high is None for t in tails)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("name", GRANULARITIES)
def test_a_histogram_costs_at_most_five_percent_over_exact_search(name: str, heavy: bool) -> None:
    x = torch.randn(512, 13, 24, generator=torch.Generator().manual_seed(0)) * torch.linspace(
        0.5, 4, 24
    )
    x = activations(rows=512) if heavy else x
    spec = spec_of(name, bits=6, observer="histogram")
    segments = GRANULARITIES[name]
    exact = choose_qparams(x, spec, POSITIONS, segments)
    found = observe(spec, segments, [(part, POSITIONS) for part in x.split(100)], len(x))
    for ids, values in split_groups(x, spec.granularity, POSITIONS, segments):
        for i, group in zip(ids, values):
            assert squared_error(group, found[i]) <= 1.05 * squared_error(group, exact[i])


def test_a_histogram_needs_one_pass_and_exact_percentiles_two() -> None:
    assert Observer(QuantSpec(observer="histogram")).passes == 1
    assert Observer(QuantSpec(range="minmax")).passes == 1
    exact = Observer(QuantSpec())
    assert exact.passes == 2
    exact(activations(), POSITIONS)
    exact.end_pass()
    with pytest.raises(RuntimeError, match="two passes"):
        exact.params()


@pytest.mark.parametrize("name", GRANULARITIES)
@pytest.mark.parametrize("observer", ["exact", "histogram"])
def test_calls_without_any_token_change_nothing(name: str, observer: str) -> None:
    x = activations()
    spec = spec_of(name, observer=observer)
    segments = GRANULARITIES[name]
    empty = (x[:, :0], POSITIONS[:0])
    calls = [empty, (x[:7], POSITIONS), empty, (x[7:], POSITIONS), empty]
    assert same(
        observe(spec, segments, calls, len(x)),
        observe(spec, segments, [calls[1], calls[3]], len(x)),
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "spec", [QuantSpec(), QuantSpec(range="minmax"), QuantSpec(observer="histogram")], ids=repr
)
def test_nan_and_infinity_are_refused_with_the_name_of_the_place(
    bad: float, spec: QuantSpec
) -> None:
    observer = Observer(spec, name="blocks.0.attn.qkv")
    x = activations()
    observer(x, POSITIONS)
    x[3, 4, 5] = bad
    with pytest.raises(NonFiniteError, match="^blocks.0.attn.qkv: .*NaN or infinity"):
        observer(x, POSITIONS)


def test_an_observer_that_saw_nothing_or_too_few_segments_says_so() -> None:
    with pytest.raises(RuntimeError, match="head: no activation"):
        Observer(QuantSpec(), name="head").params()
    spec = QuantSpec(granularity="token_static", range="minmax")
    observer = Observer(spec, Segments((0, 1, 20)), name="fc1")
    observer(activations(), POSITIONS)
    with pytest.raises(RuntimeError, match="fc1: .*3 segments"):
        observer.params()
