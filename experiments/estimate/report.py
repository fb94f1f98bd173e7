"""Estimates as text: cell by cell, and hours and gigabytes per table of the paper.

from experiments.estimate.report import paper_costs, render_costs

print(render_costs(paper_costs()))     # on one H200, as Markdown
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.config.compose import configure
from experiments.estimate.cells import DONE, CellCost, Estimator, Quantity, Target, add_up
from experiments.estimate.costs import read_costs
from experiments.evaluate.references import MANIFOLD_IMAGES
from experiments.registry.tables import Cell, find_table, load_tables, table_cells

H200 = "NVIDIA H200"  # what committed results were measured on
MINUTE = 60.0
HOUR = 3600.0
GIGABYTE = 1e9
WIDE = 1.05  # a range that is narrower is not shown


@dataclass(frozen=True)
class TableCost:
    """What the cells of one model of a table take, one after the other.

    Attributes:
        seconds: of all cells. memory: the largest of a cell. disk: of all cells.
    """

    table: str
    model: str
    cells: int
    seconds: Quantity
    memory: Quantity | None
    disk: Quantity


def paper_costs(
    device: str = H200, gpus: int = 1, overrides: Sequence[str] = (), runs: str = "runs"
) -> list[TableCost]:
    """The cost of every table of released models, by table and model, one seed.

    Args:
        device: a GPU, by its name in results. gpus: that sample each cell together.
        overrides: of every cell, such as `eval=tiny`.
        runs: folder of what this machine has measured.
    """
    target = Target("cuda", device, gpus)
    costs = read_costs(Path(runs), target.device)
    priced = []
    for name, table in load_tables().items():
        if "paper" not in table.models or table.what != "run":
            continue
        for model in table.models["paper"]:
            # cells of different tables are runs of their own here, shared ones too
            estimator = Estimator(costs, target, MANIFOLD_IMAGES)
            cells = list(table_cells(table, "paper", (0,), [*overrides, f"model={model}"]))
            priced.append(price_cells(estimator, name, model, cells))
    return priced


def price_cells(estimator: Estimator, table: str, model: str, cells: Sequence[Cell]) -> TableCost:
    """The cost of some cells of a table, one after the other."""
    estimates: list[CellCost] = []
    for cell in cells:
        estimates.append(estimator.estimate(configure(list(cell.overrides))))
    memories = [estimate.memory for estimate in estimates if estimate.memory is not None]
    return TableCost(
        table,
        model,
        len(cells),
        add_up([estimate.total for estimate in estimates]),
        max(memories, key=lambda memory: memory.value, default=None),
        add_up([estimate.disk for estimate in estimates]),
    )


def render_costs(priced: Sequence[TableCost]) -> str:
    """Costs of tables as Markdown: hours, gigabytes of memory and disk, how good they are."""
    heads = ("Table", "Model", "Cells", "Hours", "GPU memory [GB]", "Disk [GB]", "Time is")
    lines = [
        f"| {' | '.join(heads)} |",
        f"|{' --- |' * len(heads)}",
    ]
    for cost in priced:
        memory = "–" if cost.memory is None else show_range(cost.memory, GIGABYTE)
        entries = (
            find_table(cost.table).title,
            f"`{cost.model}`",
            str(cost.cells),
            show_range(cost.seconds, HOUR),
            memory,
            show_range(cost.disk, GIGABYTE),
            cost.seconds.grade,
        )
        lines.append(f"| {' | '.join(entries)} |")
    return "\n".join(lines)


def show_range(quantity: Quantity, unit: float) -> str:
    """A quantity in a unit with two digits, and its range unless that is narrow."""
    value = two_digits(quantity.value / unit)
    if quantity.high <= WIDE * quantity.low:
        return value
    return f"{value} ({two_digits(quantity.low / unit)} to {two_digits(quantity.high / unit)})"


def two_digits(value: float) -> str:
    """A number with two digits that count, without an exponent."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:.0f}" if rounded >= 10 else f"{rounded:g}"


def show_seconds(quantity: Quantity) -> str:
    """A duration in the unit that suits it."""
    for unit, name in ((HOUR, "h"), (MINUTE, "min")):
        if quantity.value >= 1.5 * unit:
            return f"{show_range(quantity, unit)} {name}"
    return f"{show_range(quantity, 1.0)} s"


def show_bytes(quantity: Quantity | None) -> str:
    """Bytes in the unit that suits them."""
    if quantity is None:
        return "–"
    if quantity.value >= GIGABYTE:
        return f"{two_digits(quantity.value / GIGABYTE)} GB"
    return f"{two_digits(quantity.value / 1e6)} MB"


def show_grade(quantity: Quantity) -> str:
    """How good an estimate is, and where it comes from."""
    if quantity.grade == DONE or not quantity.source:
        return quantity.grade
    return f"{quantity.grade} ({quantity.source})"
