"""The range rule `grid`: for every group the range of least squared error among many candidates.

The three percentiles of `percentile_mse` were made for 8 bits and groups of millions of values. A
row of a weight has a few hundred, and at 4 bits its best range may be .6 of what it covers. Here
the ends of the observed range are drawn in together first, then each end alone:

    (lo, hi) = f (min, max),   f = 1, .95, ..., .4;     then lo <- g lo;     then hi <- g hi,
    g = 1.15, 1.1, 1.05, .95, .9, .85, .8, and after both ends once more with g = .975, 1.025

The error of a candidate is a sum over all values of the group, so values are needed at once, not as
a stream: the rule belongs to weights and to `fitting.py`, which holds a block's inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.numbers.numerics import (
    QParams,
    finite_extrema,
    join_params,
    params_from_range,
    simulate_format,
)
from ptq.spec import QuantSpec

TOGETHER = tuple(1 - 0.05 * step for step in range(13))
APART = (1.15, 1.1, 1.05, 0.95, 0.9, 0.85, 0.8)
FINE = (0.975, 1.025)
# values searched at a time: what a processor's cache, or a GPU, takes well
CHUNK_CPU = 2**18
CHUNK_GPU = 2**26


def search_ranges(values: Tensor, spec: QuantSpec) -> QParams:
    """Parameters (G,) of groups of values (G, n) by the rule above.

    Raises:
        NonFiniteError: values contain NaN or infinity.
    """
    lo, hi = finite_extrema(values)
    chunk = CHUNK_GPU if values.is_cuda else CHUNK_CPU
    groups = max(1, chunk // values.shape[1])
    # groups are independent, so the chunks change no result
    parts = []
    for begin in range(0, len(values), groups):
        chosen = slice(begin, begin + groups)
        parts.append(_search(values[chosen], lo[chosen], hi[chosen], spec))
    return join_params(parts)


def _search(values: Tensor, lo: Tensor, hi: Tensor, spec: QuantSpec) -> QParams:
    """`search_ranges` of groups whose extrema lo, hi (G,) are known."""
    best = Best(values, lo, hi, spec)
    for factor in TOGETHER[1:]:
        best.attempt(lo * factor, hi * factor)
    # the low end first, then the high end beside the low end that was found
    for factors in (APART, FINE):
        low = best.lo
        for factor in factors:
            best.attempt(low * factor, best.hi)
        high = best.hi
        for factor in factors:
            best.attempt(best.lo, high * factor)
    return params_from_range(best.lo, best.hi, spec)


class Best:
    """The best range so far of every group of values (G, n)."""

    def __init__(self, values: Tensor, lo: Tensor, hi: Tensor, spec: QuantSpec) -> None:
        self.values = values
        self.spec = spec
        self.lo = lo
        self.hi = hi
        self.error = self.error_of(lo, hi)

    def error_of(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Root of the summed squared error (G,) under the ranges lo, hi (G,)."""
        params = params_from_range(lo, hi, self.spec).view(-1, 1)
        if self.spec.format == "int":  # in place: a third of the time is memory
            rounded = self.values / params.scale  # (G, n)
            rounded.round_().add_(params.zero_point).clamp_(0, self.spec.levels - 1)
            rounded.sub_(params.zero_point).mul_(params.scale)
        else:
            rounded = simulate_format(self.values, params, self.spec)
        return torch.linalg.vector_norm(rounded.sub_(self.values), dim=1)

    def attempt(self, lo: Tensor, hi: Tensor) -> None:
        """Take the range over where it is better."""
        error = self.error_of(lo, hi)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.lo = torch.where(better, lo, self.lo)
        self.hi = torch.where(better, hi, self.hi)
