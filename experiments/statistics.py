"""Measure the activation statistics of a model: outlier channels and sink tokens at every input
that has sinks.

    python -m experiments.statistics model=rar_twin            # JSON and the paper's four pictures, runs/statistics
    python -m experiments.statistics model=rar_twin record=true   # also models/zoo/records and the model cards

The definitions stand in `experiments/analyses/outliers.py`. Measured on 512 held-out sequences,
conditional branch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import models
from experiments.analyses.figures import outlier_figure
from experiments.analyses.outliers import inside, measure
from experiments.evaluate import likelihood
from experiments.options import own_options
from experiments.store.files import write_json
from experiments.store.provenance import package_versions
from experiments.train_zoo import cards
from models.registry import ZOO, Generator
from models.weights.checkpoints import CheckpointError
from models.weights.digests import module_digest
from ptq.types import ConfigError, Rows

SEQUENCES = 512


@dataclass
class Options:
    model: str = "rar_twin"
    weights: str | None = None
    record: bool = False


def heldout_rows(generator: Generator, n: int = SEQUENCES) -> tuple[Rows, Rows]:
    """Calibration rows of n shipped held-out images, conditional and unconditional.

    Raises:
        ConfigError: there are fewer. CheckpointError: the held-out tokens are missing.
    """
    stored = likelihood.load_held_out(generator.preset, n)
    return generator.adapter.rows(stored["tokens"], stored["labels"])


def main() -> None:
    try:
        options, unknown = own_options(Options, sys.argv[1:])
        if unknown:
            raise ConfigError(f"{unknown[0]}: not one of model, weights, record")
        name = options.model
        generator = models.load(name, options.weights)
        if not generator.preset.weights.shipped:
            raise ConfigError(
                f"model: {name} has no shipped held-out tokens; statistics are measured on the twins"
            )
        rows = heldout_rows(generator)
    except (CheckpointError, ConfigError) as error:
        sys.exit(f"error: {error}")
    statistics = measure(generator.adapter, rows[0])
    kinds = {s.name: s.kind for s in generator.adapter.sites}
    device = next(generator.transformer.parameters()).device
    result = {
        "model": name,
        "weights": module_digest(generator.transformer),
        "sequences": SEQUENCES,
        "inside_band": inside(statistics, kinds),
        "sites": statistics,
        "versions": package_versions(device),
    }
    folder = Path("runs/statistics") / name
    write_json(folder / "statistics.json", result)
    outlier_figure(generator.adapter, *rows, folder / "outliers.png", name)
    print(f"{'site':24} channel ratio  sink ratio")
    for site, values in statistics.items():
        print(f"{site:24} {values['channel_ratio']:13.2f} {values['sink_ratio']:11.2f}")
    print(f"inside the band: {result['inside_band']}\nwritten: {folder}")
    if options.record:
        write_json(ZOO / "records" / f"{name}-statistics.json", result)
        cards.write()


if __name__ == "__main__":
    main()
