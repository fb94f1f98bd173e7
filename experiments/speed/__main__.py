"""Measure what things cost.

    python -m experiments.speed what=calibrate model=rar_twin      # seconds and memory of
    quantizing, every recipe python -m experiments.speed what=blocks model=rar_l            # a
    forward pass of all blocks, FP32 to INT8 python -m experiments.speed what=generate model=rar_b
    # whole images with KV cache and guidance

What each of them measures, and its settings, stands in `experiments/benchmarks/<what>.py`. Further
overrides (`quant=w6a6`, `device=cpu`, `calib.n=32`, `scope=released`, ...) go to every config. The
result is `<runs>/speed/<what>-<model>-<device>.json`.
"""

from __future__ import annotations

import sys

from experiments.speed.benchmarks import BENCHMARKS
from models.weights.checkpoints import CheckpointError
from ptq.numbers.numerics import NonFiniteError
from ptq.types import ConfigError, require


def main() -> None:
    arguments = dict(a.partition("=")[::2] for a in sys.argv[1:])
    what = arguments.get("what", "calibrate")
    try:
        require("what", what, tuple(BENCHMARKS))
        report, path = BENCHMARKS[what]([a for a in sys.argv[1:] if not a.startswith("what=")])
    except (CheckpointError, ConfigError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{report['model']}, {report['weights']} weights ({report['model_mb']} MiB), {report['quant']}, "
        f"{report['rows']} rows; {report['versions']['device']}\nwritten: {path}"
    )
    if any("error" in line for line in report["lines"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
