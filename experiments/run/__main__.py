"""Run one cell of a table, or several with -m.

    python -m experiments.run model=rar_twin method=ptq4arvg quant=w6a6 calib=dgc eval=quick
    python -m experiments.run -m method=rtn,smoothquant,ptq4arvg quant=w8a8,w6a6

A finished run is not repeated and a killed one resumes; see `experiments/run/cell.py` for what a
run's folder holds.
"""

from __future__ import annotations

import logging
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.config import hydra_command
from experiments.config.overrides import RUN
from experiments.options import answer_help
from experiments.registry.labels import describe_hidden
from experiments.store.results import is_shown
from ptq.errors import user_errors

if typing.TYPE_CHECKING:
    from omegaconf import DictConfig


def run_cell(raw: DictConfig) -> None:
    """Validate the config, run its cell, print its figures and where they are."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from experiments.config.compose import validate_config

    config = validate_config(raw)

    # the libraries that sample and measure are loaded for a config that is allowed
    from experiments.run import cell
    from experiments.store.progress import progress_bar
    from experiments.store.tracking import sync_command

    # `run_cell` prepares the run again: a process hashes a file of weights once
    folder = cell.prepare_run(config).folder
    result = cell.run_cell(config, progress_bar)
    for line in describe_figures(result):
        print(line)
    print(f"results: {folder}")
    upload = None if config.tracker.mode == "none" else sync_command(Path(config.runs))
    if upload is not None:
        print(f"to upload: {upload}")


def describe_figures(result: Mapping[str, Any]) -> Iterator[str]:
    """The figures of a result in one line, and in another what its images are too few for."""
    images = result["provenance"]["images"]
    known = {name: value for name, value in result["metrics"].items() if value is not None}
    shown = {name: value for name, value in known.items() if is_shown(name, images)}
    costs = {name: value for name, value in result["cost"].items() if value is not None}
    yield "  ".join(f"{name}={value:.4g}" for name, value in {**shown, **costs}.items())
    hidden = describe_hidden(known, images)
    if hidden:
        yield hidden


def main() -> None:
    with user_errors():
        answer_help(__doc__, {}, f"{RUN.describe()}\n{hydra_command.HELP}")
        hydra_command.run_hydra(run_cell, RUN)


if __name__ == "__main__":
    main()
