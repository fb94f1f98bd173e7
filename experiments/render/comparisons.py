"""Methods side by side over several models, one metric, a line a method, a column a model; where
the loss of each comes from; and what authors of rival methods publish.

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
from experiments.render.sheet import Line, Sheet
from experiments.render.text import TextTable, describe_lines, report_of

HIGHER_IS_BETTER = ("is", "precision", "recall", "agreement")
# what a method needs beyond static rounding without training: its switch, its value, in words
EXTRAS = (
    ("omniquant", True, "training"),
    ("dynamic", True, "dynamic ranges"),
    ("hadamard", True, "rotations"),
    ("svd", True, "16-bit branch"),
    ("softmax", "none", "unrounded attention weights"),
)
LARGEST = 4  # groups that a table names
ATTENTION_WEIGHTS = "attention weights"  # an activation, for all its name
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


def compare_models(sheet: Sheet, metric: str, with_extras: bool = False) -> TextTable:
    """Means over seeds of one metric, the best of each model and bit width in bold.

    A mean of fewer seeds than others of the table says in brackets how many.

    Args:
        with_extras: say what a method needs beyond static rounding (`EXTRAS`). Methods that need
            nothing come first, and the best of them has a star.
    """
    lines = describe_lines(sheet).join(sheet.over_seeds(metric).astype(float))
    lines["extras"] = list(map(list_extras, sheet.lines)) if with_extras else NOTHING
    lines = lines.dropna(subset="mean")
    models = lines["model"].unique()
    lines = lines.sort_values("extras", key=needs_more, kind="stable")
    places = ["bits", "label", "extras"]
    means = lines.pivot(index=places, columns="model", values="mean")
    # the order of the table, not of the alphabet
    order = pd.MultiIndex.from_frame(
        lines[places].drop_duplicates().sort_values("bits", key=first_places, kind="stable")
    )
    means = means.reindex(index=order, columns=models)
    counts = lines.pivot(index=places, columns="model", values="seeds").reindex_like(means)
    extras = order.get_level_values("extras")
    best = find_best(means, metric)
    starred = means.eq(find_best(means[extras == NOTHING], metric).reindex(order)) & with_extras
    digits = find_heading(metric)[1]
    cells = pd.DataFrame()
    if lines["bits"].nunique() > 1:
        cells["Bits"] = order.get_level_values("bits")
    cells["Method"] = order.get_level_values("label")
    if with_extras:
        cells["Needs beyond static rounding"] = extras
    for model in means:
        texts = []
        columns = (means[model], best[model], starred[model], counts[model])
        for mean, least, has_star, count in zip(*columns):
            text = format_best(mean, mean == least, digits)
            if has_star:
                text += " ★"
            if count < sheet.seeds:
                text += f" ({count:.0f})"
            texts.append(text)
        cells[f"`{model}`"] = texts
    return TextTable(cells.astype(str))


def list_extras(line: Line) -> str:
    """What the method of a line needs beyond static rounding, as its results record it."""
    if line.quant is None or not line.results:  # full precision has no method
        return NOTHING
    method = line.results[0]["provenance"]["identity"]["method"]
    needs = []
    for switch, value, words in EXTRAS:
        if method.get(switch) == value:
            needs.append(words)
    return ", ".join(needs) or NOTHING


def needs_more(extras: pd.Series) -> pd.Series:
    """A key that puts methods without extras first."""
    return extras != NOTHING


def find_best(means: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The best of every model and bit width, at each of its methods; NaN where there is none."""
    return means.groupby(level="bits").transform("max" if metric in HIGHER_IS_BETTER else "min")


def first_places(values: pd.Series) -> pd.Series:
    """The place at which each value comes first: a key that keeps equal ones together."""
    return values.map({value: place for place, value in enumerate(values.unique())})


def format_best(mean: float, is_best: bool, digits: int | None) -> str:
    """A mean, in bold where it is the best."""
    text = format_mean(mean, math.nan, digits)
    return f"**{text}**" if is_best and text != NOTHING else text


# --- where the loss comes from: groups of quantizers that round alone


def losses_of_kinds(line: Line) -> dict[str, float]:
    """KL with one kind of quantizer alone ("fc2 inputs", "qkv weights", "keys"), in nats per token.

    The table has the losses of single blocks of a model too; they are no kinds and left out.
    """
    report = report_of(line)
    losses = {}
    for group, loss in report["alone"].items():
        if group not in report["blocks"]:
            losses[group] = loss
    return losses


def share_of_weights(line: Line) -> float:
    """The losses of all weights alone, summed, as a share of the whole KL."""
    total = 0.0
    for group, loss in losses_of_kinds(line).items():
        if group.endswith(" weights") and group != ATTENTION_WEIGHTS:
            total += loss
    return total / line.values("kl")[0]


def format_loss(loss: float) -> str:
    """A KL as the tables of methods have it."""
    return format_mean(loss, math.nan, find_heading("kl")[1])


def arrange_groups(sheet: Sheet) -> TextTable:
    """One line per model and method: its KL, the largest groups, and the share of weights."""
    heads = ["Model", "Bits", "Method", "KL", "Largest groups alone", "All weights"]
    rows = []
    for line in sheet.done:
        ranked = sorted(losses_of_kinds(line).items(), key=lambda item: item[1], reverse=True)
        largest = ", ".join(f"{group} {format_loss(loss)}" for group, loss in ranked[:LARGEST])
        divergence = format_loss(line.values("kl")[0])
        weights = f"{share_of_weights(line):.0%}".replace("%", " %")
        rows.append([line.model, line.bits, line.row, divergence, largest, weights])
    cells = pd.DataFrame(rows, columns=heads)
    if cells["Bits"].nunique() == 1:
        cells = cells.drop(columns="Bits")
    return TextTable(cells, code=frozenset({0}))


# --- what others publish


def published_block() -> str:
    """What authors of rival methods publish of released models, which was not measured here."""
    figures = read_numbers("rivals.csv", as_text=True)
    cells = figures[list(PUBLISHED_HEADINGS)].rename(columns=PUBLISHED_HEADINGS)
    return format_markdown(TextTable(cells))
