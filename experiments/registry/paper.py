"""The paper's numbers, from `experiments/paper/*.csv`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pandas as pd

from experiments.registry.labels import PAPER_METRICS, PAPER_MODELS
from experiments.registry.tables import Table

PAPER = Path(__file__).parents[1] / "paper"
KEYS = ["table", "model", "bits", "method"]  # of a line of quality.csv


def read_numbers(name: str, as_text: bool = False) -> pd.DataFrame:
    """A file of published numbers; what is not given is missing.

    Args:
        as_text: keep them as they are written.
    """
    return pd.read_csv(PAPER / name, dtype=str if as_text else None)


@cache
def quality_figures() -> Mapping[tuple[str, str, str, str], Mapping[str, float]]:
    """The figures of every line of quality.csv, by our name of the metric."""
    columns = {theirs: ours for ours, theirs in PAPER_METRICS.items()}
    # index: KEYS, columns: metrics by our names
    frame = read_numbers("quality.csv").set_index(KEYS).rename(columns=columns)
    figures_by_key = {}
    for key, figures in frame[list(PAPER_METRICS)].iterrows():
        figures_by_key[key] = figures.dropna().to_dict()  # the paper gives not all metrics of all
    return figures_by_key


def paper_figures(table: Table, model: str, row: str, quant: str | None) -> Mapping[str, float]:
    """What the paper's counterpart of a row says, by our name of the metric (`PAPER_METRICS`).

    Args:
        model: a preset; for a twin the preset that it stands for counts, so show such a figure as
            the paper's, of that model.
        row: the label of the row.
        quant: None for full precision.
    """
    full_precision = table.full_precision(row)
    method = "fp" if full_precision else row
    bits = "FP" if full_precision else str(quant).upper()
    for paper_table in table.paper:  # the first that has the row counts
        key = (paper_table, PAPER_MODELS.get(model, ""), bits, method)
        if key in quality_figures():
            return quality_figures()[key]
    return {}


def paper_speed() -> pd.DataFrame:
    """The lines of speed.csv: model, seq_len, batch, gpu, mode, latency_ms, peak_memory_MB."""
    return read_numbers("speed.csv")
