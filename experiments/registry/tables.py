"""The registry of tables and figures: `conf/table/registry.yaml` as values.

A table is a set of rows (a label and the Hydra overrides it stands for) times the models of a scale
times a grid of further overrides times seeds. `scale=twin` runs it on the shipped twins,
`scale=paper` on the released presets, `scale=natural` on the models of natural images; rows and
grid are the same. Labels are those of `experiments/paper/quality.csv` where the paper has the row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from experiments.options import nearest
from experiments.registry.labels import COST_HEADINGS, METRIC_HEADINGS
from ptq.config.files import CONF, conf_folders
from ptq.spec import ConfigError, require

REGISTRY = CONF / "table" / "registry.yaml"
SCALES = ("twin", "paper", "natural")
WHATS = (  # `run`, or a measurement of experiments/analyses/measurement.py, or experiments.speed
    "run",
    "recipes",
    "perturbation",
    "approximation",
    "ordering",
    "cross_terms",
    "invariance",
    "outliers",
    "sensitivity",
    "speed",
)
PLOTS = ("bars", "ranking", "ablation", "curve", "pareto", "trials")
FULL_PRECISION = "method=fp"
# models are sampled as the released code does, and judged by 50,000 images
PAPER_SCALE = ("sampler=ptq4arvg", "eval=adm50k")


@dataclass(frozen=True)
class Cell:
    """One cell of a table: its row, its values of model and grid, its seed, and all overrides."""

    row: str
    point: Mapping[str, Any]
    seed: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """An entry of the registry.

    Attributes:
        rows: overrides by label.
        models: presets by scale.
        grid: values by override key.
        extra: labels of rows that are not in the paper's table.
        exclude: cells to leave out, by some or all of row, model and grid values; a list stands for
            each of its values.
        columns: what the table shows: keys of `METRIC_HEADINGS` or `COST_HEADINGS`, or metrics of
            an analysis; None stands for all metrics.
        full: overrides that go with a run's `eval=full`, the command line's first: what the
            committed results are made with.
        what: `run`, or the measurement that makes it (`WHATS`), with its `options`.
        seeds: at most so many.
        reproduces: what of the paper.
        paper: tables of quality.csv.
        claims: names in `experiments/render/claims.py`.
        expected, cost: in words, for scale=twin.
        plot: how the results are drawn best.
        gallery: whether images of all its models make one picture, which is committed.
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
    gallery: bool = False

    def __post_init__(self) -> None:
        require("what", self.what, WHATS)
        require("plot", self.plot, (None, *PLOTS))
        for scale in self.models:
            require("models", scale, SCALES)
        if self.what == "run":  # an analysis has metrics of its own
            for column in self.columns or ():
                require("columns", column, (*METRIC_HEADINGS, *COST_HEADINGS))
        for label in self.extra:
            require("extra", label, tuple(self.rows))
        for exclusion in self.exclude:
            self.require_match(exclusion)

    def require_match(self, exclusion: Mapping[str, Any]) -> None:
        """Refuse an exclusion that names no cell."""
        matches = bool(exclusion)  # an empty one would leave out every cell
        for axis, chosen in exclusion.items():
            matches = matches and all(value in self.values(axis) for value in as_list(chosen))
        if not matches:
            axes = ", ".join(("row", "model", *self.grid))
            raise ConfigError(
                f"exclude: {dict(exclusion)} matches no cell, allowed are values of {axes}"
            )

    def values(self, axis: str) -> Sequence[Any]:
        """The values of `row`, `model` (of all scales) or a key of the grid; else none."""
        if axis == "row":
            return tuple(self.rows)
        if axis == "model":
            return tuple(itertools.chain(*self.models.values()))
        return self.grid.get(axis, ())

    def full_precision(self, row: str) -> bool:
        """Whether a row is full precision, which neither grid nor calibration change."""
        return FULL_PRECISION in self.rows[row].split()  # whole words: no longer name matches

    def keeps_samples(self, scale: str) -> bool:
        """Whether a picture of its runs' images at a scale is committed."""
        if self.gallery:
            return True
        # beside figures of the paper, which has no models of such images
        return bool(self.paper) and scale != "natural"

    def excluded(self, row: str, point: Mapping[str, Any]) -> bool:
        """Whether the cell of this row and these values is left out."""
        place = {"row": row, **point}
        for exclusion in self.exclude:
            if all(place.get(axis) in as_list(chosen) for axis, chosen in exclusion.items()):
                return True
        return False


