"""The registry of tables and figures: `conf/table/registry.yaml` as values.

A table is a set of rows (a label and the Hydra overrides it stands for) times the models of a scale
times a grid of further overrides times seeds. `scale=twin` runs it on the shipped twins,
`scale=paper` on the released presets; rows and grid are the same. Labels are those of
`experiments/paper/quality.csv` where the paper has the row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import yaml

from experiments.config.compose import CONF
from experiments.registry.labels import COSTS, METRICS
from ptq.types import ConfigError, require

REGISTRY = CONF / "table" / "registry.yaml"
SCALES = ("twin", "paper")
WHATS = (  # `run`, or a measurement of experiments/analyses/measurement.py, or experiments.speed
    "run",
    "recipes",
    "perturbation",
    "approximation",
    "ordering",
    "cross_terms",
    "invariance",
    "outliers",
    "speed",
)
PLOTS = ("bars", "ablation", "curve", "pareto", "trials")
FULL_PRECISION = "method=fp"


@dataclass(frozen=True)
class Cell:
    """One cell of a table: its row and its values of model and grid, the seed, and all Hydra
    overrides."""

    row: str
    point: Mapping[str, Any]
    seed: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """An entry of the registry.

    Attributes:
        rows: overrides by label. models: presets by scale. grid: values by override key. extra:
            labels of rows that are not in the paper's table. exclude: cells to leave out, each by
            some or all of row, model and grid values.
        columns: what the table shows (`METRICS`, `COSTS`, or metrics of an analysis); None stands
            for all metrics.
        full: overrides that go with a run's `eval=full`, the command line's first: what the
            committed results are made with.
        what: `run`, or the measurement that makes it (`WHATS`), with its `options`. seeds: at most
            so many.
        reproduces: what of the paper. paper: tables of quality.csv. claims: names in
            `experiments/render/claims.py`.
        expected, cost: in words, for scale=twin. plot: how the results are drawn best.
    """

    name: str
    title: str
    rows: Mapping[str, str]
    models: Mapping[str, Sequence[str]]
    cost: str
    expected: str
    what: str = "run"
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    exclude: Sequence[Mapping[str, Any]] = ()
    extra: Sequence[str] = ()
    columns: Sequence[str] | None = None
    reproduces: str = ""
    paper: Sequence[str] = ()
    claims: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    full: Sequence[str] = ("sampler.microbatch=2500",)
    seeds: int | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        require("what", self.what, WHATS)
        require("plot", self.plot, (None, *PLOTS))
        for scale in self.models:
            require("models", scale, SCALES)
        if self.what == "run":
            for column in self.columns or ():
                require("columns", column, (*METRICS, *COSTS))
        for label in self.extra:
            require("extra", label, tuple(self.rows))
        for cell in self.exclude:
            if not cell or not all(value in self.values(key) for key, value in cell.items()):
                axes = ", ".join(("row", "model", *self.grid))
                raise ConfigError(
                    f"exclude: {dict(cell)} matches no cell, allowed are values of {axes}"
                )

    def values(self, axis: str) -> Sequence[Any]:
        """The values of `row`, `model` (of all scales) or a key of the grid; none of anything
        else."""
        if axis == "row":
            return tuple(self.rows)
        if axis == "model":
            return tuple(itertools.chain(*self.models.values()))
        return self.grid.get(axis, ())

    def full_precision(self, row: str) -> bool:
        """Whether a row is full precision, which neither grid nor calibration change."""
        return FULL_PRECISION in self.rows[row].split()

    def excluded(self, row: str, point: Mapping[str, Any]) -> bool:
        """Whether the cell of this row and these values is left out."""
        return any(cell.items() <= {"row": row, **point}.items() for cell in self.exclude)


@cache
def tables() -> Mapping[str, Table]:
    """All tables by name, in the order of the file.

    Raises:
        ConfigError: an entry has a field that is unknown, missing or wrong; the line names the
            table.
    """
    entries = yaml.safe_load(REGISTRY.read_text())
    return {
        name: entry(name, values) for name, values in entries.items() if not name.startswith(".")
    }


def entry(name: str, values: Mapping[str, Any]) -> Table:
    """The table that an entry of the file describes.

    Raises:
        ConfigError: as `tables` says.
    """
    known = {f.name for f in fields(Table)} - {"name"}
    for key in values:
        if key not in known:
            raise ConfigError(
                f"registry: {name}.{key}: no such field, allowed are {', '.join(sorted(known))}"
            )
    try:
        return Table(name, **values)
    except ConfigError as error:
        raise ConfigError(f"registry: {name}.{error}") from error
    except TypeError as error:
        raise ConfigError(f"registry: {name}: {error}") from error


def table(name: str) -> Table:
    """The table called `name`.

    Raises:
        ConfigError: there is none.
    """
    require("name", name, tuple(tables()))
    return tables()[name]


def text(key: str, value: Any) -> str:
    """An override of Hydra."""
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def cells(
    chosen: Table, scale: str, seeds: Sequence[int], overrides: Sequence[str] = ()
) -> Iterator[Cell]:
    """The cells of a table at a scale: full precision first, once per model and seed, then seed by
    seed.

    `overrides` go to every cell and win over those of rows and of `full`. One of `model` or of a
    key of the grid picks these values, separated by commas, of that axis; `row=LABEL` picks a row.
    At `scale=paper` models are sampled as the released code does and 50,000 images are made, unless
    `overrides` say otherwise.

    Raises:
        ConfigError: the table is not made at that scale, or an override picks no cell or changes
            methods or seeds.
    """
    require("scale", scale, SCALES)
    if scale not in chosen.models:
        raise ConfigError(
            f"scale: {chosen.name} is not made at {scale!r}, allowed is {', '.join(chosen.models)}"
        )
    seeds = seeds[: chosen.seeds]
    axes = {"model": chosen.models[scale], **chosen.grid}
    picked = {k: v for k, _, v in (o.partition("=") for o in overrides) if k in (*axes, "row")}
    rows = [picked.pop("row")] if "row" in picked else list(chosen.rows)
    require("row", rows[0], tuple(chosen.rows))
    overrides = [o for o in overrides if o.partition("=")[0] not in (*picked, "row")]
    for key, values in picked.items():
        axes[key] = [yaml.safe_load(value) for value in dict.fromkeys(values.split(","))]
        for value in axes[key]:
            require(key, value, tuple(chosen.models[scale] if key == "model" else chosen.grid[key]))
    general = ("sampler=ptq4arvg", "eval=adm50k") if scale == "paper" else ()
    if scale == "twin" and "eval=full" in overrides and chosen.what == "run":
        general = tuple(chosen.full)
    given = {o.partition("=")[0].lstrip("+~") for o in overrides}
    for name in given & {"method", "seed"}:
        raise ConfigError(
            f"{name}: the rows and seeds of a table are its own, allowed are name= and seeds="
        )

    def cell(row: str, point: Mapping[str, Any], seed: int) -> Cell:
        parts = [
            *chosen.rows[row].split(),
            *(text(k, v) for k, v in point.items()),
            f"seed={seed}",
            *general,
        ]
        return Cell(
            row, point, seed, (*(p for p in parts if p.partition("=")[0] not in given), *overrides)
        )

    plain = [row for row in rows if chosen.full_precision(row)]
    for model, seed, row in itertools.product(axes["model"], seeds, plain):
        yield cell(row, {"model": model}, seed)
    for seed, values in itertools.product(seeds, itertools.product(*axes.values())):
        point = dict(zip(axes, values))
        for row in rows:
            if row not in plain and not chosen.excluded(row, point):
                yield cell(row, point, seed)


# --- the paper's numbers
