"""A job queue in a folder, which any number of workers empty together.

A worker takes the first job that nobody holds and that waits for nobody, does it, and writes its
outcome. A job is held by a file lock, which the system frees when its process ends, however it
ends: nobody keeps a list of who does what, and workers may come and go. A job whose process died is
taken up again, at most `ATTEMPTS` times in all, and then counts as failed. A job that runs out of
GPU memory is done once more when no other worker of the queue uses that GPU; so is what is timed.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from experiments.store.files import write_sealed
from experiments.store.locks import Busy, hold_file, hold_lock, share_lock
from experiments.store.progress import ProgressDisplay
from experiments.table import jobs
from experiments.table.jobs import Job, Outcome
from ptq.errors import say
from ptq.files import DamagedFile, read_sealed

JOBS = "jobs.json"
ATTEMPTS = 3  # processes that may die of one job
# what CUDA's errors say when memory is short
MEMORY_ERRORS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class JobQueue:
    """A folder with jobs and their outcomes.

    `jobs.json` has all jobs. Job i has `i.lock`, `i.tries` (a byte for every process that began it)
    and, once it is done, `i.json`. The workers of a GPU share `gpu-<host>-<devices>.lock`.

    Raises:
        DamagedFile: the jobs cannot be read, or are not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / JOBS
        written = read_sealed(path)
        if written["of"] != folder.name:
            raise DamagedFile(f"{path}: is of {written['of']}, expected {folder.name}")
        self.jobs = list(map(Job.parse, written["jobs"]))

    @classmethod
    def create(cls, folder: Path, todo: Sequence[Job]) -> JobQueue:
        """Write the jobs to a new folder."""
        write_sealed(folder / JOBS, {"of": folder.name, "jobs": list(map(Job.text, todo))})
        return cls(folder)

    def outcome(self, index: int) -> Outcome | None:
        """What came of a job; None while it is open.

        A file that is damaged or of another job is named and removed: the job is open again.
        """
        path = self._outcome_path(index)
        if not path.is_file():
            return None
        try:
            written = read_sealed(path)
            if written["job"] != self.jobs[index].text():
                raise DamagedFile(f"{path}: is of another job")
        except DamagedFile as error:
            say(f"made anew: {error}")
            path.unlink(missing_ok=True)
            return None
        return written["outcome"]

    def finish(self, index: int, outcome: Outcome) -> None:
        """Write what came of a job."""
        written = {"job": self.jobs[index].text(), "outcome": outcome}
        write_sealed(self._outcome_path(index), written)

    def open_jobs(self) -> list[int]:
        """Indices of the jobs without an outcome."""
        indices = []
        for index in range(len(self.jobs)):
            if not self._outcome_path(index).is_file():
                indices.append(index)
        return indices

    def signs_of_life(self) -> int:
        """A number that grows whenever a job is begun or finished."""
        begun = sum(path.stat().st_size for path in self.folder.glob("[0-9]*.tries"))
        finished = len(list(self.folder.glob("[0-9]*.j*")))
        return begun + finished

    @contextmanager
    def claim(self, index: int) -> Iterator[bool]:
        """Hold a job; yields False if another worker holds it, or it is finished."""
        with ExitStack() as held:
            try:
                held.enter_context(hold_file(self.folder / f"{index}.lock", wait=False))
            except Busy:
                yield False
                return
            # asked under the lock: another worker may have finished it just before
            yield self.outcome(index) is None

    def begin(self, index: int) -> bool:
        """Count an attempt at a held job; False, and the job has failed, after too many."""
        path = self._attempts_path(index)
        # whoever finishes a job leaves an outcome: all that began an open one have died
        attempts = path.stat().st_size if path.is_file() else 0
        if attempts >= ATTEMPTS:
            message = f"its process died, {attempts} times in a row"
            self.finish(index, {"error": message, "traceback": ""})
            return False
        with path.open("ab") as file:  # one byte cannot be written by half
            file.write(b".")
        return True

    def postpone(self, index: int) -> None:
        """Take a `begin` back."""
        path = self._attempts_path(index)
        os.truncate(path, path.stat().st_size - 1)

    @contextmanager
    def hold_gpu(self, alone: bool) -> Iterator[None]:
        """Use this process's GPU beside other workers, or `alone`, once their jobs are done."""
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        # hosts that share the folder have GPUs of their own
        name = f"gpu-{socket.gethostname()}-{devices}.lock"
        with share_lock(self.folder / name, alone):
            yield

    def attempt(self, index: int, wait: bool, in_terminal: bool) -> Outcome | None:
        """Do a job; one that is timed, or lacked memory beside others, alone on its GPU.

        Returns:
            Its outcome; None if another process computes the same cell and we are not to `wait`.
        """
        job = self.jobs[index]
        # a worker's own output is a log; the table's command reads its file
        file = None if in_terminal else self.progress_path(index)
        display = ProgressDisplay(file=file)
        if job.what != "speed":
            with self.hold_gpu(alone=False):
                outcome = jobs.run_job(job, wait, display)
            if not lacks_memory(outcome):
                return outcome
        # what others took is free now, and nobody disturbs the clock
        with self.hold_gpu(alone=True):
            outcome = jobs.run_job(job, wait, display)
        if lacks_memory(outcome):
            advice = (
                "out of memory with no other worker on its GPU, "
                "a smaller sampler.microbatch may help"
            )
            return {**outcome, "error": f"{advice} ({outcome['error']})"}
        return outcome

    def progress_path(self, index: int) -> Path:
        """Where a worker keeps how far its job is."""
        return self.folder / f"{index}.progress"

    def _outcome_path(self, index: int) -> Path:
        return self.folder / f"{index}.json"

    def _attempts_path(self, index: int) -> Path:
        return self.folder / f"{index}.tries"


def lacks_memory(outcome: Outcome | None) -> bool:
    """Whether a job failed for want of GPU memory."""
    error = "" if outcome is None else outcome.get("error", "")
    return any(message in error for message in MEMORY_ERRORS)


@contextmanager
def temporary_queue(runs: Path, todo: Sequence[Job]) -> Iterator[JobQueue]:
    """A queue of the jobs below the folder of runs, removed in the end."""
    root = jobs.tables_folder(runs)
    # the time as well: processes of two hosts may have the same number
    folder = root / f".board-{time.time_ns()}-{os.getpid()}"
    with ExitStack() as locks:
        # while nobody else removes queues: ours is not locked yet, and would pass for a stale one
        with hold_lock(root):
            remove_stale_queues(root)
            locks.enter_context(hold_lock(folder))
        try:
            yield JobQueue.create(folder, todo)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_stale_queues(root: Path) -> None:
    """Remove the queues of commands that were killed: those that nobody has locked."""
    for folder in root.glob(".board-*"):
        try:
            with hold_lock(folder, wait=False):
                shutil.rmtree(folder, ignore_errors=True)
        except Busy:
            continue
