"""Costs that were measured: of committed results, committed benchmarks, and this machine's runs.

    experiments/results/<table>          calibration, sampling and the rest of every committed run
    experiments/results/calibrate, raw   reports of `experiments.speed what=calibrate`
    experiments/results/raw/sample-*     reports of `experiments.speed what=sample`
    experiments/results/raw/generate-*   FP32 and simulated tokens of `what=generate`, compiled
    experiments/results/raw/samplers-*   tokens of twins, eager and replayed
    RUNS/<run>/metrics.json              what this machine has run
    RUNS/speed/{calibrate,sample}-*      what this machine has measured

Files that do not count are passed over: a price is no place to complain of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.estimate.model import EAGER, REPLAYED, Sampled
from experiments.estimate.shapes import Shape, measure_shape
from experiments.identity.results import committed_results
from experiments.images.microbatches import WORTH_CAPTURING
from experiments.store import results
from experiments.store.results import ResultError
from models import registry
from ptq.files import read_json

FULL_PRECISION = "fp"
STATIC = "static"  # ranges of activations that calibration has fixed
DYNAMIC = "dynamic"  # found anew for every token
# variants of `what=generate` that runs sample in
GENERATED = {"fp32": FULL_PRECISION, "simulated": STATIC}
# how the committed samplers of twins call themselves
TWIN_SAMPLERS = (
    "100 images of a twin, generator.sample, after one that does not count; seconds, median of 3"
)
ALWAYS = "methods"  # the table that has all methods
CALIBRATION_ROWS = 128  # of committed runs that state no other number


@dataclass(frozen=True)
class Measured:
    """Where and how something was measured.

    Attributes:
        name: of the device, in words. workers: processes that shared it.
        here: by this machine. source: in words.
    """

    name: str
    workers: int
    here: bool
    source: str


@dataclass(frozen=True)
class BatchCost:
    """A micro-batch that a benchmark has timed."""

    measured: Measured
    variant: str
    sampled: Sampled
    peak_bytes: float | None


@dataclass(frozen=True)
class CalibrationCost:
    """Calibration of a model with a method, of a run or a benchmark."""

    measured: Measured
    model: str
    method: str
    rows: int
    seconds: float
    peak_bytes: float | None


@dataclass(frozen=True)
class RunCost:
    """What a run took besides calibration.

    Attributes:
        sampling_s: of all images; None if it was continued. rest_s: of the remainder.
    """

    measured: Measured
    shape: Shape
    method: str
    variant: str
    images: int
    microbatch: int
    sequences: int
    judged: bool
    sampling_s: float | None
    rest_s: float | None


@dataclass
class Costs:
    """All that was measured on a class of devices, cpu or cuda."""

    device: str
    batches: list[BatchCost] = field(default_factory=list)
    calibrations: list[CalibrationCost] = field(default_factory=list)
    runs: list[RunCost] = field(default_factory=list)


def read_costs(runs: Path, device: str, tables: Sequence[str] = ()) -> Costs:
    """Measured costs.

    Args:
        device: a class of devices; what was measured on the other one is passed over.
        runs: folder of this machine's runs.
        tables: whose committed results are read, besides those of `methods`.
    """
    costs = Costs(device)
    for name in dict.fromkeys([*tables, ALWAYS]):
        for result in committed_results(name)[0]:
            add_result(costs, result, f"committed {name}", here=False)
    for result in committed_results("calibrate")[0]:
        add_report(costs, result["detail"], "committed calibrate", here=False)
    for path in sorted((results.ROOT / "raw").glob("*.json")):
        add_file(costs, path, f"committed raw/{path.stem}", here=False)
    for path in sorted((runs / "speed").glob("*.json")):
        add_file(costs, path, str(path), here=True)
    for result in local_results(runs):
        add_result(costs, result, str(runs), here=True)
    return costs


def local_results(runs: Path) -> Iterator[dict[str, Any]]:
    """The results in a folder of runs."""
    for path in sorted(runs.glob(f"*/{results.RESULT}")):
        try:
            yield results.read_result(path)
        except ResultError:
            continue


def add_file(costs: Costs, path: Path, source: str, here: bool) -> None:
    """Add what a file holds, if it is a report of a benchmark."""
    try:
        report = read_json(path)
    except (OSError, ValueError):
        return
    if isinstance(report, dict):
        add_report(costs, report.get("detail", report), source, here)  # a result holds one


def add_report(costs: Costs, report: Mapping[str, Any], source: str, here: bool) -> None:
    """Add the lines of a report of a benchmark, if it is one of those that tell costs."""
    name = report.get("versions", {}).get("device", "")
    if device_class(name) != costs.device:
        return
    measured = Measured(name, 1, here, source)
    what = report.get("what")
    if what == TWIN_SAMPLERS:
        for line in report["lines"]:
            costs.batches += twin_batches(measured, line)
    if report.get("model") not in registry.PRESETS:
        return
    for line in report["lines"]:
        if what == "sample":
            costs.batches.append(batch_cost(measured, report, line))
        elif what == "generate" and line["variant"] in GENERATED:
            costs.batches.append(generated_batch(measured, report, line))
        elif what == "calibrate" and "calibration_s" in line:
            costs.calibrations.append(calibration_cost(measured, report, line))


def batch_cost(measured: Measured, report: Mapping[str, Any], line: Mapping[str, Any]) -> BatchCost:
    """A line of a report of `what=sample`."""
    shape = measure_shape(report["model"], report["sampler_settings"])
    variant = FULL_PRECISION if line["variant"] == "fp32" else line["variant"]
    sampled = Sampled(shape, line["batch"], line["way"], line["tokens_s"], line["pixels_s"])
    return BatchCost(measured, variant, sampled, line["peak_mb"] * 2**20)


def generated_batch(
    measured: Measured, report: Mapping[str, Any], line: Mapping[str, Any]
) -> BatchCost:
    """A line of a report of `what=generate`: tokens by blocks that are compiled and replayed."""
    shape = measure_shape(report["model"], report["sampler_settings"])
    images = line.get("batch", report["rows"])
    sampled = Sampled(shape, images, REPLAYED, line["seconds"], None)
    return BatchCost(measured, GENERATED[line["variant"]], sampled, None)


def twin_batches(measured: Measured, line: Mapping[str, Any]) -> list[BatchCost]:
    """A line of the samplers of twins: 100 images, eager and replayed."""
    shape = measure_shape(line["model"])
    variant = FULL_PRECISION if line["arithmetic"] == "fp32" else STATIC
    batches = []
    for column, way in (("default", EAGER), ("exact", REPLAYED)):
        sampled = Sampled(shape, 100, way, line[column], None)
        batches.append(BatchCost(measured, variant, sampled, None))
    return batches


def calibration_cost(
    measured: Measured, report: Mapping[str, Any], line: Mapping[str, Any]
) -> CalibrationCost:
    """A line of a report of `what=calibrate`."""
    return CalibrationCost(
        measured,
        report["model"],
        line["method"],
        report["rows"],
        line["calibration_s"],
        line["calibration_peak_mb"] * 2**20,
    )


def add_result(costs: Costs, result: Mapping[str, Any], source: str, here: bool) -> None:
    """Add what a run took."""
    cell = result["cell"]
    cost = result["cost"]
    identity = result["provenance"]["identity"]
    is_run = "method" in cell and "what" not in cell and "cell_s" in cost
    if not is_run or cell["model"] not in registry.PRESETS or identity.get("mode") != "simulate":
        return
    name = device_of(result)
    if device_class(name) != costs.device:
        return
    measured = Measured(name, cost["workers"] or 1, here, source)
    calibration_s = cost.get("calibration_s")
    sampling_s = cost.get("sampling_s")
    peak = cost.get("calibration_peak_mb")
    method = identity["method"]
    rows = identity.get("calib", {}).get("n", CALIBRATION_ROWS)
    if calibration_s is not None:
        costs.calibrations.append(
            CalibrationCost(
                measured,
                cell["model"],
                cell["method"],
                rows,
                calibration_s,
                None if peak is None else peak * 2**20,
            )
        )
    rest_s = None
    if sampling_s is not None:
        rest_s = max(0.0, cost["cell_s"] - sampling_s - (calibration_s or 0.0))
    costs.runs.append(
        RunCost(
            measured,
            measure_shape(cell["model"], identity["sampler"]),
            cell["method"],
            variant_of(method),
            identity["eval"]["n"],
            identity["sampler"]["microbatch"],
            identity["eval"]["sequences"],
            "judged" in identity,
            sampling_s,
            rest_s,
        )
    )


def device_of(result: Mapping[str, Any]) -> str:
    """The device that a result names; of samples that were evaluated, that of the samples."""
    origin = result["provenance"]
    sampled_on = origin.get("sampled_on") or [origin["versions"]]
    return sampled_on[-1]["device"]


def device_class(name: str) -> str:
    """Whether a device is a CPU or a GPU, by the name that provenance gives it."""
    return "cpu" if " CPU, " in name else "cuda"


def variant_of(method: Mapping[str, Any] | str) -> str:
    """Which arithmetic a method samples in, by its settings or departures from the defaults."""
    if method == "fp":
        return FULL_PRECISION
    return DYNAMIC if method.get("dynamic") else STATIC


def way_of(device: str, has_ids: bool, images: int, microbatch: int) -> str:
    """Whether a run's steps are replayed, as `replayed_steps` decides."""
    batches = -(-images // microbatch)
    replays = device == "cuda" and has_ids and batches >= WORTH_CAPTURING
    return REPLAYED if replays else EAGER
