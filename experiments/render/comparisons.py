"""Methods side by side over several models, one metric, a line a method, a column a model; and what
authors of rival methods publish.

Published figures stand in `experiments/paper/rivals.csv`, each with who measured it and where it
was read; one that others than the method's authors measured says `second-hand`. Nothing is quoted
from memory, so a method whose figures could not be read has none.
"""

from __future__ import annotations

import math

import pandas as pd

from experiments.registry.paper import read_numbers
from experiments.render.formats import format_markdown
from experiments.render.numbers import NOTHING, find_heading, format_mean
from experiments.render.sheet import Sheet
from experiments.render.text import TextTable, describe_lines

HIGHER_IS_BETTER = ("is", "precision", "recall", "agreement")
PUBLISHED_HEADINGS = {
    "method": "Method",
    "model": "Model",
    "bits": "Bits",
    "scope": "Scope",
    "IS": "Published: IS",
    "FID": "Published: FID",
    "precision": "Published: precision",
    "recall": "Published: recall",
    "measured_by": "Measured by",
    "source": "Source",
}


def compare_models(sheet: Sheet, metric: str) -> TextTable:
    """Means over seeds of one metric, the best of each model and bit width in bold.

    A mean of fewer seeds than others of the table says in brackets how many.
    """
    lines = describe_lines(sheet).join(sheet.over_seeds(metric).astype(float))
    lines = lines.dropna(subset="mean")
    places = ["bits", "label"]
    means = lines.pivot(index=places, columns="model", values="mean")
    # the order of the table, not of the alphabet
    order = pd.MultiIndex.from_frame(
        lines[places].drop_duplicates().sort_values("bits", key=first_places, kind="stable")
    )
    means = means.reindex(index=order, columns=lines["model"].unique())
    counts = lines.pivot(index=places, columns="model", values="seeds").reindex_like(means)
    of_bits = means.groupby(level="bits")
    best = of_bits.transform("max" if metric in HIGHER_IS_BETTER else "min")
    digits = find_heading(metric)[1]
    cells = pd.DataFrame()
    if lines["bits"].nunique() > 1:
        cells["Bits"] = order.get_level_values("bits")
    cells["Method"] = order.get_level_values("label")
    for model in means:
        texts = []
        for mean, least, count in zip(means[model], best[model], counts[model]):
            text = format_best(mean, mean == least, digits)
            texts.append(f"{text} ({count:.0f})" if count < sheet.seeds else text)
        cells[f"`{model}`"] = texts
    return TextTable(cells.astype(str))


def first_places(values: pd.Series) -> pd.Series:
    """The place at which each value comes first: a key that keeps equal ones together."""
    return values.map({value: place for place, value in enumerate(values.unique())})


def format_best(mean: float, is_best: bool, digits: int | None) -> str:
    """A mean, in bold where it is the best."""
    text = format_mean(mean, math.nan, digits)
    return f"**{text}**" if is_best and text != NOTHING else text


def published_block() -> str:
    """What authors of rival methods publish of released models, which was not measured here."""
    figures = read_numbers("rivals.csv", as_text=True)
    cells = figures[list(PUBLISHED_HEADINGS)].rename(columns=PUBLISHED_HEADINGS)
    return format_markdown(TextTable(cells))
