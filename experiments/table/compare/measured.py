"""What was measured of a cell, whatever folder it lies in: results by what they are results of.

A folder of runs names a run by its hash, a table by row and values of its grid. What both know are
the departures from the defaults (`identity.departures`): without the seed, the weights and the
versions of the code they say what was asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from experiments.registry.labels import METRIC_HEADINGS, method_label
from experiments.render.numbers import mean_over_seeds
from experiments.store.files import without_keys
from experiments.store.results import METRICS, is_shown
from experiments.table.compare.agreement import Agreement, share_deviation

Result = Mapping[str, Any]
# of the departures: what tells seeds apart, and what is not asked for but found
NOT_ASKED = ("seed", "weights", "version", "versions")
# what else may differ between two measurements of one thing, if that is said
CONDITIONS = ("eval", "sampler", "dtype", "judged", "plugins")
OF_SEQUENCES = ("kl", "nll")
SHARES = ("agreement", "precision", "recall")  # of the images
FULL_PRECISION = "FP"


@dataclass(frozen=True, eq=False)
class Measured:
    """A cell over its seeds.

    Attributes:
        label: the row of a table, else the method.
        results: one a seed.
    """

    label: str
    results: tuple[Result, ...]

    @property
    def model(self) -> str:
        return self.results[0]["cell"]["model"]

    @property
    def bits(self) -> str:
        """W6A6 and the like, or `FULL_PRECISION`."""
        return str(self.results[0]["cell"].get("quant") or FULL_PRECISION).upper()

    @property
    def quantized_bits(self) -> list[str]:
        """Its bits where it is quantized, for a line in words."""
        return [] if self.bits == FULL_PRECISION else [self.bits]

    @property
    def origin(self) -> Mapping[str, Any]:
        """The provenance of its first seed."""
        return self.results[0]["provenance"]

    @cached_property
    def question(self) -> dict[str, Any]:
        """What was asked: the departures without the seed, and without what was found."""
        return asked(self.results[0])

    def values(self, metric: str) -> list[float]:
        """What was measured of a metric, one number a seed."""
        values = []
        for result in self.results:
            value = result["metrics"].get(metric)
            if value is not None:
                values.append(float(value))
        return values

    @property
    def metrics(self) -> list[str]:
        """What its images are enough for; of runs that tables show."""
        images = self.origin.get("images")
        named: dict[str, None] = {}  # in the order in which results name them
        for result in self.results:
            for name in result["metrics"]:
                is_headed = name in METRIC_HEADINGS or name not in METRICS
                if is_headed and is_shown(name, images):
                    named[name] = None
        return list(named)

    def size(self, metric: str) -> int | None:
        """How many images or sequences a metric is of; None of analyses."""
        return self.origin.get("sequences" if metric in OF_SEQUENCES else "images")


def compare_metric(ours: Measured, theirs: Measured, metric: str) -> Agreement:
    """Whether two cells that have a metric, at the same size, agree in it."""
    one = ours.values(metric)
    other = theirs.values(metric)
    deviation = 0.0
    images = ours.size(metric)
    if metric in SHARES and images is not None:
        deviation = share_deviation(mean_over_seeds([*one, *other]), images)
    return Agreement(one, other, deviation)


def asked(result: Result) -> dict[str, Any]:
    """What a result is the answer to."""
    question = without_keys(result["provenance"]["identity"], *NOT_ASKED)
    if isinstance(question.get("calib"), dict):
        # its seed is the run's
        question["calib"] = without_keys(question["calib"], "seed", "revision")
    return question


def group_seeds(results: Iterable[Result]) -> list[Measured]:
    """Results by what was asked, in the order of the first of each; a run that stands twice, in
    two tables, counts once."""
    groups: dict[str, dict[int, Result]] = {}
    for result in results:
        by_seed = groups.setdefault(key_of(asked(result)), {})
        by_seed.setdefault(result["seed"], result)
    cells = []
    for by_seed in groups.values():
        results_in_order = tuple(map(by_seed.__getitem__, sorted(by_seed)))
        cells.append(Measured(label_of(results_in_order[0]), results_in_order))
    return cells


def key_of(question: Mapping[str, Any]) -> str:
    """A question as text, whatever the order of its keys."""
    return json.dumps(question, sort_keys=True)


def label_of(result: Result) -> str:
    """What a cell is called: its row with values of the grid, or its method and calibration."""
    place = result.get("table")
    if place is not None:
        settings = described_point(place["point"])
        return f"{place['row']} ({settings})" if settings else place["row"]
    cell = result["cell"]
    label = method_label(cell["method"])
    details = [cell.get("calib"), "int8" if cell.get("mode") == "int8" else None]
    settings = ", ".join(filter(None, [cell.get("what"), *details]))
    return f"{label} ({settings})" if settings else label


def described_point(point: Mapping[str, Any]) -> str:
    """The values of a grid beside model and bits."""
    words = []
    for key, value in without_keys(point, "model", "quant").items():
        words.append(f"{key.rpartition('.')[2]}={value}")
    return ", ".join(words)


def pair_cells(
    ours: Sequence[Measured], theirs: Sequence[Measured]
) -> tuple[list[tuple[Measured, Measured]], list[Measured], list[Measured]]:
    """Cells that were asked the same, and those of either side that have no counterpart.

    First those that were asked the very same; of the others those that alone were asked the same
    but for the conditions: numbers of images, settings of the sampler, dtype.
    """
    pairs = []
    only_ours = list(ours)
    only_theirs = list(theirs)
    for with_conditions in (True, False):
        left = cells_by_question(only_ours, with_conditions)
        right = cells_by_question(only_theirs, with_conditions)
        for key in left.keys() & right.keys():
            if len(left[key]) == len(right[key]) == 1:
                pairs.append((left[key][0], right[key][0]))
                only_ours.remove(left[key][0])
                only_theirs.remove(right[key][0])
    pairs.sort(key=lambda pair: ours.index(pair[0]))  # a set of keys has no order
    return pairs, only_ours, only_theirs


def cells_by_question(
    cells: Sequence[Measured], with_conditions: bool
) -> dict[str, list[Measured]]:
    """Cells by what was asked of them."""
    by_question: dict[str, list[Measured]] = {}
    for cell in cells:
        ignored = () if with_conditions else CONDITIONS
        question = without_keys(cell.question, *ignored)
        by_question.setdefault(key_of(question), []).append(cell)
    return by_question
