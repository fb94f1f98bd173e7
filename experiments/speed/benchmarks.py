"""What `python -m experiments.speed` can measure, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.speed import blocks, calibrate, generate

Benchmark = Callable[[Any, list[str]], tuple[dict[str, Any], Path]]  # options and overrides
BENCHMARKS: dict[str, Benchmark] = {
    "calibrate": calibrate.run,
    "blocks": blocks.run,
    "generate": generate.run,
}
