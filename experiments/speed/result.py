"""A benchmark as a result: its report (Figure 7, Table 12), in the form of any run's metrics.json."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.config.compose import configure
from experiments.run.preparation import choose_device
from experiments.speed.benchmarks import BENCHMARKS, Benchmark
from experiments.speed.options import parse_benchmark
from experiments.store import files, locks, provenance, results
from experiments.store.results import RESULT_VERSION, SCHEMA
from ptq.types import ConfigError, require


def speed_result(overrides: Sequence[str], wait: bool = True) -> dict[str, Any]:
    """A report of `experiments.speed` as a result, which its overrides and the device's name
    identify; read if it is there. To measure anew, remove its folder.

    Raises:
        ConfigError: there is no such benchmark, it refuses an override, or some of what it measures
            failed.
        Busy: another process is at it and we are not to `wait`.
    """
    chosen = {
        k: v
        for k, v in (o.split("=", 1) for o in overrides)
        if k not in ("seed", "sampler", "eval")
    }
    what = chosen.pop("what", None)
    require("what", what, tuple(BENCHMARKS))
    given = [f"{k}={v}" for k, v in chosen.items()]
    config = configure([o for o in given if o.startswith(("model=", "device=", "runs="))])
    device = provenance.package_versions(choose_device(config))["device"]
    identity = {
        "what": "speed",
        "overrides": [
            f"what={what}",
            *(o for o in given if not o.startswith(("runs=", "tracker"))),
        ],
        "device": device,
        "version": RESULT_VERSION,
    }
    folder = Path(config.runs) / f"speed-{config.model.name}-{files.value_digest(identity)}"
    with locks.hold_lock(folder, wait):
        return results.stored_result(folder) or timed(
            BENCHMARKS[what], what, given, identity, folder
        )


def timed(
    benchmark: Benchmark,
    what: str,
    given: list[str],
    identity: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Run a benchmark and write its report as a result.

    Raises:
        ConfigError: as `speed` says.
    """
    started = time.perf_counter()
    report, path = benchmark(*parse_benchmark(what, given))  # engines run it alone on its device
    failed = [f"{line['method']}: {line['error']}" for line in report["lines"] if "error" in line]
    if failed:
        raise ConfigError(
            f"{what}: {failed[0]} ({len(failed)} of {len(report['lines'])} failed, see {path})"
        )
    result = {
        "schema": SCHEMA,
        "cell": {"what": "speed", "model": report["model"], "method": None},
        "seed": 0,
        "metrics": {},
        "detail": report,
        "cost": provenance.elapsed_cost(started) | {"workers": 1},
        "provenance": {
            "hash": files.value_digest(identity),
            "identity": identity,
            "revision": provenance.code_revision(),
            "versions": report["versions"],
        },
    }
    files.write_json(folder / "metrics.json", result)
    return result
