"""What `python -m experiments.speed` can measure, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.speed import blocks, calibrate, generate, sample

# options and overrides to a report, and where it is written
Benchmark = Callable[[Any, list[str]], tuple[dict[str, Any], Path]]
BENCHMARKS: dict[str, Benchmark] = {
    "calibrate": calibrate.measure_calibration,
    "blocks": blocks.measure_blocks,
    "generate": generate.measure_generation,
    "sample": sample.measure_sampling,
}
