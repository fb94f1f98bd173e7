"""A table as data: the lines that the registry asks for, with what was measured and their state.

A line is a cell of the registry over its seeds. Three things never mix: `paper` holds figures of
the paper, of the model that it names; `results` holds what was measured here; a line with neither
result nor failure is "not run". `Sheet.results` and `Sheet.figures` have the same as data frames.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from experiments.registry import tables
from experiments.registry.labels import (
    COST_HEADINGS,
    METRIC_HEADINGS,
    PAPER_METRICS,
    PAPER_MODELS,
    describe_hidden,
)
from experiments.registry.paper import paper_figures
from experiments.registry.tables import Cell, Table
from experiments.render.numbers import SPENT_HEADINGS, deviation_over_seeds, mean_over_seeds
from experiments.store.results import is_shown, table_label
from ptq.spec import ConfigError

Result = Mapping[str, Any]
Place = tuple[str, str]  # a row, and its point as text
PLACE = ["table", "scale", "model", "row"]  # columns that say of which line a figure is
FULL_BITS = "32/32"  # `Line.bits` of full precision
HEADLINES = ("kl", "fid", "fid2fp")  # metrics that pictures show, the first that there is


@dataclass(frozen=True)
class Line:
    """One cell of a table over its seeds.

    Attributes:
        point: values of the table's grid by override key; none for full precision.
        counterpart: the model of the paper that `paper` is of.
        paper: the paper's figures by our name of the metric.
        results: by ascending seed.
        failures: cells that were tried and raised an error.
    """

    model: str
    row: str
    point: Mapping[str, Any]
    counterpart: str
    paper: Mapping[str, float]
    results: tuple[Result, ...]
    failures: tuple[Result, ...]

    def values(self, name: str) -> list[float]:
        """What was measured of a metric or cost, one number a seed."""
        values = []
        for result in self.results:
            part = result["cost"] if name in result["cost"] else result["metrics"]
            if part.get(name) is not None:
                values.append(float(part[name]))
        return values

    @property
    def quant(self) -> str | None:
        return self.point.get("quant")

    @property
    def bits(self) -> str:
        """W6A6 and the like; `FULL_BITS` for full precision."""
        return str(self.quant).upper() if self.quant else FULL_BITS

    @property
    def model_bytes(self) -> float | None:
        sizes = self.values("model_bytes")
        return sizes[0] if sizes else None  # alike for all seeds

    @property
    def tried(self) -> bool:
        """Whether anything of it was run."""
        return bool(self.results or self.failures)

    def state(self, seeds: int) -> str:
        """`measured` with all of `seeds` seeds, `n of m seeds`, `failed`, or `not run`."""
        if self.failures:
            return "failed"
        if not self.results:
            return "not run"
        return "measured" if len(self.results) == seeds else f"{len(self.results)} of {seeds} seeds"


@dataclass(frozen=True)
class Sheet:
    """A table of the registry at a scale, line by line in its order.

    Attributes:
        strays: results that no line asks for, a sentence each.
    """

    table: Table
    scale: str
    lines: tuple[Line, ...]
    strays: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its folder: results at another scale than the twins' stand apart."""
        return table_label(self.table.name, self.scale)

    @property
    def seeds(self) -> int:
        """How many there are over all lines; a line may have fewer."""
        return self.results["seed"].nunique()

    @property
    def done(self) -> list[Line]:
        """The lines that have results."""
        return [line for line in self.lines if line.results]

    @property
    def models(self) -> list[str]:
        """The models of all lines, each once."""
        return name_models(self.lines)

    @cached_property
    def grid(self) -> list[str]:
        """Keys of the grid that any line has."""
        keys: dict[str, None] = {}  # in the order of the lines
        for line in self.lines:
            keys.update(dict.fromkeys(line.point))
        return list(keys)

    @cached_property
    def places(self) -> pd.DataFrame:
        """The lines: table, scale, model, row, values of the grid, and state."""
        records = []
        for line in self.lines:
            place = [self.table.name, self.scale, line.model, line.row]
            values = [line.point.get(key) for key in self.grid]
            records.append([*place, *values, line.state(self.seeds)])
        # objects: an integer stays one beside a missing value
        return pd.DataFrame(records, columns=[*PLACE, *self.grid, "state"], dtype=object)

    @cached_property
    def results(self) -> pd.DataFrame:
        """The results: number of the line, its place, the seed, and all metrics and costs."""
        records = []
        for number, line in enumerate(self.lines):
            place = {"table": self.table.name, "scale": self.scale}
            place |= {"line": number, "model": line.model, "row": line.row, **line.point}
            for result in line.results:
                known = {name: result["cost"].get(name) for name in SPENT_HEADINGS}
                records.append({**place, "seed": result["seed"], **result["metrics"], **known})
        columns = ["line", *PLACE, *self.grid, "seed", *self.measured, *SPENT_HEADINGS]
        return pd.DataFrame(records, columns=columns, dtype=object)  # one row per result

    @cached_property
    def figures(self) -> pd.DataFrame:
        """Mean, standard deviation and number of seeds, by line and metric or cost."""
        names = [*self.measured, *SPENT_HEADINGS]
        # long form: line, seed, figure, value; one row per figure that there is
        values = self.results.melt(["line", "seed"], names, "figure").dropna(subset="value")
        # `mean` and `std` of pandas depend in their last bit on the order of the seeds
        return values.groupby(["line", "figure"])["value"].agg(
            mean=mean_over_seeds, std=deviation_over_seeds, seeds="count"
        )

    @cached_property
    def known(self) -> frozenset[str]:
        """The metrics and costs of which any line has a figure."""
        return frozenset(self.figures.index.get_level_values("figure"))

    @cached_property
    def paper_figures(self) -> pd.DataFrame:
        """The paper's figures and the model that they are of, by line and metric."""
        records = []
        for number, line in enumerate(self.lines):
            for metric, figure in line.paper.items():
                records.append([number, metric, line.counterpart, figure])
        frame = pd.DataFrame(records, columns=["line", "metric", "paper_model", "paper"])
        return frame.set_index(["line", "metric"])  # columns: paper_model, paper

    def over_seeds(self, name: str) -> pd.DataFrame:
        """Mean, standard deviation and seeds of a metric or cost, one line of the sheet a row."""
        # a line without a figure keeps its row, of NaN
        wanted = pd.MultiIndex.from_product([range(len(self.lines)), [name]])
        return self.figures.reindex(wanted).droplevel(1)  # index: line

    def axes(self) -> list[str]:
        """Keys of the grid, beside `quant`, in which lines differ."""
        axes = []
        for key in self.grid:
            values = self.places[key].dropna().astype(str)  # full precision has no value
            if key != "quant" and values.nunique() > 1:
                axes.append(key)
        return axes

    @cached_property
    def measured(self) -> list[str]:
        """The metrics that any result names, but for those that its images are too few for."""
        return [name for name in self.named_metrics if is_shown(name, self.images)]

    @cached_property
    def named_metrics(self) -> list[str]:
        """The metrics that any result names, in the order in which results name them."""
        names: dict[str, None] = {}
        for line in self.lines:
            for result in line.results:
                names.update(dict.fromkeys(result["metrics"]))
        return names_beside(names, SPENT_HEADINGS)

    @cached_property
    def images(self) -> int | None:
        """The fewest images that a model's runs were judged by; None of measurements that are no
        runs. A metric that these are too few for is hidden of all models."""
        if self.table.what != "run":
            return None
        counts = []
        for line in self.done:
            # `require_equal_sizes`: alike for all of a model
            images = line.results[0]["provenance"].get("images")
            if images is not None:
                counts.append(images)
        return min(counts, default=None)

    def describe_hidden(self) -> str:
        """Which metrics its images are too few for, in a sentence; "" if there are none."""
        headed = names_among(self.named_metrics, METRIC_HEADINGS)
        return describe_hidden(headed, self.images)

    def metrics(self) -> list[str]:
        """What the table shows of quality: its columns or all metrics, as far as there are any."""
        names = names_beside(self.table.columns or (), COST_HEADINGS)
        if not names:
            names = list(METRIC_HEADINGS) if self.table.what == "run" else self.measured
        shown: dict[str, None] = {}
        for name in names:
            # what judges natural images has names of its own
            shown.update(dict.fromkeys((name, f"lite0_{name}")))
        return names_among(shown, self.known)

    def paper_metrics(self) -> list[str]:
        """Of which metrics the paper says something."""
        named = self.paper_figures.index.unique("metric")
        return names_among(PAPER_METRICS, named)

    def headline(self) -> str | None:
        """The metric that pictures show: the KL where there is one."""
        for name in (*HEADLINES, *self.metrics()):
            if name in self.known:
                return name
        return None

    def restricted(self, picks: Mapping[str, Sequence[str]]) -> Sheet:
        """The lines whose model, row or values of the grid are among the given ones.

        A line that has no value of a key stays.

        Raises:
            ConfigError: a key is none of these, or a value none of its.
        """
        for key, values in picks.items():
            known = {value_of_line(line, key) for line in self.lines} - {None}
            allowed = ", ".join(sorted(known)) or "no values"
            for value in values:
                if value not in known:
                    raise ConfigError(f"{key}: {value!r} is not one of {allowed}")
        lines = self.lines
        for key, values in picks.items():
            allowed_values = (None, *values)
            lines = tuple(line for line in lines if value_of_line(line, key) in allowed_values)
        return Sheet(self.table, self.scale, lines, self.strays)


