"""Whether two measurements of a figure agree: how far their means lie apart, and how far seeds do.

Each has one value a seed. The means of n and m seeds of one and the same thing differ by no more
than

    t s sqrt(1/n + 1/m)

in 99 of 100 cases, with s the deviation over seeds of both together and t Student's quantile for
n + m - 2 degrees of freedom. One seed has no deviation of its own: against three others, s is
theirs, and what is allowed is 11.5 s. Two single seeds say nothing of their spread. Another device
rounds sums in another order, so a difference of .2 % is always allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from experiments.render.numbers import mean_over_seeds

LEVEL = 0.99  # of two-sided intervals
ROUNDING = 0.002  # of the larger mean
AGREES = "agrees"
DIFFERS = "differs"
UNDECIDED = "one seed each"


@dataclass(frozen=True)
class Agreement:
    """Two measurements of a figure, each with one value a seed or more."""

    one: Sequence[float]
    other: Sequence[float]

    @property
    def difference(self) -> float:
        """The second mean less the first."""
        return mean_over_seeds(self.other) - mean_over_seeds(self.one)

    @property
    def rounding(self) -> float:
        """What sums in another order may change."""
        means = (mean_over_seeds(self.one), mean_over_seeds(self.other))
        return ROUNDING * max(map(abs, means))

    @cached_property
    def allowed(self) -> float:
        """The largest difference that agrees; of single seeds, which have no spread, rounding."""
        freedom = len(self.one) + len(self.other) - 2
        if freedom == 0:
            return self.rounding
        from scipy.stats import t  # takes a second to load

        squares = squared_deviations(self.one) + squared_deviations(self.other)
        deviation = math.sqrt(squares / freedom)
        quantile = float(t.ppf((1 + LEVEL) / 2, freedom))
        spread = quantile * deviation * math.sqrt(1 / len(self.one) + 1 / len(self.other))
        return max(spread, self.rounding)

    @property
    def verdict(self) -> str:
        """`AGREES`, `DIFFERS`, or `UNDECIDED` where two single seeds differ."""
        if abs(self.difference) <= self.allowed:
            return AGREES
        has_spread = len(self.one) + len(self.other) > 2
        return DIFFERS if has_spread else UNDECIDED


def squared_deviations(values: Sequence[float]) -> float:
    """The sum of squared deviations from the mean."""
    mean = mean_over_seeds(values)
    return math.fsum((value - mean) ** 2 for value in values)