def as_list(value: Any) -> list[Any]:
    """The values of a list, or the one value."""
    return value if isinstance(value, list) else [value]


def load_tables() -> Mapping[str, Table]:
    """The tables that ship, by name, in the order of the file.

    Raises:
        ConfigError: an entry has a field that is unknown, missing or wrong; the line names the
            table.
    """
    return read_tables(REGISTRY)


def known_tables() -> Mapping[str, Table]:
    """All tables by name, those in `conf/table/*.yaml` of plugins last.

    Raises:
        ConfigError: as above, or a plugin's table has the name of another one.
    """
    known = dict(load_tables())
    for folder in conf_folders()[1:]:
        for path in sorted((folder / "table").glob("*.yaml")):
            for name, table in read_tables(path).items():
                if name in known:
                    raise ConfigError(f"registry: {name} in {path} is the name of another table")
                known[name] = table
    return known


@cache
def read_tables(path: Path) -> Mapping[str, Table]:
    """The tables of a file by name."""
    parsed = {}
    for name, values in yaml.safe_load(path.read_text()).items():
        if not name.startswith("."):  # anchors that entries share
            parsed[name] = parse_entry(name, values)
    return parsed


def parse_entry(name: str, values: Mapping[str, Any]) -> Table:
    """The table that an entry of the file describes.

    Raises:
        ConfigError: as `tables` says.
    """
    known = sorted(field.name for field in fields(Table))
    known.remove("name")  # the entry's key
    for key in values:
        if key not in known:
            allowed = ", ".join(known)
            raise ConfigError(f"registry: {name}.{key}: no such field, allowed are {allowed}")
    try:
        return Table(name, **values)
    except ConfigError as error:
        raise ConfigError(f"registry: {name}.{error}") from error
    except TypeError as error:  # a field is missing
        raise ConfigError(f"registry: {name}: {error}") from error


def find_table(name: str, field_name: str = "name") -> Table:
    """The table called `name`.

    Args:
        field_name: what an error calls the option that names it.

    Raises:
        ConfigError: there is none.
    """
    known = known_tables()
    if name not in known:
        allowed = f"{', '.join(known)}{nearest(name, known)}"
        raise ConfigError(f"{field_name}: {name!r} is not one of {allowed}")
    return known[name]


def table_kinds(names: Iterable[str]) -> set[str]:
    """By what tables are made: `run`, or a measurement (`WHATS`).

    Raises:
        ConfigError: there is no table of a name.
    """
    kinds = set()
    for name in names:
        kinds.add(find_table(name).what)
    return kinds


def full_precision_overrides(overrides: Iterable[str]) -> tuple[str, ...]:
    """The overrides of a cell with full precision in the place of its method."""
    others = []
    for override in overrides:
        if not override.lstrip("+~").startswith("method"):
            others.append(override)
    return (*others, FULL_PRECISION)


def split_label(label: str) -> tuple[str, str]:
    """Name and scale of the table whose results are filed under a label: `methods-natural` are
    those of `methods` on the models of natural images."""
    for scale in SCALES:
        if label.endswith(f"-{scale}"):
            return label.removesuffix(f"-{scale}"), scale
    return label, SCALES[0]


def override_text(key: str, value: Any) -> str:
    """An override of Hydra."""
    words = str(value)
    # True of Python is true of YAML
    return f"{key}={words.lower() if isinstance(value, bool) else words}"


def override_key(override: str) -> str:
    """What an override sets."""
    return override.partition("=")[0]


def set_keys(overrides: Sequence[str]) -> set[str]:
    """What overrides set, add (`+`) or remove (`~`)."""
    return {override_key(override).lstrip("+~") for override in overrides}