def names_among(names: Iterable[str], allowed: Container[str]) -> list[str]:
    """The names that are among the allowed ones, in their order."""
    return [name for name in names if name in allowed]


def names_beside(names: Iterable[str], others: Container[str]) -> list[str]:
    """The names that are none of the others, in their order."""
    return [name for name in names if name not in others]


def name_models(lines: Iterable[Line]) -> list[str]:
    """The models of lines, each once."""
    return list(dict.fromkeys(line.model for line in lines))


def value_of_line(line: Line, key: str) -> str | None:
    """The model or row of a line, or its value of a key of the grid; None if it has none."""
    if key in ("model", "row"):
        return getattr(line, key)
    return str(line.point[key]) if key in line.point else None


def build_sheet(
    table: Table, scale: str, results: Sequence[Result], picks: Sequence[str] = ()
) -> Sheet:
    """The sheet of a table: the cells of the registry, in its order, with their results.

    `picks` are overrides that pick a part of the table (`registry.tables.table_cells`).

    Raises:
        ConfigError: a cell stands twice with the same seed, or sizes of evaluation differ between
            results.
    """
    placed = []
    unplaced = []
    for result in results:
        (placed if "table" in result else unplaced).append(result)
    by_place = group_results(table, placed)
    require_equal_sizes(table, placed)
    lines = []
    for cell in tables.table_cells(table, scale, [0], picks):  # one seed: a line is a cell over all
        # what is left of by_place in the end belongs to no cell
        by_seed = by_place.pop(place_key(cell.row, cell.point), {})
        lines.append(make_line(table, cell, by_seed))
    models = name_models(lines)
    lines.sort(key=lambda line: models.index(line.model))  # stable: else the registry's order

    strays = []
    for row, point in by_place:
        strays.append(f"{table.name}: {row} at {point} is no cell of the table")
    for result in unplaced:
        key = result["provenance"]["hash"]
        strays.append(f"{table.name}: the result of run {key} does not say of which cell it is")
    return Sheet(table, scale, tuple(lines), tuple(strays))


