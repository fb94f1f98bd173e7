"""Engines: which processes do the jobs of a table, and what happens when some of them die.

    inproc   this process, one job after the other
    local    workers of this machine: `jobs` per GPU (or per group of `gpus` GPUs), or `jobs` in
             all without a GPU (`local.py`)
    slurm    an array of `jobs` Slurm tasks, submitted through submitit (`slurm.py`)

Workers share a job queue, from which jobs that died are taken up again; an engine only keeps enough
workers alive. Two commands on one table have a queue each and share the work too: a cell that the
other one computes is `locks.Busy`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from experiments.options import nearest
from experiments.table.job_queue import JobQueue
from experiments.table.overview import Overview
from experiments.table.workers import Worker
from ptq.config.files import CONF
from ptq.spec import ConfigError, require

ENGINES = ("inproc", "local", "slurm")
VAIN_STARTS = 3  # times that workers may be started in vain
POLL = 0.5  # seconds between two looks at a queue
RANGES = {
    "jobs": (1, 10_000),
    "gpus": (0, 1_000),
    "threads": (1, 10_000),
    "minutes": (1, 10_000_000),
    "memory_gb": (1, 1_000_000),
}


@dataclass
class Engine:
    """A file under `conf/engine`, with overrides `engine.KEY=VALUE`.

    Attributes:
        jobs: workers per group of GPUs, or in all without a GPU (local); tasks of the array
            (slurm).
        gpus: that one job may use; more than one only helps jobs that sample with torchrun
            (scale=paper). 0: Slurm is asked for none.
        threads: of every worker; None shares the cores out (local) or is one (slurm).
        partition, minutes, memory_gb: of Slurm.
        setup: shell lines that Slurm runs before a worker starts.
    """

    name: str = "inproc"
    jobs: int = 1
    gpus: int = 1
    threads: int | None = None
    partition: str | None = None
    minutes: int = 240
    memory_gb: int | None = None
    setup: list[str] | None = None


def read_engine(name: str, overrides: Sequence[str]) -> Engine:
    """The engine called `name`, with overrides such as `jobs=4`.

    Raises:
        ConfigError: there is none, or an override is not allowed.
    """
    require("engine", name, ENGINES)
    try:
        schema = OmegaConf.structured(Engine)  # refuses unknown keys and wrong types
        settings = OmegaConf.load(CONF / "engine" / f"{name}.yaml")
        changes = OmegaConf.from_dotlist(list(overrides))
        engine = OmegaConf.to_object(OmegaConf.merge(schema, settings, changes))
    except OmegaConfBaseException as error:
        raise ConfigError(f"engine.{error.full_key}: {refusal_reason(error)}") from error
    except YAMLError as error:
        raise ConfigError(f"engine: one of {' '.join(overrides)} is no value of YAML") from error
    require("engine.name", engine.name, (name,))  # no override may change it
    for key, (least, most) in RANGES.items():
        value = getattr(engine, key)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"engine.{key}: {value} is not an integer from {least} to {most}")
    return engine


def refusal_reason(error: OmegaConfBaseException) -> str:
    """Why a setting of an engine is refused, and what is allowed."""
    reason = str(error).splitlines()[0]
    key = str(error.full_key)
    if isinstance(error, ConfigKeyError):  # there is no such setting
        allowed = [entry.name for entry in fields(Engine)]
        return f"{reason}, allowed are {', '.join(allowed)}{nearest(key, allowed)}"
    if key in RANGES:
        least, most = RANGES[key]
        return f"{reason}, allowed are integers from {least} to {most}"
    return reason


def work_here(engine: Engine, queue: JobQueue) -> None:
    """The engine `inproc`: this process does all jobs."""
    import torch  # late: it is slow to import

    if engine.threads is not None:
        torch.set_num_threads(engine.threads)
    Worker(queue, in_terminal=True).work()


class Workers(Protocol):
    """Processes that work on a queue. `number`: how many there should be."""

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


def watch_workers(queue: JobQueue, workers: Workers) -> None:
    """Show progress until all jobs are done; start workers again where some have died.

    Raises:
        ConfigError: workers end without beginning a job.
    """
    last_signs = -1  # unlike any number of signs: the first start is not in vain
    vain_starts = 0
    with Overview(queue, workers.number) as overview:
        try:
            while open_jobs := queue.open_jobs():
                overview.show(open_jobs)
                # no more workers than jobs that are left
                missing = min(workers.number, len(open_jobs)) - workers.alive()
                if missing > 0:
                    # workers that a job kills have begun it: no start of theirs was in vain
                    signs = queue.signs_of_life()
                    vain_starts = vain_starts + 1 if signs == last_signs else 0
                    last_signs = signs
                    if vain_starts == VAIN_STARTS:
                        raise ConfigError(
                            "engine: workers end before they begin a job: "
                            f"{last_words(workers.logs)}"
                        )
                    workers.start(missing)
                time.sleep(POLL)
            overview.show([])
        finally:
            workers.stop()  # when this command is stopped, too
    for line in ignored_files(workers.logs):
        print(line, file=sys.stderr)


def ignored_files(logs: Iterable[Path]) -> list[str]:
    """What workers say of files that they ignored or made anew, every line once."""
    lines: dict[str, None] = {}  # in the order in which they were said
    for path in logs:
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith(("ignored: ", "made anew: ")):
                lines[line] = None
    return list(lines)


def last_words(logs: Iterable[Path]) -> str:
    """The last line of the newest log that is not empty."""
    newest_first = sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest_first:
        # a killed worker may leave half a character
        lines = path.read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1]
    return "they said nothing"
