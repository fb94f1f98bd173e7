"""Figures and tables of the paper that are no grid of quantized models: measurements of a model or
of its layers.

    perturbation   loss of models whose scales are off those of GPS at random (Figure 5)
    approximation, ordering, cross_terms   what GPS approximates, layer by layer (Table 8, Figures 3, 8 and 10)
    invariance     ranges per token position, class by class (Figures 4, 11 and 12)
    outliers       outlier channels and sink tokens (Figure 1)
    recipes        the settings of a method, as the recipe has them (Table 7)
    speed          a report of `experiments.speed` (Figure 7, Table 12)

A measurement is a cell like a run: it is identified by the hash of what determines its numbers, its
folder `runs/<what>-<model>-...-<hash>/` is complete when metrics.json is there, and that has the
form of a run's, with `metrics` flat and `detail` for pictures.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from experiments.analyses import approximations
from experiments.analyses.approximations import of_layers
from experiments.analyses.data import Measure
from experiments.analyses.invariance import invariance
from experiments.analyses.outliers import outlier_statistics
from experiments.analyses.perturbation import perturbation
from experiments.analyses.recipes import recipes
from experiments.config.schema import RunConfig
from experiments.run import cell
from experiments.store import files, locks, provenance, results
from experiments.store.results import SCHEMA
from ptq.pipeline import Track
from ptq.types import require


def run(
    what: str, config: RunConfig, options: Mapping[str, Any], track: Track, wait: bool = True
) -> dict[str, Any]:
    """The result of a measurement; read if it is there.

    Raises:
        ConfigError, CheckpointError, NonFiniteError: one line that says what is wrong.
        Busy: another process is at it and we are not to `wait`.
    """
    require("what", what, tuple(MEASURES))
    of = cell.prepare_run(config)
    identity = of.identity | {"what": what, "options": dict(options)}
    key = files.value_digest(identity)
    folder = of.folder.with_name(f"{what}-{of.folder.name.rpartition('-')[0]}-{key}")
    found = results.stored_result(folder)
    if found is not None:
        return found
    with locks.hold_lock(folder, wait):
        found = results.stored_result(folder)
        if found is not None:
            return found
        started = time.perf_counter()
        metrics, detail = MEASURES[what](of, options, track, folder)
        result = {
            "schema": SCHEMA,
            "cell": {"what": what, **cell.describe_cell(config)},
            "seed": config.seed,
            "metrics": metrics,
            "detail": detail,
            "cost": provenance.elapsed_cost(started),
            "provenance": {
                "hash": key,
                "identity": identity,
                "config": OmegaConf.to_container(OmegaConf.structured(config)),
                "revision": provenance.code_revision(),
                "versions": provenance.package_versions(of.device),
            },
        }
        files.write_json(folder / "metrics.json", result)
        return result


MEASURES: dict[str, Measure] = {
    "perturbation": perturbation,
    "approximation": of_layers(approximations.biases),
    "ordering": of_layers(approximations.orders),
    "cross_terms": of_layers(approximations.output_errors),
    "invariance": invariance,
    "outliers": outlier_statistics,
    "recipes": recipes,
}
