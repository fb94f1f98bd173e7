"""What `python -m experiments.speed` can measure, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.speed import blocks, calibrate, generate

BENCHMARKS: dict[str, Callable[[list[str]], tuple[dict[str, Any], Path]]] = {
    "calibrate": calibrate.run,
    "blocks": blocks.run,
    "generate": generate.run,
}
