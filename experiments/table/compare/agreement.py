"""Whether two measurements of a figure agree: how far their means lie apart, and how far seeds do.

Each has one value a seed. The means of n and m seeds of one and the same thing differ by no more
than

    t s sqrt(1/n + 1/m)

in 99 of 100 cases, with s the deviation over seeds of both together and t Student's quantile for
n + m - 2 degrees of freedom. One seed has no deviation of its own: against three others, s is
theirs, and what is allowed is 11.5 s. Two single seeds say nothing of their spread.

Few seeds may lie close to each other by chance, so two things are allowed whatever s is. A share p
of N images, as `agreement` is, has the deviation sqrt(p (1 - p) / N) of a draw. And another device
rounds sums in another order, which moves values across the steps of quantizers: of plain dynamic
rounding, alike for all seeds, KL differs by .6 % between an H200 and a CPU; 1 % is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from experiments.render.numbers import mean_over_seeds

LEVEL = 0.99  # of two-sided intervals
NORMAL_QUANTILE = 2.5758  # of the same level, where the deviation is known
ROUNDING = 0.01  # of the larger mean
AGREES = "agrees"
DIFFERS = "differs"
UNDECIDED = "one seed each"


@dataclass(frozen=True)
class Agreement:
    """Two measurements of a figure, each with one value a seed or more.

    Attributes:
        deviation: what a seed is known to deviate at least, 0 if nothing is known.
    """

    one: Sequence[float]
    other: Sequence[float]
    deviation: float = 0.0

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
        """The largest difference that agrees."""
        per_deviation = math.sqrt(1 / len(self.one) + 1 / len(self.other))
        known = NORMAL_QUANTILE * self.deviation * per_deviation
        freedom = len(self.one) + len(self.other) - 2
        if freedom == 0:  # single seeds have no spread
            return max(known, self.rounding)
        from scipy.stats import t  # takes a second to load

        squares = squared_deviations(self.one) + squared_deviations(self.other)
        deviation = math.sqrt(squares / freedom)
        quantile = float(t.ppf((1 + LEVEL) / 2, freedom))
        return max(quantile * deviation * per_deviation, known, self.rounding)

    @property
    def verdict(self) -> str:
        """`AGREES`, `DIFFERS`, or `UNDECIDED` where two single seeds differ."""
        if abs(self.difference) <= self.allowed:
            return AGREES
        has_spread = len(self.one) + len(self.other) > 2
        return DIFFERS if has_spread else UNDECIDED


def share_deviation(share: float, count: int) -> float:
    """The deviation of a share of `count` draws."""
    return math.sqrt(max(share * (1 - share), 0.0) / count)


def squared_deviations(values: Sequence[float]) -> float:
    """The sum of squared deviations from the mean."""
    mean = mean_over_seeds(values)
    return math.fsum((value - mean) ** 2 for value in values)
