"""Run a table or figure of the registry, or all of them: every cell is a run of its own; then write
the table.

    python -m experiments.table name=reproduce python -m experiments.table name=all eval=full
    seeds=3 jobs=6 publish=true python -m experiments.table name=rar scale=paper
    reference=VIRTUAL_imagenet256_labeled.npz inception=WEIGHTS

`conf/table/registry.yaml` says what there is. Cells that are done are read; cells that fail are
recorded with their
traceback and shown as failed, and the rest goes on. Options of this command:

    name=reproduce          a table, or all scale=twin              twin: shipped models; paper:
    released presets, given their weights seeds=[0]               a list, or the number of seeds
    from 0 on engine=inproc           inproc, local, slurm (conf/engine, `engine.KEY=VALUE`); jobs=N
    stands for engine=local and
                            engine.jobs=N
    publish=false           true copies the results to experiments/results/<name>, where README tables come from
    reference=, inception=  at scale=paper: the reference batch, and the weights of Inception (`experiments.evaluate`);
    extractor=, prc_dtype=  as there

Further overrides (`eval=full`, `calib.n=64`, `tracker=wandb_offline`, ...) go to every cell; one of
the model or of a key of a table's grid picks values of it (`model=rar_twin`), and `row=LABEL` picks
a row.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from experiments import render
from experiments.config.compose import CONF, configure
from experiments.registry import tables
from experiments.registry.tables import Cell, Table
from experiments.store import results
from experiments.store.files import write_json
from experiments.table import engine as engines
from experiments.table import jobs
from experiments.table.engine import Engine
from experiments.table.job_board import Board
from experiments.table.jobs import Job
from models.weights.checkpoints import CheckpointError
from ptq.types import ConfigError, require

__all__ = ["CONF", "Request", "configure", "main", "parse", "publish", "run"]


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    names: tuple[str, ...]
    scale: str
    seeds: tuple[int, ...]
    engine: Engine
    publish: bool
    overrides: tuple[str, ...]
    judging: dict[str, Any] | None = None  # `at_scale.Judging`, at scale=paper
    cells: dict[str, list[Cell]] = field(default_factory=dict)  # by table


def parse(arguments: Sequence[str]) -> Request:
    """The request that key=value arguments make; nothing runs yet.

    Raises:
        ConfigError, CheckpointError: an argument is not allowed, or a cell's config is not; one
            line.
    """
    own = {
        "name": "reproduce",
        "scale": "twin",
        "seeds": "[0]",
        "jobs": None,
        "engine": None,
        "publish": "false",
        "reference": None,
        "inception": None,
        "extractor": "inception",
        "prc_dtype": "float32",
    }
    rest = []
    of_engine = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in own:
            own[key] = value
        elif key.startswith("engine."):
            of_engine.append(argument.removeprefix("engine."))
        else:
            rest.append(argument)
    require("scale", own["scale"], tables.SCALES)
    require("publish", own["publish"], ("true", "false"))
    if own["jobs"] is not None:
        if not own["jobs"].isdecimal() or int(own["jobs"]) < 1:
            raise ConfigError(f"jobs: {own['jobs']} is not a positive number of processes")
        of_engine.append(f"jobs={own['jobs']}")
    default = "local" if own["jobs"] not in (None, "1") else "inproc"
    engine = engines.read(own["engine"] or default, of_engine)
    every = [n for n, t in tables.tables().items() if own["scale"] in t.models]
    names = every if own["name"] == "all" else [tables.table(own["name"]).name]
    judging = None
    if own["scale"] == "paper":
        judging = {
            "reference": own["reference"],
            "weights": own["inception"],
            "extractor": own["extractor"],
            "prc_dtype": own["prc_dtype"],
            "gpus": max(engine.gpus, 1),
        }
    request = Request(
        tuple(names),
        own["scale"],
        seeds_of(own["seeds"]),
        engine,
        own["publish"] == "true",
        tuple(rest),
        judging,
    )
    check(request)
    return request


def seeds_of(text: str) -> tuple[int, ...]:
    """The seeds that `[0,1,2]` or `3` say.

    Raises:
        ConfigError: it says none.
    """
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if type(found) is int and found > 0:
        return tuple(range(found))
    if not isinstance(found, list) or not found or not all(type(s) is int for s in found):
        raise ConfigError(
            f"seeds: {text} is not a list of integers such as [0,1,2], nor how many from 0 on"
        )
    if len(set(found)) < len(found):
        raise ConfigError(f"seeds: {text} has a seed twice, which would count as two")
    return tuple(found)


def check(request: Request) -> None:
    """List the request's cells, and compose configs until every row and every value of an axis was
    in one.

    Raises:
        ConfigError, CheckpointError: one is refused, or what is to judge images is not here. A
            config that only the combination makes wrong is a cell that fails.
    """
    for name in request.names:
        table = tables.table(name)
        seen = set()
        if request.publish and (part := picked(table, request.overrides)):
            raise ConfigError(
                f"publish: true with {part[0]} would replace all of {name} by a part, allowed is false"
            )
        grouped = (
            (*request.overrides, f"tracker.group={name}")
            if table.what == "run"
            else request.overrides
        )
        request.cells[name] = list(tables.cells(table, request.scale, request.seeds, grouped))
        for cell in request.cells[name]:
            values = {(key, str(value)) for key, value in {"row": cell.row, **cell.point}.items()}
            if table.what != "speed" and not values <= seen:
                seen |= values
                configure(list(cell.overrides))
    if request.judging is not None and any(
        tables.table(name).what == "run" for name in request.names
    ):
        from experiments.table.paper_scale import Judging

        Judging(**request.judging).check()


def run(request: Request) -> dict[str, list[dict[str, Any]]]:
    """Run all cells of a request; the results of every table in the order of its cells, failed ones
    with "error"."""
    todo: dict[str, None] = {}
    of_cell: list[tuple[str, Cell, Job]] = []
    for name, cells in request.cells.items():
        table = tables.table(name)
        for cell in cells:
            judging = request.judging if table.what == "run" else None
            job = Job(table.what, cell.overrides, dict(table.options), judging)
            of_cell.append((name, cell, job))
            todo[job.text()] = None
    with shared_board(runs_of(request), [Job.parse(text) for text in todo]) as made:
        outcomes = dict(zip(todo, engines.run(request.engine, made)))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in request.cells}
    for name, cell, job in of_cell:
        place = {"name": name, "scale": request.scale, "row": cell.row, "point": dict(cell.point)}
        outcome = outcomes[job.text()]
        if "error" in outcome:
            outcome = {**outcome, "overrides": list(cell.overrides), "seed": cell.seed}
        found[name].append({**outcome, "table": place})
    return found


def runs_of(request: Request) -> Path:
    """The folder of runs that the request's cells share."""
    return Path(configure([o for o in request.overrides if o.startswith("runs=")]).runs)


