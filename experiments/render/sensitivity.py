"""Where the loss of quantized models comes from: the groups of quantizers that lose most alone.

Groups are kinds of quantizers ("fc2 inputs", "qkv weights", "keys"). Blocks of a model, of which
`experiments.table name=sensitivity` has the losses too, are no kinds and left out.
"""

from __future__ import annotations

import pandas as pd

from experiments.render.sheet import Line, Sheet
from experiments.render.text import TextTable, report_of

LARGEST = 4  # groups that a table names
ATTENTION_WEIGHTS = "attention weights"  # an activation, for all its name


def losses_of_kinds(line: Line) -> dict[str, float]:
    """KL with one kind of quantizer alone, by kind, in nats per token."""
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


def arrange_groups(sheet: Sheet) -> TextTable:
    """One line per model and method: its KL, the largest groups, and the share of weights."""
    heads = ["Model", "Bits", "Method", "KL", "Largest groups alone", "All weights"]
    rows = []
    for line in sheet.done:
        ranked = sorted(losses_of_kinds(line).items(), key=lambda item: item[1], reverse=True)
        largest = ", ".join(f"{group} {loss:.4f}" for group, loss in ranked[:LARGEST])
        divergence = f"{line.values('kl')[0]:.4f}"
        weights = f"{share_of_weights(line):.0%}".replace("%", " %")
        rows.append([line.model, line.bits, line.row, divergence, largest, weights])
    cells = pd.DataFrame(rows, columns=heads)
    if cells["Bits"].nunique() == 1:
        cells = cells.drop(columns="Bits")
    return TextTable(cells, code=frozenset({0}))
