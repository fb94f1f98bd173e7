"""Observers: calibration batches stream through, a few numbers per group stay, parameters come out.

An observer sits where the quantizer will sit and passes activations on unchanged. `exact` keeps the
order statistics that the percentiles need (under 1 % of the values) in a first pass over the
calibration rows and sums the squared errors of the candidate ranges in a second one; its result
equals `choose_group_qparams` on all values at once. `histogram` needs one pass and is approximate.

State belongs to groups, not to calls: calls may bring any subset of the groups and any number of
values of each. Groups that are first seen together, with equally many values, share one
`Statistics`, whose rows they are.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ptq.numbers import numerics
from ptq.numbers.grouping import WHOLE, merge_groups, split_groups
from ptq.numbers.numerics import NonFiniteError, QParams
from ptq.sites import Segments
from ptq.spec import QuantSpec


class Statistics(Protocol):
    """What is kept of g groups."""

    def update(self, rows: Tensor, values: Tensor) -> None:
        """Take values (r, n) of the groups `rows` (r,) in."""

    def end_pass(self) -> None:
        """All calibration rows have passed."""

    def params(self) -> QParams:
        """Parameters (g,)."""


class Observer(nn.Module):
    """Splits what passes into groups and hands the groups to their statistics."""

    def __init__(
        self, spec: QuantSpec, segments: Segments = WHOLE, rows: int = 1, name: str = "input"
    ) -> None:
        """`rows`: calibration rows that one pass will bring in all. `name`: for error messages."""
        super().__init__()
        self.spec = spec
        self.segments = segments
        self.rows = rows
        self.name = name
        # ids (g,) of the groups, and what is kept of them
        self.statistics: list[tuple[Tensor, Statistics]] = []
        # of each group: place in the list (-1: not seen), row there
        self.home = torch.zeros(0, 2, dtype=torch.long)
        self.passed = 0

    @property
    def passes(self) -> int:
        """Passes over the calibration rows that the parameters need."""
        return 2 if self.spec.range == "percentile_mse" and self.spec.observer == "exact" else 1

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Observe x and return it.

        Raises:
            NonFiniteError: x contains NaN or infinity.
        """
        if not bool(x.isfinite().all()):
            raise NonFiniteError(
                f"{self.name}: activations contain NaN or infinity, only finite numbers are allowed"
            )
        if x.numel():  # without its sink tokens a call may be empty
            for ids, values in split_groups(
                x.detach(), self.spec.granularity, positions, self.segments
            ):
                place, rows = self._locate(ids, int(self.rows * values.shape[1] / len(x))).unbind(1)
                for p in place.unique().tolist():
                    here = place == p
                    self.statistics[p][1].update(
                        rows[here], values if bool(here.all()) else values[here]
                    )
        return x

    def _locate(self, ids: Tensor, expected: int) -> Tensor:
        """Homes (g, 2) of groups; those that are new move into a new one together."""
        missing = int(ids.max()) + 1 - len(self.home)
        if missing > 0:
            self.home = torch.cat((self.home.to(ids.device), ids.new_full((missing, 2), -1)))
        new = ids[self.home[ids, 0] < 0]
        if len(new):
            kind = (
                MinMax if self.spec.range == "minmax" else Histogram if self.passes == 1 else Tails
            )
            rows = torch.arange(len(new), device=ids.device)
            self.home[new] = torch.stack((torch.full_like(rows, len(self.statistics)), rows), dim=1)
            self.statistics.append((new, kind(self.spec, len(new), expected)))
        return self.home[ids]

    def end_pass(self) -> bool:
        """All rows have passed; says whether that was the last pass needed.

        Raises:
            RuntimeError: order statistics that the percentiles need were not kept.
        """
        for _, statistics in self.statistics:
            try:
                statistics.end_pass()
            except RuntimeError as error:
                raise RuntimeError(f"{self.name}: {error}") from error
        self.passed += 1
        return self.passed >= self.passes

    def params(self) -> QParams:
        """The parameters of all groups.

        Raises:
            RuntimeError: a pass is missing, or a group got no values.
        """
        if not self.statistics:
            raise RuntimeError(f"{self.name}: no activation reached this observer")
        if self.spec.granularity == "token_static" and int((self.home[:, 0] >= 0).sum()) < len(
            self.segments
        ):
            raise RuntimeError(
                f"{self.name}: not every one of the {len(self.segments)} segments got activations"
            )
        return merge_groups([(ids, statistics.params()) for ids, statistics in self.statistics])


