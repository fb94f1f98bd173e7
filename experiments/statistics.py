"""Measure the activation statistics of a model: outlier channels and sink tokens at every input
that has sinks.

    python -m experiments.statistics model=rar_twin

It writes JSON and the paper's four pictures under runs/statistics. The definitions stand in
`experiments/analyses/outliers.py`. Measured on held-out sequences, conditional branch.
"""

from __future__ import annotations

import sys
import typing
from dataclasses import dataclass
from pathlib import Path

from experiments.config.overrides import RUN
from experiments.options import answer_help, option, option_names, parse_options, refuse_unknown
from ptq.errors import user_errors
from ptq.spec import ConfigError

if typing.TYPE_CHECKING:
    from models.registry import Generator
    from ptq.types import Rows

SEQUENCES = 512


@dataclass
class Options:
    """What to measure, and where the figures go."""

    model: str = option("rar_twin", help="the twin", choices=tuple(RUN.group_choices("model")))
    weights: str | None = option(None, help="file of other weights than the shipped ones")
    sequences: int = option(
        SEQUENCES, help="of held-out tokens; those on record have 512", at_least=2, at_most=100_000
    )
    record: bool = option(
        False, help="write to models/zoo/records, too, and rewrite the model cards"
    )


def heldout_rows(generator: Generator, n: int = SEQUENCES) -> tuple[Rows, Rows]:
    """Calibration rows of n shipped held-out images, conditional and unconditional.

    Raises:
        ConfigError: there are fewer. CheckpointError: the held-out tokens are missing.
    """
    from experiments.evaluate import likelihood

    stored = likelihood.load_held_out(generator.preset, n)
    return generator.adapter.rows(stored["tokens"], stored["labels"])


def measure_statistics(options: Options) -> None:
    """Measure a model, write the figures and print them.

    Raises:
        ConfigError, CheckpointError: no twin, or its files are missing.
    """
    # PyTorch is loaded for a command line that is allowed
    import models
    from experiments.analyses.figures import outlier_figure
    from experiments.analyses.outliers import measure_outliers, share_inside_bands
    from experiments.store.files import require_writable, write_json
    from experiments.store.provenance import package_versions
    from experiments.train_zoo import model_cards
    from models.weights.digests import module_digest

    name = options.model
    generator = models.load(name, options.weights)
    if not generator.preset.weights.shipped:
        raise ConfigError(
            f"model: {name} has no shipped held-out tokens; statistics are measured on the twins"
        )
    folder = Path("runs/statistics") / name
    require_writable(folder / "statistics.json", "runs")
    rows = heldout_rows(generator, options.sequences)  # conditional, unconditional
    statistics = measure_outliers(generator.adapter, rows[0])
    kinds = {site.name: site.kind for site in generator.adapter.sites}
    device = next(generator.transformer.parameters()).device
    result = {
        "model": name,
        "weights": module_digest(generator.transformer),
        "sequences": options.sequences,
        "inside_band": share_inside_bands(statistics, kinds),
        "sites": statistics,
        "versions": package_versions(device),
    }
    write_json(folder / "statistics.json", result)
    outlier_figure(generator.adapter, *rows, folder / "outliers.png", name)
    print(f"{'site':24} channel ratio  sink ratio")
    for site, values in statistics.items():
        print(f"{site:24} {values['channel_ratio']:13.2f} {values['sink_ratio']:11.2f}")
    print(f"inside the band: {result['inside_band']}\nwritten: {folder}")
    if options.record:
        model_cards.write_record(f"{name}-statistics", result)
        model_cards.write_cards()


def main() -> None:
    with user_errors():
        answer_help(__doc__, {"Options": Options})
        options, others = parse_options(Options, sys.argv[1:])
        refuse_unknown(others, option_names(Options))
        measure_statistics(options)


if __name__ == "__main__":
    main()
