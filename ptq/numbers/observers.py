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
from ptq.numbers.grouping import WHOLE, count_static_groups, merge_groups, split_groups
from ptq.numbers.numerics import NonFiniteError, QParams
from ptq.numbers.quantizers import run_time_quantizer
from ptq.numbers.range_grid import search_ranges
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
        # groups that have to get values; None: those that come are all
        self.required: int | None = None

    @property
    def passes(self) -> int:
        """Passes over the calibration rows that the parameters need."""
        return 2 if self.spec.range == "percentile_mse" and self.spec.observer == "exact" else 1

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Observe x and return it.

        Raises:
            NonFiniteError: x contains NaN or infinity.
        """
        if self.passed >= self.passes:  # others may need more of them
            return x
        require_finite(x, self.name)
        if x.numel() == 0:  # without its sink tokens a call may be empty
            return x
        spec = self.spec
        self.required = count_static_groups(x, spec.granularity, self.segments, spec.group_size)
        groups = split_groups(
            x.detach(), spec.granularity, positions, self.segments, spec.group_size
        )
        for ids, values in groups:
            # values of a group that all calibration rows will bring, if they are like these
            expected = int(self.rows * values.shape[1] / len(x))
            places, rows = self._locate(ids, expected).unbind(1)  # (g,) each
            for place in places.unique().tolist():
                _, statistics = self.statistics[place]
                chosen = places == place  # (g,)
                # a copy of the values is saved in the usual case
                chosen_values = values if bool(chosen.all()) else values[chosen]
                statistics.update(rows[chosen], chosen_values)
        return x

    def _locate(self, ids: Tensor, expected: int) -> Tensor:
        """Homes (g, 2) of groups; those that are new move into a new one together."""
        missing = int(ids.max()) + 1 - len(self.home)
        if missing > 0:
            unseen = ids.new_full((missing, 2), -1)
            self.home = torch.cat((self.home.to(ids.device), unseen))
        new = ids[self.home[ids, 0] < 0]
        if len(new):
            rows = torch.arange(len(new), device=ids.device)
            place = torch.full_like(rows, len(self.statistics))
            self.home[new] = torch.stack((place, rows), dim=1)
            self.statistics.append((new, self._new_statistics(len(new), expected)))
        return self.home[ids]

    def _new_statistics(self, groups: int, expected: int) -> Statistics:
        """What the spec's range rule has to know of that many groups."""
        if self.spec.range == "minmax":
            return MinMax(self.spec, groups, expected)
        if self.spec.range == "grid":
            return Everything(self.spec, groups, expected)
        if self.passes == 1:
            return Histogram(self.spec, groups, expected)
        return Tails(self.spec, groups, expected)

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
        seen = int((self.home[:, 0] >= 0).sum())
        if self.required is not None and seen < self.required:
            raise RuntimeError(
                f"{self.name}: not every one of the {len(self.segments)} segments got activations"
            )
        return merge_groups([(ids, statistics.params()) for ids, statistics in self.statistics])


def require_finite(x: Tensor, name: str) -> None:
    """Refuse an activation with NaN or infinity."""
    if not bool(x.isfinite().all()):
        raise NonFiniteError(
            f"{name}: activations contain NaN or infinity, only finite numbers are allowed"
        )