def table_cells(
    table: Table, scale: str, seeds: Sequence[int], overrides: Sequence[str] = ()
) -> Iterator[Cell]:
    """The cells of a table at a scale: full precision once per model and seed, then seed by seed.

    `overrides` go to every cell and win over those of rows and of `full`. One of `model` or of a
    key of the grid picks these values, separated by commas, of that axis; `row=LABEL` picks a row.
    At `scale=paper` models are sampled as the released code does and 50,000 images are made, unless
    `overrides` say otherwise.

    Raises:
        ConfigError: the table is not made at that scale, or an override picks no cell or changes
            methods or seeds.
    """
    require_scale(table, scale)
    rows = pick_rows(table, overrides)
    axes = pick_axes(table, scale, overrides)
    picking = ("row", *axes)
    settings = [text for text in overrides if override_key(text) not in picking]
    require_no_axis(settings)
    general = general_overrides(table, scale, settings)
    seeds = seeds[: table.seeds]  # all if the table sets no limit

    # neither the grid nor the calibration changes full precision
    full_precision_rows = [row for row in rows if table.full_precision(row)]
    for model, seed, row in itertools.product(axes["model"], seeds, full_precision_rows):
        yield make_cell(table, row, {"model": model}, seed, general, settings)

    quantized_rows = [row for row in rows if row not in full_precision_rows]
    # seeds are the outer loop: the first seed of every cell comes before any second one
    for seed, values in itertools.product(seeds, itertools.product(*axes.values())):
        point = dict(zip(axes, values))
        for row in quantized_rows:
            if not table.excluded(row, point):
                yield make_cell(table, row, point, seed, general, settings)


def tracked_cells(
    table: Table, scale: str, seeds: Sequence[int], overrides: Sequence[str] = ()
) -> list[Cell]:
    """The cells of a table of runs, as a tracker files them: all in the group of the table's name,
    and, where they are tracked, each with its row.

    Raises:
        ConfigError: as `table_cells` says.
    """
    grouped = [*overrides, f"tracker.group={table.name}"]
    cells = []
    for cell in table_cells(table, scale, seeds, grouped):
        if is_tracked(overrides):
            row = cell.row.replace("'", r"\'")
            # in quotes: labels have blanks and stars
            cell = replace(cell, overrides=(*cell.overrides, f"tracker.row='{row}'"))
        cells.append(cell)
    return cells


def is_tracked(overrides: Sequence[str]) -> bool:
    """Whether overrides ask for W&B."""
    return any(override.startswith("tracker=wandb") for override in overrides)


def require_scale(table: Table, scale: str) -> None:
    """Refuse a scale that there is not, or that the table is not made at."""
    require("scale", scale, SCALES)
    if scale not in table.models:
        allowed = ", ".join(table.models)
        raise ConfigError(f"scale: {table.name} is not made at {scale!r}, allowed is {allowed}")


def require_no_axis(settings: Sequence[str]) -> None:
    """Refuse overrides of what rows and seeds set."""
    keys = set_keys(settings)
    for name in ("method", "seed"):
        if name in keys:
            raise ConfigError(
                f"{name}: the rows and seeds of a table are its own, allowed are name= and seeds="
            )


def pick_rows(table: Table, overrides: Sequence[str]) -> list[str]:
    """The row that an override `row=LABEL` picks; all rows without one."""
    rows = list(table.rows)
    for override in overrides:
        key, _, label = override.partition("=")
        if key == "row":
            require("row", label, tuple(table.rows))
            rows = [label]
    return rows


def pick_axes(table: Table, scale: str, overrides: Sequence[str]) -> dict[str, Sequence[Any]]:
    """The values of model and grid that overrides leave of a table."""
    axes: dict[str, Sequence[Any]] = {"model": table.models[scale], **table.grid}
    for override in overrides:
        key, _, text = override.partition("=")
        if key not in axes:
            continue
        allowed = table.models[scale] if key == "model" else table.grid[key]
        distinct = dict.fromkeys(text.split(","))  # a value given twice is one
        axes[key] = [yaml.safe_load(value) for value in distinct]  # of the registry's types
        for value in axes[key]:
            require(key, value, tuple(allowed))
    return axes


def general_overrides(table: Table, scale: str, settings: Sequence[str]) -> Sequence[str]:
    """Overrides of every cell at a scale, which `settings` win over."""
    if scale == "paper":
        return PAPER_SCALE
    if table.what == "run" and "eval=full" in settings:
        return table.full
    return ()


def make_cell(
    table: Table,
    row: str,
    point: Mapping[str, Any],
    seed: int,
    general: Sequence[str],
    settings: Sequence[str],
) -> Cell:
    """A cell with all its overrides; one of `settings` replaces another of the same key."""
    defaults = table.rows[row].split()
    for key, value in point.items():
        defaults.append(override_text(key, value))
    defaults += [f"seed={seed}", *general]
    replaced = set_keys(settings)
    overrides = [default for default in defaults if override_key(default) not in replaced]
    return Cell(row, point, seed, (*overrides, *settings))
