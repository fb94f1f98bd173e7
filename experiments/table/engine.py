"""Engines: who does the jobs of a table, and how it comes to an end when some of them die.

    inproc   this process, one job after the other
    local    processes of this machine: `jobs` per GPU (or per group of `gpus` GPUs), or `jobs` in
    all without a GPU slurm    an array of `jobs` Slurm tasks, submitted through submitit

Workers share a `board`, on which jobs that died are taken up again; an engine only keeps enough
workers alive. Two
commands on one table have a board each and share the work too: a cell that the other one runs is
`cell.Busy`.

    python -m experiments.table.engine BOARD      # one worker; this is what `local` and `slurm`
    start
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm
from yaml import YAMLError

from experiments.config.compose import CONF
from experiments.store import provenance
from experiments.table.job_board import Board, work
from ptq.types import ConfigError, require

NAMES = ("inproc", "local", "slurm")
STARTS = 3  # times that workers may be started in vain
# seconds between two looks at a board, at Slurm's queue
POLL = 0.5
SQUEUE = 3.0


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


def run(engine: Engine, board: Board) -> list[dict[str, Any]]:
    """Do all jobs of a board; their outcomes in order."""
    if engine.name == "inproc":
        import torch

        if engine.threads is not None:
            torch.set_num_threads(engine.threads)
        work(board, show=True)
    else:
        workers = Local(engine, board) if engine.name == "local" else Slurm(engine, board)
        watch(board, workers)
        for line in warnings_of(workers.logs):
            print(line, file=sys.stderr)
    lost = {"error": "no process finished it", "traceback": ""}
    return [board.outcome(i) or lost for i in range(len(board.jobs))]


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


def command(board: Board, *options: str) -> list[str]:
    """What starts a worker."""
    return [sys.executable, "-m", "experiments.table.engine", str(board.folder.resolve()), *options]


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


def end_with(parent: int) -> None:
    """End this process as soon as its parent has ended."""

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    folder, *options = sys.argv[1:]
    for option in options:
        end_with(int(option.removeprefix("parent=")))
    work(Board(Path(folder)))


if __name__ == "__main__":
    main()
