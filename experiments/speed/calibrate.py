"""Cost of calibration: seconds and peak memory of selecting rows and quantizing with them.

    python -m experiments.speed what=calibrate model=rar_twin       # every recipe but fp, W8A8
    python -m experiments.speed what=calibrate model=rar_b methods=[smoothquant,ptq4arvg] blocks=2

    methods   recipes of `conf/method`; left out, all but `fp`, and those the model's family refuses
              are said
    blocks    OmniQuant trains this many blocks only, and the time of these is scaled to all; the
              report says where
    repeats   measurements of every method; the median of the seconds counts, and the highest peak

Measured are `cost.calibration_s` and `cost.calibration_peak_mb` of a run, for each of `methods`,
from an equally fresh copy of the model. The original stays in memory, as the reference does in a
run. Rows are selected once for all methods, and every line counts that. One forward pass goes ahead
of the clock.

Released models have random weights unless theirs are here (`python -m models list`) or
`model.weights` is given, and random tokens (`random_models.py`).
The time of a search that ends early (SVDQuant) or depends on magnitudes (OS+) may then differ from
that on real weights. On a CPU the peak is that of the process, some hundred MiB of Python and
PyTorch included. The report is written again after every method.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.config.compose import configure
from experiments.config.recipe import build_recipe
from experiments.config.schema import RunConfig
from experiments.registry.labels import method_label
from experiments.run.peak_memory import PeakMemory
from experiments.run.preparation import choose_device
from experiments.speed import random_models
from experiments.speed.options import METHODS, CalibrateOptions
from experiments.speed.timing import wait_for_device
from experiments.store.files import require_writable, write_json
from experiments.store.provenance import code_revision, package_versions
from experiments.store.results import SCHEMA
from ptq import calibration as calib
from ptq.numbers.numerics import NonFiniteError
from ptq.pipeline import quantize
from ptq.types import Adapter, ConfigError


class TrainingClock:
    """A `Track` that notes when OmniQuant's start and the training of each block have ended."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ended: dict[str, float] = {}

    def __call__(self, items: Iterable[Any], what: str) -> Iterator[Any]:
        yield from items
        wait_for_device(self.device)  # kernels of the last item may still run
        self.ended[what] = time.perf_counter()

    def seconds(self, blocks: tuple[str, ...]) -> float:
        """From the end of the start to that of the last block: what grows with their number."""
        last = max(self.ended.get(f"omniquant, {block}", 0.0) for block in blocks)
        return last - self.ended["omniquant"]


@dataclass(frozen=True)
class Cost:
    """One measurement: seconds and MiB.

    Attributes:
        calibration_s: of selecting and quantizing, scaled to all blocks if only some were trained.
    """

    selection_s: float
    calibration_s: float
    peak_mb: float


@dataclass(frozen=True)
class Selection:
    """Calibration rows, the seconds that selecting them took, and its peak in MiB."""

    rows: calib.CalibrationSet
    seconds: float
    peak_mb: float


def time_selection(
    adapter: Adapter, images: calib.Pool, config: RunConfig, device: torch.device
) -> Selection:
    """Select calibration rows by the adapter's model; one forward pass goes ahead of the clock."""
    chosen = config.calib
    warmup = {name: rows[: chosen.batch] for name, rows in images.conditional.items()}  # one batch
    adapter.forward(warmup)
    wait_for_device(device)
    with PeakMemory(device) as peak:
        started = time.perf_counter()
        rows = calib.select_rows(
            chosen.selector, adapter, images, chosen.n, chosen.seed, chosen.batch
        )
        wait_for_device(device)
        seconds = time.perf_counter() - started
    return Selection(rows, seconds, peak.megabytes)


def time_quantization(
    adapter: Adapter,
    selection: Selection,
    config: RunConfig,
    device: torch.device,
    trained: int | None,
) -> Cost:
    """Quantize the adapter's model in place; OmniQuant trains `trained` blocks only (None: all).

    Raises:
        ConfigError, NonFiniteError: the method does not go with the model.
    """
    clock = TrainingClock(device)
    blocks = adapter.blocks
    if trained is not None:
        adapter.blocks = blocks[:trained]  # OmniQuant trains the blocks that are named here
        adapter.last_block = blocks[trained - 1]
    with PeakMemory(device) as peak:
        started = time.perf_counter()
        quantize(adapter, selection.rows, build_recipe(config), config.calib.batch, clock)
        wait_for_device(device)
        seconds = time.perf_counter() - started
    if trained is not None:
        # blocks are alike: each of the others would take as long
        seconds += (len(blocks) / trained - 1) * clock.seconds(adapter.blocks)
    return Cost(
        selection_s=selection.seconds,
        calibration_s=selection.seconds + seconds,
        peak_mb=max(selection.peak_mb, peak.megabytes),
    )


def report_line(
    name: str, costs: list[Cost], config: RunConfig, trained: int | None
) -> dict[str, Any]:
    """A method's line: medians of the seconds, the highest peak, and every measurement."""
    return {
        "method": name,
        "selector": config.calib.selector,
        "scope": config.scope.name,
        "selection_s": round(statistics.median(cost.selection_s for cost in costs), 3),
        "calibration_s": round(statistics.median(cost.calibration_s for cost in costs), 3),
        "calibration_peak_mb": round(max(cost.peak_mb for cost in costs), 1),
        "blocks_trained": trained,
        "measurements": list(map(asdict, costs)),
    }


