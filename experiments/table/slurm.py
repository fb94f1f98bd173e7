"""The engine `slurm`: workers are the tasks of Slurm arrays, submitted through submitit."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from experiments.config.overrides import CONF
from experiments.table.engine import Engine
from experiments.table.job_board import Board
from experiments.table.workers import command
from ptq.spec import ConfigError

SQUEUE = 3.0


class Slurm:
    """Tasks of Slurm arrays. Whether they live is asked of squeue: accounting (sacct) may not be
    there, and without it submitit waits forever for a task that died hard. What they did stands on
    the board.

    Raises:
        ConfigError: submitit or Slurm are not here, or Slurm refuses the array.
    """

    def __init__(self, engine: Engine, board: Board) -> None:
        self.engine = engine
        self.board = board
        self.number = engine.jobs
        self.ids: list[str] = []
        self.seen = 0
        self.asked = 0.0
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
        return (self.board.folder / "slurm").glob("*.err")

    def alive(self) -> int:
        if self.ids and time.monotonic() - self.asked > SQUEUE:
            asked = subprocess.run(
                ["squeue", "-h", "-r", "-o", "%F"], capture_output=True, text=True
            )
            if asked.returncode == 0:  # else the controller is away for a moment
                self.seen = sum(line in self.ids for line in asked.stdout.split())
                self.asked = time.monotonic()
        return self.seen

    def start(self, number: int) -> None:
        import submitit

        engine = self.engine
        executor = submitit.SlurmExecutor(folder=self.board.folder / "slurm")
        gpus = {"gpus_per_node": engine.gpus} if engine.gpus else {}
        memory = {"mem": f"{engine.memory_gb}GB"} if engine.memory_gb else {}
        threads = engine.threads or 1
        executor.update_parameters(
            job_name="ar-ptq",
            time=engine.minutes,
            partition=engine.partition,
            nodes=1,
            ntasks_per_node=1,
            cpus_per_task=threads,
            setup=[f"export OMP_NUM_THREADS={threads}", *(engine.setup or [])],
            array_parallelism=number,
            **gpus,
            **memory,
        )
        worker = submitit.helpers.CommandFunction(command(self.board), cwd=CONF.parent)
        try:
            with executor.batch():
                tasks = [executor.submit(worker) for _ in range(number)]
        except submitit.core.utils.FailedJobError as error:
            raise ConfigError(
                f"engine: Slurm refuses the tasks ({' '.join(str(error).split())[-300:]})"
            ) from error
        self.ids.append(tasks[0].job_id.partition("_")[0])
        self.seen = self.seen + number
        self.asked = time.monotonic()

    def stop(self) -> None:
        if self.ids and self.alive():
            subprocess.run(["scancel", *self.ids], capture_output=True)