class MinMax:
    """Running extrema."""

    def __init__(self, spec: QuantSpec, groups: int, expected: int) -> None:
        self.spec = spec
        self.groups = groups
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None

    def update(self, rows: Tensor, values: Tensor) -> None:
        lo, hi = numerics.group_extrema(values)
        if self.lo is None:
            self.lo, self.hi = (
                lo.new_full((self.groups,), torch.inf),
                lo.new_full((self.groups,), -torch.inf),
            )
        self.lo[rows], self.hi[rows] = (
            torch.minimum(self.lo[rows], lo),
            torch.maximum(self.hi[rows], hi),
        )

    def end_pass(self) -> None:
        pass

    def params(self) -> QParams:
        return numerics.params_from_range(self.lo, self.hi, self.spec)


class Tails:
    """Exact percentile search: order statistics of both tails, then errors of the three candidates.

    Every update keeps the `MARGIN * tail_size(n)` outermost values of each tail, n being what has
    passed or what is expected in all, whichever is more. With a right guess that is all the
    percentiles need. Where more comes than was guessed, what is kept grows with it, and values
    dropped early matter only if later ones are that much tamer; whether they are is known
    (`Tail.smallest`), and then the pass ends with an error, never with a wrong range.
    """

    MARGIN = 4

    def __init__(self, spec: QuantSpec, groups: int, expected: int) -> None:
        self.spec = spec
        self.groups = groups
        self.expected = expected
        self.count: Tensor | None = None  # values seen per group
        self.low: Tail | None = None
        self.high: Tail | None = None  # of the negated values
        self.candidates: list[QParams] | None = None
        self.errors: Tensor | None = None

    def update(self, rows: Tensor, values: Tensor) -> None:
        if self.candidates is not None:
            if self.errors is None:
                self.errors = torch.zeros(
                    len(self.candidates), self.groups, dtype=torch.float64, device=values.device
                )
            chosen = [candidate[rows] for candidate in self.candidates]
            self.errors[:, rows] += numerics.squared_errors(values, chosen, self.spec)
            return
        if self.count is None:
            self.count = torch.zeros(self.groups, dtype=torch.long, device=values.device)
            self.low, self.high = Tail(self.groups, values), Tail(self.groups, values)
        self.count[rows] += values.shape[1]
        keep = self.MARGIN * numerics.tail_size(max(self.expected, int(self.count[rows].max())))
        self.low.update(rows, values, keep)
        self.high.update(rows, -values, keep)

    def end_pass(self) -> None:
        if self.candidates is not None:
            return
        los, his = (
            self.low.kept.new_empty(len(numerics.PERCENTILES), self.groups) for _ in range(2)
        )
        for n in self.count.unique().tolist():  # groups of equal size together
            rows = (self.count == n).nonzero().squeeze(1)
            k = numerics.tail_size(n)
            los[:, rows], his[:, rows] = numerics.percentile_ranges(
                self.low.smallest(rows, k), -self.high.smallest(rows, k), n
            )
        self.candidates = [
            numerics.params_from_range(lo, hi, self.spec) for lo, hi in zip(los, his)
        ]
        self.low = self.high = None

    def params(self) -> QParams:
        if self.errors is None:
            raise RuntimeError("an exact observer needs two passes over the calibration rows")
        return numerics.pick_least_error(self.candidates, self.errors)


