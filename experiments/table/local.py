"""The engine `local`: workers of this machine, a number of them per GPU."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from experiments.config.overrides import CONF
from experiments.store import provenance
from experiments.table.engine import Engine
from experiments.table.job_board import Board
from experiments.table.workers import command
from ptq.spec import ConfigError


def slots(engine: Engine) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of every local worker: `jobs` for each group of GPUs; without a GPU
    nothing to set.

    Raises:
        ConfigError: a job is to have more GPUs than there are.
    """
    import torch

    if not torch.cuda.is_available():
        return [None] * engine.jobs
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    gpus = max(engine.gpus, 1)
    if gpus > len(devices):
        raise ConfigError(f"engine.gpus: {gpus} is more than the {len(devices)} of this machine")
    groups = [",".join(devices[i : i + gpus]) for i in range(0, len(devices) - gpus + 1, gpus)]
    return [group for group in groups for _ in range(engine.jobs)]


class Local:
    """Processes of this machine, one per slot, each with its share of the cores. They end when we
    do."""

    def __init__(self, engine: Engine, board: Board) -> None:
        self.board = board
        self.slots = slots(engine)
        self.number = len(self.slots)
        self.threads = engine.threads or max(1, (os.cpu_count() or 1) // self.number)
        self.processes: list[subprocess.Popen | None] = [None] * self.number

    @property
    def logs(self) -> Iterable[Path]:
        return self.board.folder.glob("worker-*.log")

    def free(self) -> list[int]:
        """Numbers of slots in which nothing runs."""
        return [i for i, p in enumerate(self.processes) if p is None or p.poll() is not None]

    def alive(self) -> int:
        return self.number - len(self.free())

    def start(self, number: int) -> None:
        for slot in self.free()[:number]:
            sharing = min(self.slots.count(self.slots[slot]), len(self.board.jobs))
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": str(self.threads),
                provenance.WORKERS: str(sharing),
            }
            if self.slots[slot] is not None:
                environment["CUDA_VISIBLE_DEVICES"] = self.slots[slot]
            with (self.board.folder / f"worker-{slot}.log").open("a") as log:
                self.processes[slot] = subprocess.Popen(
                    command(self.board, f"parent={os.getpid()}"),
                    cwd=CONF.parent,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )

    def stop(self) -> None:
        running = [p for p in self.processes if p is not None and p.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
