"""What `python -m experiments.table` is asked for: its arguments, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from experiments.config.compose import configure
from experiments.registry import tables
from experiments.registry.tables import Cell, Table
from experiments.table import engine as engines
from experiments.table.engine import Engine
from ptq.types import ConfigError, require


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


def parse_request(arguments: Sequence[str]) -> Request:
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
    every = [n for n, t in tables.load_tables().items() if own["scale"] in t.models]
    names = every if own["name"] == "all" else [tables.find_table(own["name"]).name]
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
        parse_seeds(own["seeds"]),
        engine,
        own["publish"] == "true",
        tuple(rest),
        judging,
    )
    check_request(request)
    return request


def parse_seeds(text: str) -> tuple[int, ...]:
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


def check_request(request: Request) -> None:
    """List the request's cells, and compose configs until every row and every value of an axis was
    in one.

    Raises:
        ConfigError, CheckpointError: one is refused, or what is to judge images is not here. A
            config that only the combination makes wrong is a cell that fails.
    """
    for name in request.names:
        table = tables.find_table(name)
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
        request.cells[name] = list(tables.table_cells(table, request.scale, request.seeds, grouped))
        for cell in request.cells[name]:
            values = {(key, str(value)) for key, value in {"row": cell.row, **cell.point}.items()}
            if table.what != "speed" and not values <= seen:
                seen |= values
                configure(list(cell.overrides))
    if request.judging is not None and any(
        tables.find_table(name).what == "run" for name in request.names
    ):
        from experiments.table.paper_scale import Judging

        Judging(**request.judging).check()


def picked(table: Table, overrides: Sequence[str]) -> list[str]:
    """The overrides that pick rows, models or values of the grid."""
    return [o for o in overrides if o.partition("=")[0] in ("row", "model", *table.grid)]


def runs_of(request: Request) -> Path:
    """The folder of runs that the request's cells share."""
    return Path(configure([o for o in request.overrides if o.startswith("runs=")]).runs)
