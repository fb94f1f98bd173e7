"""Measure what things cost.

    python -m experiments.speed what=calibrate model=rar_twin  # seconds and memory of quantizing
    python -m experiments.speed what=blocks model=rar_l        # a pass of all blocks, FP32 to INT8
    python -m experiments.speed what=generate model=rar_b      # whole images, KV cache and guidance
    python -m experiments.speed what=sample model=rar_b        # a micro-batch as runs make it

What each of them measures stands in `experiments/speed/WHAT.py`. Overrides (`quant=w6a6`,
`device=cpu`, `calib.n=32`, `scope=released`, ...) go to every config. The result is
`RUNS/speed/WHAT-MODEL-DEVICE.json`.
"""

from __future__ import annotations

import sys

from experiments.config.overrides import RUN
from experiments.options import answer_help, parse_options
from experiments.speed.options import BENCHMARK_OPTIONS, Options, parse_benchmark
from ptq.errors import user_errors

SECTIONS = {
    "Options": Options,
    **{f"Options of what={what}": kind for what, kind in BENCHMARK_OPTIONS.items()},
}


def main() -> None:
    with user_errors():
        answer_help(__doc__, SECTIONS, RUN.describe())
        own, others = parse_options(Options, sys.argv[1:])
        options, overrides = parse_benchmark(own.what, others)

        # late: torch is slow to import, and help needs none
        from experiments.speed.benchmarks import BENCHMARKS

        report, path = BENCHMARKS[own.what](options, overrides)
    print(
        f"{report['model']}, {report['weights']} weights ({report['model_mb']} MiB), "
        f"{report['quant']}, {report['rows']} rows; {report['versions']['device']}"
    )
    print(f"written: {path}")
    if any("error" in line for line in report["lines"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
