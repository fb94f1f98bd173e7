"""What a table should have shown: its committed results of the same size, and whether it agrees.

Committed results have three seeds, mostly of a GPU; a run of `make reproduce` has one, of a CPU. It
is one more seed: its figures agree if they lie within what one seed may be away from the mean of
three (`agreement.py`: 11.5 deviations over the committed seeds, or 1 % where these are alike).
KL and NLL are compared at the same number of held-out sequences only, since other sequences have
other likelihoods; metrics of images at the same number of images, and if these are enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.identity.results import committed_results
from experiments.registry.labels import describe_seeds, describe_sizes
from experiments.render.numbers import NOTHING, find_heading, format_values
from experiments.table.compare.agreement import AGREES
from experiments.table.compare.measured import Measured, compare_metric, group_seeds, pair_cells

MOST_ROWS = 12  # that are listed where all agree
PICTURES = ("samples.png", "plot.png")


@dataclass(frozen=True)
class Figure:
    """A metric of a cell, beside the committed one."""

    ours: Measured
    theirs: Measured
    metric: str

    @property
    def agrees(self) -> bool:
        return compare_metric(self.ours, self.theirs, self.metric).verdict == AGREES

    def __str__(self) -> str:
        heading, digits = find_heading(self.metric)
        measured = format_values(self.ours.values(self.metric), digits)
        expected = format_values(self.theirs.values(self.metric), digits)
        place = [self.ours.model, *self.ours.quantized_bits, self.ours.label]
        return f"{' '.join(place)}: {heading} {measured}, expected {expected}"


def describe_end(label: str, results: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[str]:
    """The last lines of a table's command: its pictures, what was expected, whether it agrees.

    Args:
        label: under which the table's results are committed.
        results: of the table, failed ones among them. folder: its files.
    """
    for name in PICTURES:
        if (folder / name).is_file():
            yield f"picture: {folder / name}"
    measured = []
    for result in results:
        if "error" not in result:
            measured.append(result)
    committed = committed_results(label)[0]
    if not measured or not committed:
        return
    pairs, _, _ = pair_cells(group_seeds(measured), group_seeds(committed))
    figures: list[Figure] = []
    for ours, theirs in pairs:
        figures += comparable_figures(ours, theirs)
    measured_models = {result["cell"]["model"] for result in measured}
    # others may be of other sizes
    of_models = [result for result in committed if result["cell"]["model"] in measured_models]
    yield from describe_figures(label, figures, of_models or committed)


def comparable_figures(ours: Measured, theirs: Measured) -> Iterator[Figure]:
    """The metrics that both sides have, at the same size."""
    for metric in ours.metrics:
        has_both = ours.values(metric) and theirs.values(metric)
        if has_both and ours.size(metric) == theirs.size(metric):
            yield Figure(ours, theirs, metric)


def describe_figures(
    label: str, figures: Sequence[Figure], committed: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """What was expected of figures, and which of them agree."""
    sizes = describe_sizes(committed)
    if not figures:
        kind = f"of {sizes}" if sizes else "of other cells"
        yield f"expected: nothing to compare with, committed results of {label} are {kind}"
        return
    seeds = describe_seeds({len(figure.theirs.results) for figure in figures})
    devices: dict[str, None] = {}  # each once, in the order of the results
    for result in committed:
        devices[result["provenance"].get("versions", {}).get("device", NOTHING)] = None
    shown = ", ".join(devices)
    measured = f"{seeds}, {sizes}" if sizes else seeds
    yield f"expected: committed results of {label} ({measured}; {shown})"
    differing: list[Figure] = []
    for figure in figures:
        if not figure.agrees:
            differing.append(figure)
    listed = differing or headline_figures(figures)
    if len(listed) <= MOST_ROWS or differing:
        for figure in listed:
            yield f"  {figure}"
    verdict = "agrees" if not differing else "differs"
    yield f"{verdict}: {len(figures) - len(differing)} of {len(figures)} figures within the spread"


def headline_figures(figures: Sequence[Figure]) -> list[Figure]:
    """The metric of every cell that says most: KL, else NLL, else the first that there is."""
    by_cell: dict[int, list[Figure]] = {}
    for figure in figures:
        by_cell.setdefault(id(figure.ours), []).append(figure)
    headlines = []
    for cell_figures in by_cell.values():
        headlines.append(min(cell_figures, key=headline_place))
    return headlines


def headline_place(figure: Figure) -> int:
    """The place of a metric among those that a line may show."""
    order = ("kl", "nll")
    return order.index(figure.metric) if figure.metric in order else len(order)
