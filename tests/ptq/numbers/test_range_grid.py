"""The search among many ranges: never worse than the extrema, and near the best of a dense grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq.numbers import range_grid
from ptq.numbers.numerics import (
    NonFiniteError,
    QParams,
    group_extrema,
    params_from_range,
    simulate_format,
)
from ptq.numbers.observers import Observer
from ptq.numbers.range_grid import search_ranges
from ptq.types import QuantSpec


def heavy_tailed(groups: int = 12, size: int = 400, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, size, generator=generator)
    return x * torch.randn(groups, size, generator=generator).abs() + 0.3


def errors(values: Tensor, params: QParams, spec: QuantSpec) -> Tensor:
    return (simulate_format(values, params.view(-1, 1), spec) - values).square().sum(dim=1)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_no_worse_than_extrema_and_near_the_best_of_a_dense_grid(bits: int) -> None:
    values = heavy_tailed()
    spec = QuantSpec(bits, range="grid")
    found = errors(values, search_ranges(values, spec), spec)
    lo, hi = group_extrema(values)
    assert bool((found <= errors(values, params_from_range(lo, hi, spec), spec) * 1.0001).all())
    factors = torch.linspace(0.25, 1, 60)
    dense = [
        errors(values, params_from_range(lo * low, hi * high, spec), spec)
        for low in factors.tolist()
        for high in factors.tolist()
    ]
    assert float((found / torch.stack(dense).amin(dim=0)).mean()) < 1.06


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = heavy_tailed()
    spec = QuantSpec(4, range="grid")
    whole = search_ranges(values, spec)
    monkeypatch.setattr(range_grid, "CHUNK_CPU", 900)
    parts = search_ranges(values, spec)
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.zero_point, parts.zero_point)


def test_an_observer_finds_what_all_values_at_once_give() -> None:
    values = heavy_tailed(groups=1, size=600)
    spec = QuantSpec(4, range="grid")
    observer = Observer(spec)
    for part in values.view(3, 10, 20):
        observer(part)
    assert observer.end_pass()
    expected = search_ranges(values, spec)
    assert torch.equal(observer.params().scale, expected.scale)


def test_nan_is_refused() -> None:
    values = heavy_tailed()
    values[3, 5] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        search_ranges(values, QuantSpec(4, range="grid"))
