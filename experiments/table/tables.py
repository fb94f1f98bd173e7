"""Run the cells of a request, and write the tables that they fill."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from experiments.registry import tables as registry
from experiments.registry.tables import Cell, Table
from experiments.store import results
from experiments.store.files import write_json
from experiments.table import engine as engines
from experiments.table import jobs
from experiments.table.engine import Engine
from experiments.table.job_board import Board, shared_board
from experiments.table.jobs import Job
from experiments.table.local import Local
from experiments.table.request import Request, picked, runs_of
from experiments.table.slurm import Slurm
from experiments.table.workers import work


def run_request(request: Request) -> dict[str, list[dict[str, Any]]]:
    """Run all cells of a request; the results of every table in the order of its cells, failed ones
    with "error"."""
    todo: dict[str, None] = {}
    of_cell: list[tuple[str, Cell, Job]] = []
    for name, cells in request.cells.items():
        table = registry.find_table(name)
        for cell in cells:
            judging = request.judging if table.what == "run" else None
            job = Job(table.what, cell.overrides, dict(table.options), judging)
            of_cell.append((name, cell, job))
            todo[job.text()] = None
    with shared_board(runs_of(request), [Job.parse(text) for text in todo]) as made:
        outcomes = dict(zip(todo, run_jobs(request.engine, made)))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in request.cells}
    for name, cell, job in of_cell:
        place = {"name": name, "scale": request.scale, "row": cell.row, "point": dict(cell.point)}
        outcome = outcomes[job.text()]
        if "error" in outcome:
            outcome = {**outcome, "overrides": list(cell.overrides), "seed": cell.seed}
        found[name].append({**outcome, "table": place})
    return found


def run_jobs(engine: Engine, board: Board) -> list[dict[str, Any]]:
    """Do all jobs of a board; their outcomes in order."""
    if engine.name == "inproc":
        import torch

        if engine.threads is not None:
            torch.set_num_threads(engine.threads)
        work(board, show=True)
    else:
        workers = Local(engine, board) if engine.name == "local" else Slurm(engine, board)
        engines.watch(board, workers)
        for line in engines.warnings_of(workers.logs):
            print(line, file=sys.stderr)
    lost = {"error": "no process finished it", "traceback": ""}
    return [board.outcome(i) or lost for i in range(len(board.jobs))]


def write_table(table: Table, found: list[dict[str, Any]], request: Request) -> Path:
    """Write a table's results and what is rendered of them, and print it; returns the folder."""
    runs = runs_of(request)
    folder = jobs.folder_of(str(runs)) / folder_name(table, request)
    write_json(folder / "results.json", found)
    from experiments.render.files import table_files  # pandas, which nothing before it needs

    text = table_files(table, found, folder, request.scale, runs, picked(table, request.overrides))
    print(f"\n{table.title}\n\n{text}\n")
    for result in found:
        if "error" in result:
            print(f"failed: {' '.join(result['overrides'])}: {result['error']}", file=sys.stderr)
    print("written:")
    for path in sorted(folder.iterdir()):
        print(f"  {path}")
    return folder


def folder_name(table: Table, request: Request) -> str:
    """Where a table's files belong; a part of it, which `row=`, `model=` and the like pick, stands
    beside the whole."""
    parts = [results.table_label(table.name, request.scale), *picked(table, request.overrides)]
    return "-".join(re.sub(r"[^\w.,=+]+", "_", part) for part in parts)
