"""A finished table in W&B: one run beside those of its cells, in the group of the table's name.

It has the figures as a table, the paper's beside ours, the same in its summary
(`<model>/<bits>/<row>/<metric>`, with `/paper` behind it for the paper's), the pictures, and all
files of the table as an artifact, which W&B keeps a version of each time.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiments.config.compose import configure
from experiments.registry.tables import Table, is_tracked, override_key
from experiments.store.tracking import Tracker
from experiments.table.request import Request

FIGURES = "table.csv"
PICTURES = {"samples": "samples.png", "plot": "plot.png"}
OF_TRACKER = ("tracker", "runs")


def track_table(table: Table, label: str, folder: Path, request: Request) -> None:
    """Show a finished table in W&B, if the request is tracked.

    A sweep's agent calls the command for single cells, under the name of one run: nothing is shown.

    Args:
        label: under which its results are filed. folder: of its files.
    """
    if not is_tracked(request.overrides) or "WANDB_RUN_ID" in os.environ:
        return
    config = configure(list(filter(is_of_tracker, request.overrides)))
    with Tracker(
        folder,
        config.tracker.mode,
        {"table": label, "seeds": list(request.seeds), "overrides": list(request.overrides)},
        name=f"table {folder.name}",
        group=config.tracker.group or table.name,
        tags=("table", label),
        job_type="table",
        project=config.tracker.project,
        entity=config.tracker.entity,
        place=Path(config.runs),
    ) as tracker:
        show_files(folder, tracker)


def is_of_tracker(override: str) -> bool:
    """Whether an override says how runs are tracked, or where they lie."""
    return override_key(override).partition(".")[0] in OF_TRACKER


def show_files(folder: Path, tracker: Tracker) -> None:
    """Show what a table's folder holds."""
    if (folder / FIGURES).is_file():
        with (folder / FIGURES).open(newline="") as file:
            columns, *rows = csv.reader(file)
        tracker.table("figures", columns, rows)
        lines = []
        for row in rows:
            lines.append(dict(zip(columns, row)))
        tracker.summary(dict(summarize_lines(lines)))
    for name, file_name in PICTURES.items():
        if (folder / file_name).is_file():
            tracker.image(name, folder / file_name)
    tracker.artifact(f"table-{folder.name}", "table", list_files(folder))


def list_files(folder: Path) -> Sequence[Path]:
    """The files of a table, in the order of their names."""
    return sorted(filter(Path.is_file, folder.iterdir()))


def summarize_lines(lines: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, float]]:
    """Every figure of `table.csv`, and the paper's, each with its name."""
    for line in lines:
        place = [line["model"], line.get("quant", ""), line["row"], line["metric"]]
        name = "/".join(filter(None, place))
        if line["mean"]:
            yield name, float(line["mean"])
        if line["paper"]:
            yield f"{name}/paper", float(line["paper"])
