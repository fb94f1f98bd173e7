"""The engine `local`: workers of this machine, a number of them per GPU."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from experiments.store import provenance
from experiments.table.engine import Engine
from experiments.table.job_queue import JobQueue
from experiments.table.processes import child_environment, end_processes, is_running
from experiments.table.workers import worker_command
from ptq.config.files import PACKAGES
from ptq.spec import ConfigError


def worker_devices(engine: Engine) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of every worker: `jobs` workers for each group of GPUs.

    Without a GPU there is nothing to set: None for each of `jobs` workers.

    Raises:
        ConfigError: a job is to have more GPUs than there are.
    """
    import torch

    if not torch.cuda.is_available():
        return [None] * engine.jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # the user's or a scheduler's choice
    if visible:
        devices = visible.split(",")
    else:
        devices = list(map(str, range(torch.cuda.device_count())))
    gpus = max(engine.gpus, 1)  # 0 has a meaning for Slurm alone
    if gpus > len(devices):
        raise ConfigError(f"engine.gpus: {gpus} is more than the {len(devices)} of this machine")
    workers: list[str | None] = []
    for start in range(0, len(devices) - gpus + 1, gpus):  # GPUs that fill no group stay idle
        group = ",".join(devices[start : start + gpus])
        workers += [group] * engine.jobs
    return workers


class LocalWorkers:
    """Workers of this machine, each with its share of the cores. They end with this process."""

    def __init__(self, engine: Engine, queue: JobQueue) -> None:
        self.queue = queue
        self.devices = worker_devices(engine)
        self.number = len(self.devices)
        self.threads = engine.threads or max(1, (os.cpu_count() or 1) // self.number)
        self.processes: list[subprocess.Popen | None] = [None] * self.number

    @property
    def logs(self) -> Iterable[Path]:
        return self.queue.folder.glob("worker-*.log")

    def free_places(self) -> list[int]:
        """Numbers of the workers that do not run."""
        places = []
        for place, process in enumerate(self.processes):
            if not is_running(process):
                places.append(place)
        return places

    def alive(self) -> int:
        return self.number - len(self.free_places())

    def start(self, number: int) -> None:
        for place in self.free_places()[:number]:
            # appended: the words of the worker that died before it stay
            with (self.queue.folder / f"worker-{place}.log").open("a") as log:
                self.processes[place] = subprocess.Popen(
                    worker_command(self.queue),
                    cwd=PACKAGES,
                    env=self.environment(place),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )

    def environment(self, place: int) -> dict[str, str]:
        """The environment of a worker: its threads, its GPUs, and how many workers share these."""
        devices = self.devices[place]
        # recorded with every result: the time of a shared GPU counts in parts
        sharing = min(self.devices.count(devices), len(self.queue.jobs))
        environment = child_environment()
        environment["OMP_NUM_THREADS"] = str(self.threads)
        environment[provenance.WORKERS] = str(sharing)
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        return environment

    def stop(self) -> None:
        end_processes(self.processes)