class TensorScaleObserver(nn.Module):
    """Finds the scale of a tensor whose blocks find theirs at run time (`small_floats.py`)."""

    passes = 1

    def __init__(self, spec: QuantSpec, name: str = "input") -> None:
        super().__init__()
        self.spec = spec
        self.name = name
        self.largest: Tensor | None = None  # magnitude, ()

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Observe x and return it.

        Raises:
            NonFiniteError: x contains NaN or infinity.
        """
        require_finite(x, self.name)
        if x.numel():
            largest = x.abs().amax()
            self.largest = largest if self.largest is None else self.largest.maximum(largest)
        return x

    def end_pass(self) -> bool:
        return True

    def quantizer(self) -> nn.Module:
        """What takes the observer's place.

        Raises:
            RuntimeError: nothing has passed.
        """
        if self.largest is None:
            raise RuntimeError(f"{self.name}: no activation reached this observer")
        return run_time_quantizer(self.spec, self.largest)


class MinMax:
    """Running extrema."""

    def __init__(self, spec: QuantSpec, groups: int, expected: int) -> None:
        self.spec = spec
        self.groups = groups
        self.lo: Tensor | None = None  # (g,)
        self.hi: Tensor | None = None  # (g,)

    def update(self, rows: Tensor, values: Tensor) -> None:
        lo, hi = numerics.group_extrema(values)  # (r,) each
        if self.lo is None:
            self.lo = lo.new_full((self.groups,), torch.inf)
            self.hi = lo.new_full((self.groups,), -torch.inf)
        self.lo[rows] = torch.minimum(self.lo[rows], lo)
        self.hi[rows] = torch.maximum(self.hi[rows], hi)

    def end_pass(self) -> None:
        pass

    def params(self) -> QParams:
        return numerics.params_from_range(self.lo, self.hi, self.spec)


class Everything:
    """All values, for the search of `range_grid.py` over a few channels, not whole models."""

    def __init__(self, spec: QuantSpec, groups: int, expected: int) -> None:
        self.spec = spec
        self.parts: dict[int, list[Tensor]] = {row: [] for row in range(groups)}

    def update(self, rows: Tensor, values: Tensor) -> None:
        for row, part in zip(rows.tolist(), values):
            self.parts[row].append(part)

    def end_pass(self) -> None:
        pass

    def params(self) -> QParams:
        params_by_group = []
        for parts in self.parts.values():
            values = torch.cat(parts)[None]  # (1, n): groups may differ in size
            params_by_group.append(search_ranges(values, self.spec))
        return numerics.join_params(params_by_group)


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
        # of the first pass
        self.count: Tensor | None = None  # values seen per group, (g,)
        self.low: Tail | None = None
        self.high: Tail | None = None  # of the negated values
        # of the second pass
        self.candidates: list[QParams] | None = None  # (g,) each
        self.errors: Tensor | None = None  # (candidates, g)

    def update(self, rows: Tensor, values: Tensor) -> None:
        if self.candidates is None:
            self._keep_tails(rows, values)
        else:
            self._add_errors(rows, values)

    def _keep_tails(self, rows: Tensor, values: Tensor) -> None:
        """The first pass."""
        if self.count is None:
            self.count = torch.zeros(self.groups, dtype=torch.long, device=values.device)
            self.low = Tail(self.groups, values)
            self.high = Tail(self.groups, values)
        self.count[rows] += values.shape[1]
        most_values = max(self.expected, int(self.count[rows].max()))
        keep = self.MARGIN * numerics.tail_size(most_values)
        self.low.update(rows, values, keep)
        self.high.update(rows, -values, keep)

    def _add_errors(self, rows: Tensor, values: Tensor) -> None:
        """The second pass."""
        if self.errors is None:
            shape = (len(self.candidates), self.groups)
            self.errors = torch.zeros(shape, dtype=torch.float64, device=values.device)
        candidates = [candidate[rows] for candidate in self.candidates]
        self.errors[:, rows] += numerics.squared_errors(values, candidates, self.spec)

    def end_pass(self) -> None:
        if self.candidates is not None:
            return
        los = self.low.kept.new_empty(len(numerics.PERCENTILES), self.groups)
        his = torch.empty_like(los)
        for n in self.count.unique().tolist():  # groups of equal size together
            rows = (self.count == n).nonzero().squeeze(1)  # (r,)
            k = numerics.tail_size(n)
            low = self.low.smallest(rows, k)  # (r, k)
            high = -self.high.smallest(rows, k)  # (r, k)
            los[:, rows], his[:, rows] = numerics.percentile_ranges(low, high, n)
        self.candidates = numerics.candidate_params(los, his, self.spec)
        # their memory is free for the second pass
        self.low = None
        self.high = None

    def params(self) -> QParams:
        if self.errors is None:
            raise RuntimeError("an exact observer needs two passes over the calibration rows")
        return numerics.pick_least_error(self.candidates, self.errors)


class Tail:
    """The smallest values of g groups.

    Attributes:
        kept: (g, k), ascending and padded with infinity.
        dropped: (g,), the smallest value of each group that was not kept.
    """

    def __init__(self, groups: int, like: Tensor) -> None:
        self.kept = like.new_empty(groups, 0)
        self.dropped = like.new_full((groups,), torch.inf)

    def update(self, rows: Tensor, values: Tensor, keep: int) -> None:
        """Take values (r, n) in and keep the `keep` smallest of each group."""
        # one more than is kept, to know the smallest one that is dropped
        size = min(keep + 1, values.shape[1])
        smallest = values.topk(size, dim=1, largest=False).values  # (r, size)
        merged = torch.cat((self.kept[rows], smallest), dim=1).sort(dim=1).values
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
        self.lo: Tensor | None = None  # (g,)
        self.hi: Tensor | None = None  # (g,)
        self.counts: Tensor | None = None  # (g, BINS)

    def centres(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Middle of every bin, (r, BINS)."""
        steps = (torch.arange(self.BINS, device=self.lo.device) + 0.5) / self.BINS
        return self.lo[rows, None] + (self.hi - self.lo)[rows, None] * steps

    def _add(self, rows: Tensor, values: Tensor, weights: Tensor) -> None:
        """Count values (r, n) of the groups `rows`, each as often as its weight (r, n) says."""
        lo = self.lo[rows, None]
        width = (self.hi - self.lo)[rows, None] / self.BINS
        # all values of a group may be equal
        width = width.clamp(min=torch.finfo(values.dtype).tiny)
        bins = ((values - lo) / width).long().clamp_(0, self.BINS - 1)  # (r, n)
        self.counts[rows] = self.counts[rows].scatter_add(1, bins, weights)

    def update(self, rows: Tensor, values: Tensor) -> None:
        lo, hi = numerics.group_extrema(values)  # (r,) each
        if self.counts is None:
            self.lo = lo.new_full((self.groups,), torch.inf)
            self.hi = lo.new_full((self.groups,), -torch.inf)
            shape = (self.groups, self.BINS)
            self.counts = torch.zeros(shape, dtype=torch.float64, device=values.device)
        if bool(((lo < self.lo[rows]) | (hi > self.hi[rows])).any()):
            self._widen(rows, lo, hi)
        once = torch.ones((), dtype=torch.float64, device=values.device)
        self._add(rows, values, once.expand_as(values))

    def _widen(self, rows: Tensor, lo: Tensor, hi: Tensor) -> None:
        """Stretch the ranges of groups to hold lo and hi (r,), and count anew what was counted."""
        lo = torch.minimum(self.lo[rows], lo)
        hi = torch.maximum(self.hi[rows], hi)
        centres = self.centres(rows)  # (r, BINS), of the old range
        counts = self.counts[rows]  # (r, BINS)
        self.lo[rows] = lo
        self.hi[rows] = hi
        self.counts[rows] = 0.0
        # the centres of a group that is new are not numbers
        self._add(rows, torch.where(counts > 0, centres, lo[:, None]), counts)

    def end_pass(self) -> None:
        pass

    def quantile(self, p: float) -> Tensor:
        """The quantile (g,) of every group, linear between order statistics at bins' middles."""
        cdf = self.counts.cumsum(dim=1)  # (g, BINS)
        centres = self.centres()

        def order_statistic(rank: Tensor) -> Tensor:
            bins = torch.searchsorted(cdf, rank, right=True).clamp(max=self.BINS - 1)  # (g, 1)
            return centres.gather(1, bins)

        rank = p * (cdf[:, -1:] - 1)  # (g, 1)
        below = order_statistic(rank.floor())
        above = order_statistic(rank.ceil())
        return torch.lerp(below, above, rank.frac().to(below.dtype)).squeeze(1)

    def params(self) -> QParams:
        lows = []
        highs = []
        for percentile in numerics.PERCENTILES:
            lows.append(self.quantile(1 - percentile))
            highs.append(self.quantile(percentile))
        # (3, g) each
        candidates = numerics.candidate_params(torch.stack(lows), torch.stack(highs), self.spec)
        centres = self.centres()  # (g, BINS)
        errors: list[Tensor] = []
        for candidate in candidates:
            rounded = numerics.simulate_format(centres, candidate.view(-1, 1), self.spec)
            errors.append(((rounded - centres).pow(2) * self.counts).sum(dim=1))
        return numerics.pick_least_error(candidates, torch.stack(errors))
