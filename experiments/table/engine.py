"""Engines: who does the jobs of a table, and how it comes to an end when some of them die.

    inproc   this process, one job after the other
    local    processes of this machine: `jobs` per GPU (or per group of `gpus` GPUs), or `jobs` in
    all without a GPU slurm    an array of `jobs` Slurm tasks, submitted through submitit

Workers share a `board`, on which jobs that died are taken up again; an engine only keeps enough
workers alive. Two
commands on one table have a board each and share the work too: a cell that the other one runs is
`cell.Busy`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm
from yaml import YAMLError

from experiments.config.overrides import CONF
from experiments.table.job_board import Board
from ptq.spec import ConfigError, require

NAMES = ("inproc", "local", "slurm")

STARTS = 3  # times that workers may be started in vain

# seconds between two looks at a board, at Slurm's queue
POLL = 0.5


@dataclass
class Engine:
    """A file under `conf/engine`, with overrides `engine.KEY=VALUE`.

    Attributes:
        jobs: workers per group of GPUs, or in all without a GPU (local); tasks of the array
            (slurm).
        gpus: that one job may use; more than one only helps jobs that sample with torchrun
            (scale=paper). 0: Slurm is asked for none.
        threads: of every worker; None shares the cores out (local) or is one (slurm).
        partition, minutes, memory_gb, setup: of Slurm; setup are shell lines that run before a
            worker starts.
    """

    name: str = "inproc"
    jobs: int = 1
    gpus: int = 1
    threads: int | None = None
    partition: str | None = None
    minutes: int = 240
    memory_gb: int | None = None
    setup: list[str] | None = None


def read(name: str, overrides: Sequence[str]) -> Engine:
    """The engine called `name`, with overrides such as `jobs=4`.

    Raises:
        ConfigError: there is none, or an override is not allowed.
    """
    require("engine", name, NAMES)
    try:
        given = OmegaConf.from_dotlist(list(overrides))
        values = OmegaConf.merge(
            OmegaConf.structured(Engine), OmegaConf.load(CONF / "engine" / f"{name}.yaml"), given
        )
        engine = OmegaConf.to_object(values)
    except OmegaConfBaseException as error:
        known = ", ".join(f.name for f in fields(Engine))
        said = str(error).splitlines()[0]
        raise ConfigError(f"engine.{error.full_key}: {said}, allowed are {known}") from error
    except YAMLError as error:
        raise ConfigError(f"engine: one of {' '.join(overrides)} is no value of YAML") from error
    require("engine.name", engine.name, (name,))
    for key, least in (("jobs", 1), ("gpus", 0), ("threads", 1), ("minutes", 1), ("memory_gb", 1)):
        value = getattr(engine, key)
        if value is not None and value < least:
            raise ConfigError(f"engine.{key}: {value} is not an integer from {least} on")
    return engine


class Workers(Protocol):
    """Processes that work on a board. `number`: how many there should be."""

    number: int

    @property
    def logs(self) -> Iterable[Path]:
        """What they write to."""

    def alive(self) -> int:
        """How many run or wait to run."""

    def start(self, number: int) -> None:
        """Start so many more."""

    def stop(self) -> None:
        """End those that are alive."""


def watch(board: Board, workers: Workers) -> None:
    """Show progress and time left until all jobs are done; start workers again where some have
    died.

    Raises:
        ConfigError: workers end without beginning a job.
    """
    signs = -1
    vain = 0
    with tqdm(total=len(board.jobs), desc="cells", dynamic_ncols=True) as bar:
        try:
            while left := board.open():
                bar.update(len(board.jobs) - len(left) - bar.n)
                lacking = min(workers.number, len(left)) - workers.alive()
                if lacking > 0:
                    vain = vain + 1 if board.signs() == signs else 0
                    signs = board.signs()
                    if vain == STARTS:
                        raise ConfigError(
                            f"engine: workers end before they begin a job: {last_words(workers.logs)}"
                        )
                    workers.start(lacking)
                time.sleep(POLL)
            bar.update(len(board.jobs) - bar.n)
        finally:
            workers.stop()


def warnings_of(logs: Iterable[Path]) -> list[str]:
    """What workers said of files that they ignored, every line once."""
    lines = (line for path in logs for line in path.read_text(errors="replace").splitlines())
    return list(dict.fromkeys(line for line in lines if line.startswith("ignored: ")))


def last_words(logs: Iterable[Path]) -> str:
    """The last line of the newest log that is not empty."""
    for path in sorted(logs, key=lambda p: p.stat().st_mtime, reverse=True):
        lines = path.read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1]
    return "they said nothing"