def make_line(table: Table, cell: Cell, by_seed: Mapping[int, Result]) -> Line:
    """The line of a cell with its results by seed."""
    point = dict(cell.point)
    model = point.pop("model")
    results = []
    failures = []
    for seed in sorted(by_seed):
        result = by_seed[seed]
        (failures if "error" in result else results).append(result)
    return Line(
        model=model,
        row=cell.row,
        point=point,
        counterpart=PAPER_MODELS.get(model, ""),
        paper=paper_figures(table, model, cell.row, point.get("quant")),
        results=tuple(results),
        failures=tuple(failures),
    )


def group_results(table: Table, results: Sequence[Result]) -> dict[Place, dict[int, Result]]:
    """Results by their place and seed; one that stands twice is refused."""
    by_place: dict[Place, dict[int, Result]] = {}
    for result in results:
        row = result["table"]["row"]
        point = result["table"]["point"]
        by_seed = by_place.setdefault(place_key(row, point), {})
        if result["seed"] in by_seed:
            raise ConfigError(
                f"results: {table.name}: {row} at {dict(point)} stands twice "
                f"with seed {result['seed']}; every row needs one result a seed"
            )
        by_seed[result["seed"]] = result
    return by_place


def require_equal_sizes(table: Table, results: Sequence[Result]) -> None:
    """Refuse runs of a model that were judged by different numbers of images or sequences."""
    if table.what != "run":
        return
    by_model: dict[str, set[tuple[int | None, int | None]]] = {}
    for result in results:
        origin = result.get("provenance")
        if origin:  # a failed cell has none
            sizes = by_model.setdefault(result["table"]["point"]["model"], set())
            sizes.add((origin.get("images"), origin.get("sequences")))
    for model, sizes in by_model.items():
        if len(sizes) > 1:
            different = ", ".join(str(pair) for pair in sorted(sizes, key=str))
            raise ConfigError(
                f"results: {table.name} mixes evaluations of different sizes of {model}, "
                f"images and sequences: {different}"
            )


def place_key(row: str, point: Mapping[str, Any]) -> Place:
    """A row and a point, whatever the order of its keys."""
    return row, json.dumps(dict(point), sort_keys=True)
