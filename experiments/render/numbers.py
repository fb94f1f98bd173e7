"""Numbers and settings as text, and how they are summed up over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import pandas as pd

from experiments.registry.labels import COST_HEADINGS, METRIC_HEADINGS

NOTHING = "–"
SPENT_HEADINGS = {  # what a result says of its costs: heading and digits
    **COST_HEADINGS,
    "sampling_s": ("Sampling [s]", 1),
    "cell_s": ("Whole cell [s]", 1),
    "workers": ("Workers on the device", 0),
    "model_bytes": ("Bytes at rest", 0),
}


def mean_over_seeds(values: Sequence[float] | pd.Series) -> float:
    """The mean, rounded once: the order of the values changes no bit of it."""
    return statistics.fmean(values)


def deviation_over_seeds(values: Sequence[float] | pd.Series) -> float:
    """The sample standard deviation, rounded once; NaN of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def find_heading(name: str) -> tuple[str, int | None]:
    """How a metric or cost is called in a table, and its digits."""
    if name in SPENT_HEADINGS:
        return SPENT_HEADINGS[name]
    return METRIC_HEADINGS.get(name, (name, None))


def format_mean(mean: float, deviation: float, digits: int | None) -> str:
    """A mean, with its standard deviation unless that is NaN; nothing of a mean that is NaN.

    `digits` None stands for four significant ones. A mean of which three or more digits would leave
    less than two is written with an exponent, which the deviation has in common with it.
    """
    if math.isnan(mean):
        return NOTHING
    if digits is not None and digits > 2 and 0 < abs(mean) < 10 * 10**-digits:
        exponent = math.floor(math.log10(float(f"{abs(mean):.1e}")))  # 9.96e-4 is 1.0e-3
        unit = 10**exponent
        if math.isnan(deviation):
            return f"{mean / unit:.1f}e{exponent}"
        return f"({mean / unit:.1f} ± {deviation / unit:.1f})e{exponent}"
    form = ".4g" if digits is None else f".{digits}f"
    if math.isnan(deviation):
        return f"{mean:{form}}"
    return f"{mean:{form}} ± {deviation:{form}}"


def format_values(values: Sequence[float], digits: int | None) -> str:
    """Mean and standard deviation of values, one a seed, as `format_mean` writes them."""
    if not values:
        return NOTHING
    return format_mean(mean_over_seeds(values), deviation_over_seeds(values), digits)


def format_single(value: float | None, digits: int) -> str:
    """A number that may be missing (None or NaN)."""
    return NOTHING if value is None or math.isnan(value) else f"{value:.{digits}f}"


def format_column(figures: pd.DataFrame, digits: int | None) -> list[str]:
    """Means and deviations (`Sheet.over_seeds`), a line each."""
    pairs = zip(figures["mean"], figures["std"])
    return [format_mean(mean, deviation, digits) for mean, deviation in pairs]


def format_setting(value: object) -> str:
    """A setting as text: lists and mappings without their punctuation, yes and no."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_setting(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_setting, value)) or "none"
    return str(value)
