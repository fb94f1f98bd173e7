"""Methods side by side over several models: one metric, a line a method, a column a model."""

from __future__ import annotations

import math

import pandas as pd

from experiments.render.numbers import NOTHING, find_heading, format_mean
from experiments.render.sheet import Sheet
from experiments.render.text import TextTable, describe_lines

HIGHER_IS_BETTER = ("is", "precision", "recall", "agreement")


def compare_models(sheet: Sheet, metric: str) -> TextTable:
    """Means over seeds of one metric, the best of each model in bold."""
    lines = describe_lines(sheet).join(sheet.over_seeds(metric).astype(float))
    lines = lines.dropna(subset="mean")
    means = lines.pivot(index="label", columns="model", values="mean")
    # the order of the table, not of the alphabet
    means = means.reindex(index=lines["label"].unique(), columns=lines["model"].unique())
    best = means.max() if metric in HIGHER_IS_BETTER else means.min()  # index: model
    digits = find_heading(metric)[1]
    cells = pd.DataFrame({"Method": means.index})
    for model in means:
        texts = []
        for mean in means[model]:
            texts.append(format_best(mean, mean == best[model], digits))
        cells[f"`{model}`"] = texts
    return TextTable(cells.astype(str))


def format_best(mean: float, is_best: bool, digits: int | None) -> str:
    """A mean, in bold where it is the best."""
    text = format_mean(mean, math.nan, digits)
    return f"**{text}**" if is_best and text != NOTHING else text
