"""Observers: calibration batches stream through, a few numbers per group stay, parameters come out.

An observer sits where the quantizer will sit and passes activations on unchanged. `exact` keeps the order statistics
that the percentiles need (0.2 % of the values) in a first pass over the calibration rows and sums the squared errors
of the candidate ranges in a second one; its result equals `numerics.solve` on all values at once. `histogram` needs
one pass and is approximate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq import numerics
from ptq.grouping import merge, split
from ptq.numerics import NonFiniteError, QParams
from ptq.types import QuantSpec, Segments


class Observer(nn.Module):
    """Base: splits what passes into groups and hands each part to a `Part` of statistics."""

    def __init__(self, spec: QuantSpec, segments: Segments = Segments(), rows: int = 1, name: str = "input") -> None:
        """`rows`: calibration rows that one pass will bring in all. `name`: for error messages."""
        super().__init__()
        self.spec, self.segments, self.rows, self.name = spec, segments, rows, name
        self.parts: dict[tuple[int, ...], MinMax | Tails | Histogram] = {}

    @property
    def passes(self) -> int:
        """Passes over the calibration rows that the parameters need."""
        return 2 if self.spec.range == "percentile_mse" and self.spec.observer == "exact" else 1

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        for ids, values in split(x.detach(), self.spec.granularity, positions, self.segments):
            if ids not in self.parts:
                kind = MinMax if self.spec.range == "minmax" else Histogram if self.passes == 1 else Tails
                self.parts[ids] = kind(self.spec, self.rows * values.shape[1] / len(x))
            self.parts[ids].update(values)
        return x

    def end_pass(self) -> None:
        for part in self.parts.values():
            part.end_pass()

    def params(self) -> QParams:
        """The parameters of all groups.

        Raises:
            NonFiniteError: NaN or infinity passed. RuntimeError: nothing passed.
        """
        if not self.parts:
            raise RuntimeError(f"{self.name}: no activation reached this observer")
        try:
            return merge([(ids, part.params()) for ids, part in self.parts.items()])
        except NonFiniteError as error:
            raise NonFiniteError(f"{self.name}: {error}") from error


class MinMax:
    """Running extrema of groups (g, n)."""

    def __init__(self, spec: QuantSpec, total: float) -> None:
        self.spec, self.lo, self.hi = spec, None, None

    def update(self, values: Tensor) -> None:
        lo, hi = numerics.minmax(values)
        self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)

    def end_pass(self) -> None:
        pass

    def params(self) -> QParams:
        _check_finite(self.lo, self.hi)
        return numerics.params_from_range(self.lo, self.hi, self.spec)


class Tails:
    """Exact percentile search: order statistics of both tails, then errors of the three candidates."""

    def __init__(self, spec: QuantSpec, total: float) -> None:
        self.spec, self.keep = spec, 2 * numerics.tail_size(int(total))  # twice: rows may differ in length
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.count = 0
        self.candidates: list[QParams] | None = None
        self.errors: Tensor | float = 0.0

    def update(self, values: Tensor) -> None:
        if self.candidates is not None:
            self.errors = self.errors + numerics.squared_errors(values, self.candidates, self.spec.levels)
            return
        self.count += values.shape[1]
        k = min(self.keep, values.shape[1])
        low, high = values.topk(k, dim=1, largest=False).values, values.topk(k, dim=1).values
        if self.low is not None:
            low, high = torch.cat((self.low, low), dim=1), torch.cat((self.high, high), dim=1)
        k = min(self.keep, low.shape[1])
        self.low = low.topk(k, dim=1, largest=False).values
        self.high = high.topk(k, dim=1).values

    def end_pass(self) -> None:
        if self.candidates is None:
            _check_finite(self.low[:, 0], self.high[:, 0])
            if numerics.tail_size(self.count) > self.low.shape[1]:
                raise RuntimeError("calibration rows contribute very different numbers of values; use observer=histogram")
            ranges = numerics.percentile_ranges(self.low, self.high, self.count)
            self.candidates = [numerics.params_from_range(lo, hi, self.spec) for lo, hi in zip(*ranges)]

    def params(self) -> QParams:
        return numerics.pick(self.candidates, self.errors)


class Histogram:
    """Approximate percentile search from a histogram per group whose range grows with the data."""

    BINS = 4096

    def __init__(self, spec: QuantSpec, total: float) -> None:
        self.spec = spec
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None
        self.counts: Tensor | None = None

    def centres(self) -> Tensor:
        """Middle of every bin, (g, BINS)."""
        steps = (torch.arange(self.BINS, device=self.lo.device) + 0.5) / self.BINS
        return self.lo[:, None] + (self.hi - self.lo)[:, None] * steps

    def _add(self, values: Tensor, weights: Tensor) -> None:
        width = ((self.hi - self.lo) / self.BINS).clamp(min=torch.finfo(values.dtype).tiny)
        bins = ((values - self.lo[:, None]) / width[:, None]).long().clamp_(0, self.BINS - 1)
        self.counts.scatter_add_(1, bins, weights)

    def update(self, values: Tensor) -> None:
        lo, hi = numerics.minmax(values)
        _check_finite(lo, hi)
        if self.counts is None:
            self.lo, self.hi = lo, hi
            self.counts = torch.zeros(len(values), self.BINS, dtype=torch.float64, device=values.device)
        elif bool(((lo < self.lo) | (hi > self.hi)).any()):
            centres, counts = self.centres(), self.counts
            self.lo, self.hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)
            self.counts = torch.zeros_like(counts)
            self._add(centres, counts)
        self._add(values, torch.ones((), dtype=torch.float64, device=values.device).expand_as(values))

    def end_pass(self) -> None:
        pass

    def params(self) -> QParams:
        cdf = self.counts.cumsum(dim=1)
        total, centres = cdf[:, -1:], self.centres()
        candidates = []
        for p in numerics.PERCENTILES:
            last = self.BINS - 1
            hi = centres.gather(1, torch.searchsorted(cdf, total * p).clamp(max=last)).squeeze(1)
            lo = centres.gather(1, torch.searchsorted(cdf, total * (1 - p)).clamp(max=last)).squeeze(1)
            candidates.append(numerics.params_from_range(lo, hi, self.spec))
        errors = torch.stack([
            ((numerics.fake_quant(centres, c.view(-1, 1), self.spec.levels) - centres).pow(2) * self.counts).sum(dim=1)
            for c in candidates
        ])
        return numerics.pick(candidates, errors)


def _check_finite(lo: Tensor, hi: Tensor) -> None:
    if not bool(torch.isfinite(lo).all() & torch.isfinite(hi).all()):
        raise NonFiniteError("activations contain NaN or infinity, only finite numbers are allowed")
