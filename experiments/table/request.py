"""What `python -m experiments.table` is asked for: its arguments, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.config.compose import configure
from experiments.config.schema import RunConfig
from experiments.registry import tables
from experiments.registry.tables import Cell, Table
from experiments.table import engine as engines
from experiments.table.engine import Engine
from experiments.table.options import Arguments


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
    dry_run: bool = False
    cells: dict[str, list[Cell]] = field(default_factory=dict)  # by table


def make_request(arguments: Arguments) -> Request:
    """The request of arguments, with its cells.

    Raises:
        ConfigError, CheckpointError: a cell's config is not allowed; one line.
    """
    options = arguments.options
    engine = engines.read_engine(arguments.engine_name, arguments.engine_overrides)
    judging = None
    if options.scale == "paper":
        judging = {
            "reference": absolute_path(options.reference),
            "weights": absolute_path(options.inception),
            "extractor": options.extractor,
            "prc_dtype": options.prc_dtype,
            "gpus": max(engine.gpus, 1),
        }
    request = Request(
        names=arguments.names,
        scale=options.scale,
        seeds=arguments.seeds,
        engine=engine,
        publish=options.publish,
        overrides=arguments.overrides,
        judging=judging,
        dry_run=options.dry_run,
    )
    check_request(request)
    return request


def absolute_path(path: str | None) -> str | None:
    """A path that is found from wherever a worker runs; one where nothing lies is left as it is."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def check_request(request: Request) -> None:
    """List the request's cells; compose configs until each row and value of an axis was in one.

    Raises:
        ConfigError, CheckpointError: one is refused, or what is to judge images is not here. A
            config that only the combination makes wrong is a cell that fails.
    """
    models: dict[str, RunConfig] = {}  # a config of each, of tables of runs
    for name in request.names:
        table = tables.find_table(name)
        seen = set()  # pairs of axis and value that a composed config had
        list_cells = tables.tracked_cells if table.what == "run" else tables.table_cells
        cells = list_cells(table, request.scale, request.seeds, request.overrides)
        request.cells[name] = list(cells)
        for cell in request.cells[name]:
            values = {("row", cell.row)}
            for key, value in cell.point.items():
                values.add((key, str(value)))
            # benchmarks compose configs of their own
            if table.what != "speed" and not values <= seen:
                seen |= values
                config = configure(list(cell.overrides))
                if table.what == "run":
                    models[cell.point["model"]] = config
    if request.scale == "paper":
        from experiments.run.preparation import check_held_out  # late: it loads torch

        check_held_out(models.values())
    judges_images = request.judging is not None and "run" in tables.table_kinds(request.names)
    # what things cost is asked before the files that judge them are fetched
    if judges_images and not request.dry_run:
        from experiments.table.paper_scale import Judging

        Judging(**request.judging).check()


def picked(table: Table, overrides: Sequence[str]) -> list[str]:
    """The overrides that pick rows, models or values of the grid."""
    axes = ("row", "model", *table.grid)
    return [override for override in overrides if tables.override_key(override) in axes]


def runs_of(request: Request) -> Path:
    """The folder of runs that the request's cells share."""
    overrides = [override for override in request.overrides if override.startswith("runs=")]
    return Path(configure(overrides).runs)
