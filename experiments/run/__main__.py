"""Run one cell of a table, or several with -m.

    python -m experiments.run model=rar_twin method=ptq4arvg quant=w6a6 calib=dgc eval=quick
    python -m experiments.run -m method=rtn,smoothquant,ptq4arvg quant=w8a8,w6a6
    python -m experiments.run dry_run=true method=ptq4arvg eval=full      # what would it take?
    python -m experiments.run -m table=reproduce hydra/launcher=joblib hydra.launcher.n_jobs=2

A finished run is not repeated and a killed one resumes; see `experiments/run/cell.py` for what a
run's folder holds.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import hydra_command
from experiments.config.overrides import RUN
from experiments.options import answer_help, option, parse_options
from experiments.registry.labels import describe_hidden
from experiments.registry.seeds import SEEDS_HELP
from experiments.store.results import is_shown, known_figures
from ptq.errors import user_errors
from ptq.spec import ConfigError

if typing.TYPE_CHECKING:
    from omegaconf import DictConfig


Grid = Sequence[Sequence[str]]  # the overrides of each job


@dataclass
class Options:
    """What to do with the config."""

    dry_run: bool = option(
        False, help="say what the run would take, and how far it is; nothing is run or written"
    )
    table: str | None = option(
        None, help="with -m: all cells of a table of conf/table/registry.yaml, on the twins"
    )
    seeds: str | None = option(None, help=f"of the table, left out [0]: {SEEDS_HELP}")


def run_cell(raw: DictConfig) -> None:
    """Validate the config, run its cell, print its figures and where they are."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from experiments.config.compose import validate_config

    config = validate_config(raw)

    # the libraries that sample and measure are loaded for a config that is allowed
    from experiments.run import cell
    from experiments.run.preparation import check_held_out
    from experiments.store.progress import ProgressDisplay
    from experiments.store.tracking import sync_command

    # `run_cell` prepares the run again: a process hashes a file of weights once
    folder = cell.prepare_run(config).folder
    check_held_out([config])
    result = cell.run_cell(config, ProgressDisplay.of_process())
    for line in describe_figures(result):
        print(line)
    print(f"results: {folder}")
    upload = None if config.tracker.mode == "none" else sync_command(Path(config.runs))
    if upload is not None:
        print(f"to upload: {upload}")


def describe_figures(result: Mapping[str, Any]) -> Iterator[str]:
    """The figures of a result in one line, and in another what its images are too few for."""
    images = result["provenance"]["images"]
    known = known_figures(result["metrics"])
    words = []
    for name, value in {**known, **known_figures(result["cost"])}.items():
        if is_shown(name, images):
            words.append(f"{name}={value:.4g}")
    yield "  ".join(words)
    hidden = describe_hidden(known, images)
    if hidden:
        yield hidden


def price_runs(grid: Grid | None) -> None:
    """Say what the runs of the command line would take."""
    from experiments.config.compose import validate_config
    from experiments.run.dry_run import RunPrices

    prices = RunPrices()
    # Hydra notes a grid in the folder of its jobs
    with tempfile.TemporaryDirectory(prefix="ar-ptq-") as folder:
        sys.argv.append(f"hydra.sweep.dir={folder}")
        hydra_command.run_hydra(lambda raw: prices.add(validate_config(raw)), RUN, grid)
    prices.report()


def main() -> None:
    with user_errors():
        answer_help(__doc__, {"Options": Options}, f"{RUN.describe()}\n{hydra_command.HELP}")
        options, overrides = parse_options(Options, sys.argv[1:])
        sys.argv[1:] = overrides
        grid = None
        if options.table is not None:
            from experiments.run.table_grid import own_words, table_grid

            grid = table_grid(options.table, options.seeds or "[0]", overrides)
            sys.argv[1:] = own_words(overrides)
        elif options.seeds is not None:
            raise ConfigError(
                f"seeds: {options.seeds} is of a table alone, give table=NAME, or seed= of one run"
            )
        if options.dry_run:
            price_runs(grid)
        else:
            hydra_command.run_hydra(run_cell, RUN, grid)


if __name__ == "__main__":
    main()
