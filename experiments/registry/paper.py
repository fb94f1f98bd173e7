"""The paper's numbers, from `experiments/paper/*.csv`."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from experiments.registry.labels import PAPER_METRICS, PAPER_MODELS
from experiments.registry.tables import tables

PAPER = Path(__file__).parents[1] / "paper"


@cache
def _quality() -> Mapping[tuple[str, str, str, str], Mapping[str, str]]:
    with (PAPER / "quality.csv").open() as file:
        return {(r["table"], r["model"], r["bits"], r["method"]): r for r in csv.DictReader(file)}


def paper_value(
    table_name: str, model: str, row: str, quant: str | None, metric: str
) -> float | None:
    """What the paper's counterpart of a table says: None where it says nothing.

    Args:
        table_name: of the registry. model: a preset; for a twin the preset that it stands for
            counts, so show such a value as the paper's, of that model. row: the label. quant: None
            for full precision. metric: ours (`PAPER_METRICS`); others have no value in the paper.
    """
    method = "fp" if tables()[table_name].full_precision(row) else row
    bits = "FP" if method == "fp" else str(quant).upper()
    for name in tables()[table_name].paper:
        line = _quality().get((name, PAPER_MODELS.get(model, ""), bits, method))
        if line is not None and metric in PAPER_METRICS:
            value = line[PAPER_METRICS[metric]]
            return float(value) if value else None
    return None


def paper_speed() -> list[dict[str, Any]]:
    """The lines of speed.csv: model, seq_len, batch, gpu, mode, latency_ms, peak_memory_MB (None
    where not given)."""
    with (PAPER / "speed.csv").open() as file:
        lines = list(csv.DictReader(file))
    numbers = {"seq_len": int, "batch": int, "latency_ms": float, "peak_memory_MB": float}
    return [
        {k: (numbers[k](v) if v else None) if k in numbers else v for k, v in line.items()}
        for line in lines
    ]
