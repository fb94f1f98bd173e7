"""A benchmark as a result: its report (Figure 7, Table 12), in the form of a run's metrics.json."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.config.compose import configure
from experiments.identity.departures import add_versions
from experiments.identity.parts import BENCHMARK
from experiments.identity.places import choose_place, write_identity
from experiments.identity.results import state_identity, stored_result
from experiments.identity.whole import whole_identity
from experiments.run.preparation import choose_device
from experiments.speed.benchmarks import BENCHMARKS
from experiments.speed.options import parse_benchmark
from experiments.store import locks, provenance, results
from experiments.store.results import RESULT_VERSION, SCHEMA
from ptq.files import value_digest
from ptq.types import ConfigError, require

NOT_OF_BENCHMARKS = ("seed", "sampler", "eval")  # every cell of a table has these
NOT_DECIDING = ("runs=", "tracker", "baseline=")
OF_MODEL = ("model", "device", "runs")


def speed_result(overrides: Sequence[str], wait: bool = True) -> dict[str, Any]:
    """A report of `experiments.speed` as a result; read if it is there.

    Its overrides and the device's name identify it. To measure anew, remove its folder.

    Raises:
        ConfigError: there is no such benchmark, it refuses an override, or some of what it measures
            failed.
        Busy: another process measures it and we are not to `wait`.
    """
    settings = dict(override.split("=", 1) for override in overrides)
    for key in NOT_OF_BENCHMARKS:
        settings.pop(key, None)
    what = settings.pop("what", None)
    require("what", what, tuple(BENCHMARKS))
    arguments = [f"{key}={value}" for key, value in settings.items()]
    # for the device and the folder alone
    config = configure([f"{key}={settings[key]}" for key in OF_MODEL if key in settings])
    device = choose_device(config)
    departures = describe_benchmark(what, arguments, device)
    whole = whole_identity(departures, device.type)
    name = f"speed-{config.model.name}-{value_digest(departures)}"
    folder = choose_place(Path(config.runs) / name, whole)
    with locks.hold_lock(folder, wait):
        stored = stored_result(folder, whole)  # written while we waited for the lock
        if stored is not None:
            return stored
        write_identity(folder, whole)
        return measure_benchmark(what, arguments, departures, whole, folder)


def describe_benchmark(what: str, arguments: list[str], device: torch.device) -> dict[str, Any]:
    """What makes two benchmarks the same: all but where files lie."""
    deciding = [text for text in arguments if not text.startswith(NOT_DECIDING)]
    values = {
        "what": BENCHMARK,
        "overrides": [f"what={what}", *deciding],
        "device": provenance.package_versions(device)["device"],
        "version": RESULT_VERSION,
    }
    return add_versions(values)


def measure_benchmark(
    what: str,
    arguments: list[str],
    departures: dict[str, Any],
    whole: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Run a benchmark and write its report as a result.

    Raises:
        ConfigError: as `speed_result` says.
    """
    started = time.perf_counter()  # engines run it alone on its device
    report, path = BENCHMARKS[what](*parse_benchmark(what, arguments))
    failed = [line for line in report["lines"] if "error" in line]
    if failed:
        raise ConfigError(
            f"{what}: {failed[0]['method']}: {failed[0]['error']} "
            f"({len(failed)} of {len(report['lines'])} failed, see {path})"
        )
    result = {
        "schema": SCHEMA,
        "cell": {"what": "speed", "model": report["model"], "method": None},
        "seed": 0,  # benchmarks take none
        "metrics": {},
        "detail": report,
        "cost": provenance.elapsed_cost(started) | {"workers": 1},
        "provenance": {
            "hash": value_digest(departures),
            "identity": departures,
            **state_identity(whole),
            "revision": provenance.code_revision(),
            "versions": report["versions"],
        },
    }
    results.write_result(folder / "metrics.json", result)
    return result
