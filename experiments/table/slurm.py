"""The engine `slurm`: workers are the tasks of Slurm arrays, submitted through submitit."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from experiments.table.engine import Engine
from experiments.table.job_queue import JobQueue
from experiments.table.workers import worker_command
from ptq.config.files import PACKAGES
from ptq.spec import ConfigError

SQUEUE_INTERVAL = 3.0  # seconds between two looks at Slurm's queue


class SlurmWorkers:
    """Tasks of Slurm arrays; what they did stands in the job queue.

    Whether they live is asked of squeue: accounting (sacct) may not be there, and without it
    submitit waits forever for a task that was killed.

    Raises:
        ConfigError: submitit or Slurm are not here, or Slurm refuses the array.
    """

    def __init__(self, engine: Engine, queue: JobQueue) -> None:
        self.engine = engine
        self.queue = queue
        self.number = engine.jobs
        self.array_ids: list[str] = []
        self.alive_at_last_look = 0
        self.looked_at = 0.0
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "engine: slurm needs sbatch on the PATH, allowed here are inproc and local"
            )
        if importlib.util.find_spec("submitit") is None:
            raise ConfigError(
                "engine: slurm needs the package submitit, allowed here are inproc and local"
            )

    @property
    def logs(self) -> Iterable[Path]:
        return (self.queue.folder / "slurm").glob("*.err")

    def alive(self) -> int:
        # every look asks the controller, which all users share: in between the last answer counts
        if self.array_ids and time.monotonic() - self.looked_at > SQUEUE_INTERVAL:
            # -h: no head, -r: one line per task, %F: the id of its array
            command = ["squeue", "-h", "-r", "-o", "%F"]
            answer = subprocess.run(command, capture_output=True, text=True)
            if answer.returncode == 0:  # else the controller is away for a moment
                tasks = answer.stdout.split()
                self.alive_at_last_look = sum(task in self.array_ids for task in tasks)
                self.looked_at = time.monotonic()
        return self.alive_at_last_look

    def start(self, number: int) -> None:
        import submitit  # late: the other engines do without it

        executor = submitit.SlurmExecutor(folder=self.queue.folder / "slurm")
        executor.update_parameters(**self.array_parameters(number))
        worker = submitit.helpers.CommandFunction(worker_command(self.queue), cwd=PACKAGES)
        try:
            with executor.batch():  # one array for all tasks
                tasks = [executor.submit(worker) for _ in range(number)]
        except submitit.core.utils.FailedJobError as error:
            reason = " ".join(str(error).split())[-300:]  # in one line, of which the end says why
            raise ConfigError(f"engine: Slurm refuses the tasks ({reason})") from error
        # a task's id is <array>_<number>
        self.array_ids.append(tasks[0].job_id.partition("_")[0])
        self.alive_at_last_look += number  # squeue may not list them yet
        self.looked_at = time.monotonic()

    def array_parameters(self, number: int) -> dict[str, object]:
        """What Slurm is asked for: an array of `number` tasks."""
        engine = self.engine
        threads = engine.threads or 1
        parameters = {
            "job_name": "ar-ptq",
            "time": engine.minutes,
            "partition": engine.partition,
            "nodes": 1,
            "ntasks_per_node": 1,
            "cpus_per_task": threads,
            "setup": [f"export OMP_NUM_THREADS={threads}", *(engine.setup or [])],
            "array_parallelism": number,  # no limit: all tasks may run at once
        }
        if engine.gpus:
            parameters["gpus_per_node"] = engine.gpus
        if engine.memory_gb:
            parameters["mem"] = f"{engine.memory_gb}GB"
        return parameters

    def stop(self) -> None:
        if self.array_ids and self.alive():
            subprocess.run(["scancel", *self.array_ids], capture_output=True)