class Tail:
    """The smallest values of g groups, ascending and padded with infinity (g, k), and the smallest
    dropped one (g,)."""

    def __init__(self, groups: int, like: Tensor) -> None:
        self.kept = like.new_empty(groups, 0)
        self.dropped = like.new_full((groups,), torch.inf)

    def update(self, rows: Tensor, values: Tensor, keep: int) -> None:
        """Take values (r, n) in and keep the `keep` smallest of each group."""
        new = values.topk(min(keep + 1, values.shape[1]), dim=1, largest=False).values
        merged = torch.cat((self.kept[rows], new), dim=1).sort(dim=1).values
        if merged.shape[1] > keep:
            self.dropped[rows] = torch.minimum(self.dropped[rows], merged[:, keep])
            merged = merged[:, :keep]
        missing = merged.shape[1] - self.kept.shape[1]
        if missing > 0:
            self.kept = nn.functional.pad(self.kept, (0, missing), value=torch.inf)
        self.kept[rows] = nn.functional.pad(merged, (0, max(0, -missing)), value=torch.inf)

    def smallest(self, rows: Tensor, k: int) -> Tensor:
        """The k smallest values ever seen of the groups `rows`, (r, k).

        Raises:
            RuntimeError: one of them may have been dropped.
        """
        kept = self.kept[rows, :k]
        if bool((kept > self.dropped[rows, None]).any()):
            raise RuntimeError(
                "later batches are so much larger and tamer that percentiles were lost; "
                "use observer=histogram or smaller batches of calibration rows in random order"
            )
        return kept


class Histogram:
    """Approximate percentile search from a histogram per group whose range grows with the data."""

    BINS = 4096

    def __init__(self, spec: QuantSpec, groups: int, expected: int) -> None:
        self.spec = spec
        self.groups = groups
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None
        self.counts: Tensor | None = None  # (g, BINS)

    def centres(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Middle of every bin, (r, BINS)."""
        steps = (torch.arange(self.BINS, device=self.lo.device) + 0.5) / self.BINS
        return self.lo[rows, None] + (self.hi - self.lo)[rows, None] * steps

    def _add(self, rows: Tensor, values: Tensor, weights: Tensor) -> None:
        lo = self.lo[rows, None]
        width = (self.hi - self.lo)[rows, None] / self.BINS
        bins = (
            ((values - lo) / width.clamp(min=torch.finfo(values.dtype).tiny))
            .long()
            .clamp_(0, self.BINS - 1)
        )
        self.counts[rows] = self.counts[rows].scatter_add(1, bins, weights)

    def update(self, rows: Tensor, values: Tensor) -> None:
        lo, hi = numerics.group_extrema(values)
        if self.counts is None:
            self.lo, self.hi = (
                lo.new_full((self.groups,), torch.inf),
                lo.new_full((self.groups,), -torch.inf),
            )
            self.counts = torch.zeros(
                self.groups, self.BINS, dtype=torch.float64, device=values.device
            )
        if bool(((lo < self.lo[rows]) | (hi > self.hi[rows])).any()):
            lo = torch.minimum(self.lo[rows], lo)
            hi = torch.maximum(self.hi[rows], hi)
            centres = self.centres(rows)
            counts = self.counts[rows]
            self.lo[rows] = lo
            self.hi[rows] = hi
            self.counts[rows] = 0.0
            self._add(rows, torch.where(counts > 0, centres, lo[:, None]), counts)
        self._add(
            rows,
            values,
            torch.ones((), dtype=torch.float64, device=values.device).expand_as(values),
        )

    def end_pass(self) -> None:
        pass

    def quantile(self, p: float) -> Tensor:
        """Linear between order statistics (`torch.quantile`), each at the middle of its bin,
        (g,)."""
        cdf = self.counts.cumsum(dim=1)
        centres = self.centres()
        rank = p * (cdf[:, -1:] - 1)
        below, above = (
            centres.gather(1, torch.searchsorted(cdf, r, right=True).clamp(max=self.BINS - 1))
            for r in (rank.floor(), rank.ceil())
        )
        return torch.lerp(below, above, rank.frac().to(below.dtype)).squeeze(1)

    def params(self) -> QParams:
        centres = self.centres()
        candidates = [
            numerics.params_from_range(self.quantile(1 - p), self.quantile(p), self.spec)
            for p in numerics.PERCENTILES
        ]
        errors = torch.stack(
            [
                (
                    (numerics.simulate_format(centres, c.view(-1, 1), self.spec) - centres).pow(2)
                    * self.counts
                ).sum(dim=1)
                for c in candidates
            ]
        )
        return numerics.pick_least_error(candidates, errors)