@contextmanager
def shared_board(runs: Path, todo: Sequence[Job]) -> Iterator[Board]:
    """A board for the jobs, removed in the end; boards of commands that were killed are removed
    too."""
    from experiments.store.locks import Busy, hold_lock

    root = jobs.folder_of(str(runs))
    folder = root / f".board-{time.time_ns()}-{os.getpid()}"
    with ExitStack() as held:
        with hold_lock(root):  # so that nobody takes a board that is not locked yet for a stale one
            for stale in root.glob(".board-*"):
                try:
                    with hold_lock(stale, wait=False):
                        shutil.rmtree(stale, ignore_errors=True)
                except Busy:
                    continue
            held.enter_context(hold_lock(folder))
        try:
            yield Board.create(folder, todo)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write(table: Table, found: list[dict[str, Any]], request: Request) -> Path:
    """Write a table's results and what is rendered of them, and print it; returns the folder."""
    runs = runs_of(request)
    folder = jobs.folder_of(str(runs)) / folder_name(table, request)
    write_json(folder / "results.json", found)
    text = render.table_files(
        table, found, folder, request.scale, runs, picked(table, request.overrides)
    )
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


def picked(table: Table, overrides: Sequence[str]) -> list[str]:
    """The overrides that pick rows, models or values of the grid."""
    return [o for o in overrides if o.partition("=")[0] in ("row", "model", *table.grid)]


def publish(found: list[dict[str, Any]], name: str) -> Path:
    """Replace the committed results of a table by these; of the config they keep what decides the
    numbers.

    Raises:
        ConfigError: there are fewer than before; the results stay where the runs are.
    """
    folder = results.ROOT / name
    # of a publication that was killed between its two renames
    for old in results.ROOT.glob(f".{name}.old*"):
        if not folder.exists():
            os.replace(old, folder)
    former = len(results.committed_results(name)[0])
    if len(found) < former:
        raise ConfigError(
            f"publish: {len(found)} results of {name} would replace {former}, allowed are no fewer"
        )
    temporary = results.ROOT / f".{name}.tmp{os.getpid()}"
    for result in found:
        parts = [
            v
            for k, v in result["cell"].items()
            if k in ("what", "model", "method", "quant", "calib") and v
        ]
        # `identity` stays
        origin = {k: v for k, v in result["provenance"].items() if k != "config"}
        write_json(
            temporary / f"{'-'.join(parts)}-s{result['seed']}-{origin['hash']}.json",
            {**result, "provenance": origin},
        )
    old = results.ROOT / f".{name}.old{os.getpid()}"
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def main() -> None:
    try:
        request = parse(sys.argv[1:])
        found = run(request)
    except (ConfigError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    for name, of_table in found.items():
        if not of_table:
            print(f"{name}: no cell has all the values that are picked")
            continue
        write(tables.table(name), of_table, request)
        if request.publish and not any("error" in r for r in of_table):
            try:
                print(f"published: {publish(of_table, results.table_label(name, request.scale))}")
            except ConfigError as error:
                sys.exit(f"error: {error}")
    if any("error" in r for of_table in found.values() for r in of_table):
        sys.exit(1)


if __name__ == "__main__":
    main()
