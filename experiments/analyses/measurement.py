"""Figures and tables of the paper that are no grid of quantized models: analyses of a model.

    perturbation   loss of models whose scales are off those of GPS at random (Figure 5)
    approximation, ordering, cross_terms
                   what GPS approximates, layer by layer (Table 8, Figures 3, 8 and 10)
    invariance     ranges per token position, class by class (Figures 4, 11 and 12)
    outliers       outlier channels and sink tokens (Figure 1)
    sensitivity    loss with one group of quantizers alone, and with it left out
    recipes        the settings of a method, as the recipe has them (Table 7)

An analysis is a cell like a run: it is identified by the hash of what determines its numbers. Its
folder `runs/<what>-<model>-...-<hash>/` is complete when metrics.json is there, which has the form
of a run's, with `metrics` flat and `detail` for pictures.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.analyses.approximations import (
    measure_layers,
    order_shares,
    output_errors,
    step_biases,
)
from experiments.analyses.data import Analysis
from experiments.analyses.invariance import range_invariance
from experiments.analyses.outliers import outlier_statistics
from experiments.analyses.perturbation import perturb_scales
from experiments.analyses.recipes import list_settings
from experiments.analyses.sensitivity import measure_sensitivity
from experiments.config.schema import RunConfig
from experiments.identity.departures import add_versions
from experiments.identity.places import choose_place, write_identity
from experiments.identity.results import state_identity, stored_result
from experiments.identity.whole import whole_identity
from experiments.run import cell
from experiments.run.preparation import Run
from experiments.store import locks, provenance, results
from experiments.store.results import SCHEMA
from ptq.files import value_digest
from ptq.pipeline import Track
from ptq.types import require

ANALYSES: dict[str, Analysis] = {
    "perturbation": perturb_scales,
    "approximation": measure_layers(step_biases),
    "ordering": measure_layers(order_shares),
    "cross_terms": measure_layers(output_errors),
    "invariance": range_invariance,
    "outliers": outlier_statistics,
    "recipes": list_settings,
    "sensitivity": measure_sensitivity,
}


def run_analysis(
    what: str, config: RunConfig, options: Mapping[str, Any], track: Track, wait: bool = True
) -> dict[str, Any]:
    """The result of an analysis; read if it is there.

    Raises:
        ConfigError, CheckpointError, NonFiniteError: one line that says what is wrong.
        Busy: another process computes it and we are not to `wait`.
    """
    require("what", what, tuple(ANALYSES))
    run = cell.prepare_run(config)
    departures = add_versions(run.values | {"what": what, "options": dict(options)})
    whole = whole_identity(departures, run.device.type)
    name = f"{what}-{run.stem}-{value_digest(departures)}"
    folder = choose_place(Path(config.runs) / name, whole)
    stored = stored_result(folder, whole)
    if stored is not None:
        return stored
    with locks.hold_lock(folder, wait):
        stored = stored_result(folder, whole)  # finished while we waited
        if stored is not None:
            return stored
        write_identity(folder, whole)
        return measure_run(run, departures, whole, track, folder)


def measure_run(
    run: Run, departures: Mapping[str, Any], whole: Mapping[str, Any], track: Track, folder: Path
) -> dict[str, Any]:
    """Compute an analysis and write its metrics.json."""
    what = departures["what"]
    started = time.perf_counter()
    metrics, detail = ANALYSES[what](run, departures["options"], track, folder)
    result = {
        "schema": SCHEMA,
        "cell": {"what": what, **cell.describe_cell(run.config)},
        "seed": run.config.seed,
        "metrics": metrics,
        "detail": detail,
        "cost": provenance.elapsed_cost(started),
        "provenance": {
            "hash": value_digest(departures),
            "identity": departures,
            **state_identity(whole),
            "config": asdict(run.config),
            "revision": provenance.code_revision(),
            "versions": provenance.package_versions(run.device),
        },
    }
    results.write_result(folder / "metrics.json", result)
    return result
