"""Cost of calibration: seconds and peak memory of selecting calibration rows and quantizing with
them.

    python -m experiments.speed what=calibrate model=rar_twin                    # every recipe but
    fp, W8A8 python -m experiments.speed what=calibrate model=rar_b methods=[smoothquant,ptq4arvg]
    calib.n=16 blocks=2

They are `cost.calibration_s` and `cost.calibration_peak_mb` of a run, for each of `methods`, from
an equally fresh copy of the model. The original stays in memory, as the reference does in a run.
Rows are selected once for all methods, and every line counts that. One forward pass goes ahead of
the clock.

    methods   recipes of `conf/method`; left out, all but `fp`, and those the model's family refuses are said
    blocks    OmniQuant trains this many blocks only, and the time of these is scaled to all; the report says where
    repeats   measurements of every method; the median of the seconds counts, and the highest peak

Released models have random weights and tokens unless `model.weights` is given (`random_models.py`).
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
from experiments.registry.labels import METHOD_LABELS
from experiments.run.peak_memory import PeakMemory
from experiments.run.preparation import choose_device
from experiments.speed import random_models
from experiments.speed.options import METHODS, CalibrateOptions
from experiments.speed.timing import synchronize
from experiments.store.files import write_json
from experiments.store.provenance import code_revision, package_versions
from ptq import calibration as calib
from ptq.numbers.numerics import NonFiniteError
from ptq.pipeline import quantize
from ptq.types import Adapter, ConfigError

SCHEMA = 1


class TrainingClock:
    """A `Track` that takes down when OmniQuant's start and the training of each block have
    ended."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ended = {}

    def __call__(self, items: Iterable[Any], what: str) -> Iterator[Any]:
        yield from items
        synchronize(self.device)
        self.ended[what] = time.perf_counter()

    def seconds(self, blocks: tuple[str, ...]) -> float:
        """From the end of the start to that of the last block: what grows with the number of
        blocks."""
        return max(self.ended.get(f"omniquant, {b}", 0.0) for b in blocks) - self.ended["omniquant"]


@dataclass(frozen=True)
class Cost:
    """One measurement: seconds of selecting and of both, scaled to all blocks if only some were
    trained, and MiB."""

    selection_s: float
    calibration_s: float
    peak_mb: float


@dataclass(frozen=True)
class Selection:
    """Calibration rows, the seconds that selecting them took, and its peak in MiB."""

    rows: calib.CalibrationSet
    seconds: float
    peak_mb: float


def select(
    adapter: Adapter, images: calib.Pool, config: RunConfig, device: torch.device
) -> Selection:
    """Select calibration rows by the adapter's model; one forward pass goes ahead of the clock."""
    c = config.calib
    adapter.forward({k: v[: c.batch] for k, v in images.conditional.items()})
    synchronize(device)
    with PeakMemory(device) as peak:
        started = time.perf_counter()
        chosen = calib.select_rows(c.selector, adapter, images, c.n, c.seed, c.batch)
        synchronize(device)
        seconds = time.perf_counter() - started
    return Selection(chosen, seconds, peak.megabytes)


