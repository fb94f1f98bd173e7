"""Run the cells of a request, and write the tables that they fill."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.registry import tables as registry
from experiments.registry.tables import Cell, Table
from experiments.store import results
from experiments.store.files import require_writable, write_json
from experiments.table import jobs
from experiments.table.engine import Engine, watch_workers, work_here
from experiments.table.job_queue import JobQueue, temporary_queue
from experiments.table.jobs import Job, Outcome
from experiments.table.local import LocalWorkers
from experiments.table.processes import fix_folders
from experiments.table.request import Request, picked, runs_of
from experiments.table.slurm import SlurmWorkers
from models.registry import has_weights
from ptq.errors import say
from ptq.files import seal_object

WORKERS = {"local": LocalWorkers, "slurm": SlurmWorkers}
LOST = {"error": "no process finished it", "traceback": ""}


@dataclass(frozen=True)
class CellJob:
    """A cell of a table, and the job that computes it; cells of two tables may be one job."""

    table: Table
    cell: Cell
    job: Job


def run_request(request: Request) -> dict[str, list[dict[str, Any]]]:
    """Run all cells of a request.

    Returns:
        By table the results in the order of its cells; those of failed cells have "error".
    """
    require_places(request)
    fix_folders()
    announce_missing_weights(request)
    cell_jobs = list_jobs(request)
    distinct: dict[str, Job] = {}  # by text: a job that several tables share is done once
    for entry in cell_jobs:
        distinct.setdefault(entry.job.text(), entry.job)
    with temporary_queue(runs_of(request), list(distinct.values())) as queue:
        outcomes = dict(zip(distinct, run_queue(request.engine, queue)))  # by text of the job
    table_results: dict[str, list[dict[str, Any]]] = {name: [] for name in request.cells}
    for entry in cell_jobs:
        outcome = outcomes[entry.job.text()]
        table_results[entry.table.name].append(place_in_table(entry, outcome, request.scale))
    return table_results


def require_places(request: Request) -> None:
    """Refuse tables that could not be written, or published, when all is computed.

    Raises:
        ConfigError: the system refuses to write there.
    """
    for name in request.cells:
        table = registry.find_table(name)
        require_writable(results_path(table, request), "runs")
        if request.publish:
            label = results.table_label(name, request.scale)
            require_writable(results.ROOT / label / "model.jsonl", "publish")


def announce_missing_weights(request: Request) -> None:
    """Say once which released models are not here, before their cells fail or download them."""
    is_given = any(override.startswith("model.weights=") for override in request.overrides)
    if request.scale != "paper" or is_given:
        return
    names: dict[str, None] = {}  # each once, in the order of the tables
    for cells in request.cells.values():
        for cell in cells:
            names[cell.point["model"]] = None
    missing = [name for name in names if not has_weights(name)]
    if missing:
        say(
            f"not here: weights of {', '.join(missing)}; they are fetched if the hub is reached, "
            "else their cells fail. python -m models add FOLDER takes in files that you have; "
            "model=NAME runs a part"
        )


def list_jobs(request: Request) -> list[CellJob]:
    """Every cell of the request with its job."""
    cell_jobs = []
    for name, cells in request.cells.items():
        table = registry.find_table(name)
        # analyses and benchmarks judge no images
        judging = request.judging if table.what == "run" else None
        for cell in cells:
            job = Job(table.what, cell.overrides, dict(table.options), judging)
            cell_jobs.append(CellJob(table, cell, job))
    return cell_jobs


def run_queue(engine: Engine, queue: JobQueue) -> list[Outcome]:
    """Do all jobs of a queue; their outcomes in order."""
    if engine.name == "inproc":
        work_here(engine, queue)
    else:
        watch_workers(queue, WORKERS[engine.name](engine, queue))
    outcomes = []
    for index in range(len(queue.jobs)):
        outcomes.append(queue.outcome(index) or LOST)
    return outcomes


def place_in_table(entry: CellJob, outcome: Outcome, scale: str) -> dict[str, Any]:
    """An outcome with its place in the table; a failed one also says what failed."""
    cell = entry.cell
    if "error" in outcome:
        outcome = {**outcome, "overrides": list(cell.overrides), "seed": cell.seed}
    place = {
        "name": entry.table.name,
        "scale": scale,
        "row": cell.row,
        "point": dict(cell.point),
    }
    return seal_object({**outcome, "table": place})


def write_table(table: Table, table_results: list[dict[str, Any]], request: Request) -> Path:
    """Write a table's results and what is rendered of them, and print it; returns the folder."""
    runs = runs_of(request)
    path = results_path(table, request)
    folder = path.parent
    write_json(path, table_results)  # before rendering, which may fail
    from experiments.render.files import table_files  # pandas, which nothing before it needs

    part = picked(table, request.overrides)
    text = table_files(table, table_results, folder, request.scale, runs, part)
    print(f"\n{table.title}\n\n{text}\n")
    print_failures(table_results)
    print("written:")
    for path in sorted(folder.iterdir()):
        print(f"  {path}")
    return folder


def print_failures(table_results: Sequence[dict[str, Any]]) -> None:
    """Say on stderr which cells failed, and why."""
    for result in table_results:
        if "error" in result:
            print(f"failed: {' '.join(result['overrides'])}: {result['error']}", file=sys.stderr)


def results_path(table: Table, request: Request) -> Path:
    """The file of a table's results, beside which stands what is rendered of them."""
    folder = jobs.tables_folder(runs_of(request)) / folder_name(table, request)
    return folder / "results.json"


def folder_name(table: Table, request: Request) -> str:
    """Where a table's files belong.

    A part of it, which `row=`, `model=` and the like pick, stands beside the whole.
    """
    label = results.table_label(table.name, request.scale)
    parts = [label, *picked(table, request.overrides)]
    # labels of rows have blanks and stars
    return "-".join(re.sub(r"[^\w.,=+]+", "_", part) for part in parts)
