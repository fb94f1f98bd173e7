"""A table as data: the lines that the registry asks for, each with the paper's figures, what was
measured, its state.

A line is a cell of the registry over its seeds. Three things never mix: `paper` holds figures of
the paper, of the model that it names; `results` holds what was measured here; a line with neither
result nor failure is "not run".
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.registry import tables
from experiments.registry.labels import COST_HEADINGS, METRIC_HEADINGS, PAPER_METRICS, PAPER_MODELS
from experiments.registry.paper import paper_figures
from experiments.registry.tables import Table
from experiments.store.results import table_label
from ptq.types import ConfigError

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One cell of a table over its seeds.

    Attributes:
        point: values of the table's grid by override key; none for full precision.
        paper: the paper's figures by our name of the metric, of its model `counterpart`.
        results: by ascending seed. failures: cells that were tried and raised an error.
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
        found = [(r["cost"] if name in r["cost"] else r["metrics"]).get(name) for r in self.results]
        return [float(v) for v in found if v is not None]

    @property
    def quant(self) -> str | None:
        return self.point.get("quant")

    @property
    def bits(self) -> str:
        """W6A6 and the like; 32/32 for full precision."""
        return str(self.quant).upper() if self.quant else "32/32"

    @property
    def model_bytes(self) -> float | None:
        return next(iter(self.values("model_bytes")), None)

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
        return len({result["seed"] for line in self.lines for result in line.results})

    @property
    def done(self) -> list[Line]:
        return [line for line in self.lines if line.results]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(line.model for line in self.lines))

    def axes(self) -> list[str]:
        """Keys of the grid, beside `quant`, in which lines differ."""
        keys = dict.fromkeys(k for line in self.lines for k in line.point if k != "quant")
        return [
            k
            for k in keys
            if len({str(line.point[k]) for line in self.lines if k in line.point}) > 1
        ]

    def metrics(self) -> list[str]:
        """What the table shows of quality: its columns or all metrics, as far as any line has
        them."""
        asked = [c for c in self.table.columns or () if c not in COST_HEADINGS]
        found = dict.fromkeys(
            name for line in self.done for r in line.results for name in r["metrics"]
        )
        if not asked:
            asked = list(METRIC_HEADINGS) if self.table.what == "run" else list(found)
        return [name for name in asked if any(line.values(name) for line in self.done)]

    def paper_metrics(self) -> list[str]:
        """Of which metrics the paper says something."""
        return [name for name in PAPER_METRICS if any(name in line.paper for line in self.lines)]

    def headline(self) -> str | None:
        """The metric that pictures show: the KL where there is one."""
        return next(
            (
                m
                for m in ("kl", "fid", "fid2fp", *self.metrics())
                if any(x.values(m) for x in self.done)
            ),
            None,
        )

    def restricted(self, keep: Mapping[str, Sequence[str]]) -> Sheet:
        """The lines whose model, row or values of the grid are among the given ones; what has no
        such value stays.

        Raises:
            ConfigError: a key is none of these, or a value none of its.
        """
        for key, values in keep.items():
            known = {self._value(line, key) for line in self.lines} - {None}
            for value in values:
                if value not in known:
                    raise ConfigError(
                        f"{key}: {value!r} is not one of {', '.join(sorted(known)) or 'no values'}"
                    )
        lines = tuple(
            line
            for line in self.lines
            if all(self._value(line, k) in (None, *values) for k, values in keep.items())
        )
        return Sheet(self.table, self.scale, lines, self.strays)

    @staticmethod
    def _value(line: Line, key: str) -> str | None:
        if key in ("model", "row"):
            return getattr(line, key)
        return str(line.point[key]) if key in line.point else None


def build(table: Table, scale: str, results: Sequence[Result], picks: Sequence[str] = ()) -> Sheet:
    """The sheet of a table: the cells of the registry, in its order, with the results that are
    theirs.

    `picks` are overrides that pick a part of the table (`registry.tables.table_cells`).

    Raises:
        ConfigError: a cell stands twice with the same seed, or sizes of evaluation differ between
            results.
    """
    found: dict[tuple[str, str], dict[int, Result]] = {}
    unplaced = [r["provenance"]["hash"] for r in results if "table" not in r]
    results = [r for r in results if "table" in r]
    for result in results:
        place = _place(result["table"]["row"], result["table"]["point"])
        if result["seed"] in found.setdefault(place, {}):
            raise ConfigError(
                f"results: {table.name}: {result['table']['row']} at {dict(result['table']['point'])} stands twice "
                f"with seed {result['seed']}; every row needs one result a seed"
            )
        found[place][result["seed"]] = result
    sizes = {
        (p.get("images"), p.get("sequences"))
        for r in results
        for p in [r.get("provenance", {})]
        if p
    }
    if table.what == "run" and len(sizes) > 1:
        raise ConfigError(
            f"results: {table.name} mixes evaluations of different sizes, {sorted(sizes, key=str)}"
        )
    lines = []
    for cell in tables.table_cells(table, scale, [0], picks):
        of_cell = sorted(found.pop(_place(cell.row, cell.point), {}).items())
        point = {k: v for k, v in cell.point.items() if k != "model"}
        model = cell.point["model"]
        lines.append(
            Line(
                model,
                cell.row,
                point,
                PAPER_MODELS.get(model, ""),
                paper_figures(table, model, cell.row, point.get("quant")),
                tuple(r for _, r in of_cell if "error" not in r),
                tuple(r for _, r in of_cell if "error" in r),
            )
        )
    order = {model: n for n, model in enumerate(dict.fromkeys(line.model for line in lines))}
    lines.sort(key=lambda line: order[line.model])  # stable: within a model the registry's order
    strays = [f"{table.name}: {row} at {point} is no cell of the table" for row, point in found]
    strays += [
        f"{table.name}: the result of run {key} does not say of which cell it is"
        for key in unplaced
    ]
    return Sheet(table, scale, tuple(lines), tuple(strays))


def _place(row: str, point: Mapping[str, Any]) -> tuple[str, str]:
    return row, json.dumps(dict(point), sort_keys=True)


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None