def measure(
    adapter: Adapter,
    chosen: Selection,
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
        adapter.blocks = blocks[:trained]
        adapter.last_block = blocks[trained - 1]
    with PeakMemory(device) as peak:
        started = time.perf_counter()
        quantize(adapter, chosen.rows, build_recipe(config), config.calib.batch, clock)
        synchronize(device)
        seconds = time.perf_counter() - started
    if trained is not None:
        seconds += (len(blocks) / trained - 1) * clock.seconds(adapter.blocks)
    return Cost(chosen.seconds, chosen.seconds + seconds, max(chosen.peak_mb, peak.megabytes))


def line(name: str, costs: list[Cost], config: RunConfig, trained: int | None) -> dict[str, Any]:
    """A method's line of the report: medians of the seconds, the highest peak, and every
    measurement."""
    return {
        "method": name,
        "selector": config.calib.selector,
        "scope": config.scope.name,
        "selection_s": round(statistics.median(c.selection_s for c in costs), 3),
        "calibration_s": round(statistics.median(c.calibration_s for c in costs), 3),
        "calibration_peak_mb": round(max(c.peak_mb for c in costs), 1),
        "blocks_trained": trained,
        "measurements": [asdict(c) for c in costs],
    }


def configurations(options: CalibrateOptions, overrides: list[str]) -> dict[str, RunConfig | str]:
    """By method the config, or, where all methods are asked for, why the model's family has no such
    row.

    Raises:
        ConfigError, CheckpointError: a method that is named is refused, or all are.
    """
    found: dict[str, RunConfig | str] = {}
    for name in options.methods or METHODS:
        try:
            found[name] = configure([f"method={name}", *overrides])
        except ConfigError as error:
            if options.methods is not None:
                raise
            found[name] = str(error)
    if not any(isinstance(config, RunConfig) for config in found.values()):
        raise ConfigError(next(iter(found.values())))
    return found


@torch.no_grad()
def run(options: CalibrateOptions, overrides: list[str]) -> tuple[dict[str, Any], Path]:
    """Measure every method; the report, and where it is written.

    Raises:
        ConfigError, CheckpointError: nothing can be measured.
    """
    configs = configurations(options, overrides)
    first = next(config for config in configs.values() if isinstance(config, RunConfig))
    device = choose_device(first)
    generator, made_up = random_models.load(first, device)
    adapter = generator.adapter
    total = len(generator.adapter.blocks)
    if options.blocks is not None and options.blocks > total:
        raise ConfigError(
            f"blocks: {options.blocks} is more than the {total} of {first.model.name}"
        )
    images = random_models.pool(generator, first.calib.n, device)
    selections: dict[str, Selection] = {}
    lines: list[dict[str, Any]] = []
    report = {
        "schema": SCHEMA,
        "what": "calibrate",
        "model": first.model.name,
        "blocks": total,
        "weights": "random" if made_up else "loaded",
        "quant": first.quant.name,
        "rows": first.calib.n,
        "batch": first.calib.batch,
        "dtype": first.dtype,
        "repeats": options.repeats,
        "model_mb": round(sum(p.nbytes for p in adapter.model.parameters()) / 2**20, 1),
        "lines": lines,
        "versions": package_versions(device),
        "threads": torch.get_num_threads(),
        "revision": code_revision(),
    }
    path = Path(first.runs) / "speed" / f"calibrate-{first.model.name}-{device.type}.json"
    print(f"{'method':26} {'select [s]':>10} {'in all [s]':>12} {'peak [MiB]':>12}")
    for name, config in configs.items():
        if isinstance(config, str):
            lines.append({"method": name, "refused": config})
            print(row(lines[-1], total))
            continue
        adapter.layout = layout = config.calib.layout
        if layout not in selections:
            selections[layout] = select(copy.deepcopy(adapter), images, config, device)
        trained = options.blocks if config.method.omniquant and options.blocks != total else None
        try:
            costs = [
                measure(copy.deepcopy(adapter), selections[layout], config, device, trained)
                for _ in range(options.repeats)
            ]
            lines.append(line(name, costs, config, trained))
        except (ConfigError, NonFiniteError) as error:
            lines.append({"method": name, "error": str(error)})
        print(row(lines[-1], total), flush=True)
        write_json(path, report)
    return report, path


def row(found: dict[str, Any], blocks: int) -> str:
    """A method's line on the terminal."""
    name = METHOD_LABELS.get(found["method"], found["method"])
    for reason in ("refused", "error"):
        if reason in found:
            return f"{name:26} {reason}: {found[reason]}"
    trained = found["blocks_trained"]
    note = "" if trained is None else f"  scaled from {trained} of {blocks} blocks"
    return (
        f"{name:26} {found['selection_s']:10.2f} {found['calibration_s']:12.2f} "
        f"{found['calibration_peak_mb']:12.0f}{note}"
    )