def compose_configs(options: CalibrateOptions, overrides: list[str]) -> dict[str, RunConfig | str]:
    """By method its config, or why the model's family has no such row.

    Raises:
        ConfigError, CheckpointError: a method that is named is refused, or all are.
    """
    configs: dict[str, RunConfig | str] = {}
    for name in options.methods or METHODS:
        try:
            configs[name] = configure([f"method={name}", *overrides])
        except ConfigError as error:
            if options.methods is not None:  # asked for by name
                raise
            configs[name] = str(error)
    if not any(isinstance(config, RunConfig) for config in configs.values()):
        raise ConfigError(next(iter(configs.values())))
    return configs


class CalibrationBenchmark:
    """Measures one method after the other on copies of one model."""

    def __init__(self, config: RunConfig, options: CalibrateOptions) -> None:
        self.options = options
        self.device = choose_device(config)
        generator, self.made_up = random_models.load_or_fill(config, self.device)
        self.adapter = generator.adapter
        self.blocks = len(self.adapter.blocks)
        if options.blocks is not None and options.blocks > self.blocks:
            raise ConfigError(
                f"blocks: {options.blocks} is more than the {self.blocks} of {config.model.name}"
            )
        # n images, twice as many rows
        self.images = random_models.image_pool(generator, config.calib.n, self.device)
        self.selections: dict[str, Selection] = {}  # by layout of the rows

    def report(self, config: RunConfig) -> dict[str, Any]:
        """The report before anything is measured."""
        parameter_bytes = sum(each.nbytes for each in self.adapter.model.parameters())
        return {
            "schema": SCHEMA,
            "what": "calibrate",
            "model": config.model.name,
            "blocks": self.blocks,
            "weights": "random" if self.made_up else "loaded",
            "quant": config.quant.name,
            "rows": config.calib.n,
            "batch": config.calib.batch,
            "dtype": config.dtype,
            "repeats": self.options.repeats,
            "model_mb": round(parameter_bytes / 2**20, 1),
            "lines": [],
            "versions": package_versions(self.device),
            "threads": torch.get_num_threads(),
            "revision": code_revision(),
        }

    def measure_method(self, name: str, config: RunConfig) -> dict[str, Any]:
        """A method's line of the report, or why it failed."""
        selection = self.select_rows(config)
        trained = None
        if config.method.omniquant and self.options.blocks != self.blocks:
            trained = self.options.blocks  # None: all
        costs = []
        try:
            for _ in range(self.options.repeats):
                adapter = copy.deepcopy(self.adapter)  # quantizing changes the model
                costs.append(time_quantization(adapter, selection, config, self.device, trained))
        except (ConfigError, NonFiniteError) as error:
            return {"method": name, "error": str(error)}
        return report_line(name, costs, config, trained)

    def select_rows(self, config: RunConfig) -> Selection:
        """Calibration rows in the layout that the method is calibrated in, selected once."""
        layout = config.calib.layout
        self.adapter.layout = layout  # for the copies that are quantized, too
        if layout not in self.selections:
            fresh = copy.deepcopy(self.adapter)
            self.selections[layout] = time_selection(fresh, self.images, config, self.device)
        return self.selections[layout]


@torch.no_grad()
def measure_calibration(
    options: CalibrateOptions, overrides: list[str]
) -> tuple[dict[str, Any], Path]:
    """Measure every method; the report, and where it is written.

    Raises:
        ConfigError, CheckpointError: nothing can be measured.
    """
    configs = compose_configs(options, overrides)
    # model, number of rows and folders are the same in all
    first = next(config for config in configs.values() if isinstance(config, RunConfig))
    benchmark = CalibrationBenchmark(first, options)
    report = benchmark.report(first)
    device = benchmark.device.type
    path = Path(first.runs) / "speed" / f"calibrate-{first.model.name}-{device}.json"
    require_writable(path, "runs")
    print(f"{'method':26} {'select [s]':>10} {'in all [s]':>12} {'peak [MiB]':>12}")
    for name, config in configs.items():
        if isinstance(config, str):
            line = {"method": name, "refused": config}
        else:
            line = benchmark.measure_method(name, config)
        report["lines"].append(line)
        print(terminal_line(line, benchmark.blocks), flush=True)
        write_json(path, report)  # a killed command leaves the methods that it measured
    return report, path


def terminal_line(line: dict[str, Any], blocks: int) -> str:
    """A method's line on the terminal."""
    name = method_label(line["method"])
    for reason in ("refused", "error"):
        if reason in line:
            return f"{name:26} {reason}: {line[reason]}"
    trained = line["blocks_trained"]
    note = "" if trained is None else f"  scaled from {trained} of {blocks} blocks"
    return (
        f"{name:26} {line['selection_s']:10.2f} {line['calibration_s']:12.2f} "
        f"{line['calibration_peak_mb']:12.0f}{note}"
    )
