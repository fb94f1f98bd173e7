"""A list of jobs in a folder, which any number of workers do together.

A worker takes the first job that nobody has and that waits for nobody, does it, and writes what
came of it. A job is held by a file lock, which the system frees when its process ends, however it
ends; so nobody keeps a list of who does what, and workers may come and go. A job whose process died
is taken up again, at most `ATTEMPTS` times in all, and then counts as failed. A job that runs out
of GPU memory is done once more when no other worker of the board is at that GPU, and so is what is
timed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from experiments.store.files import write_json
from experiments.table import jobs
from experiments.table.jobs import Job

ATTEMPTS = 3  # processes that may die of one job

# what CUDA's errors say when there is too little of it
MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Board:
    """A folder with jobs, and what came of them.

    jobs.jsonl has one job a line; of job i there are `i.lock`, `i.tries` (a byte for every process
    that began it) and, once it is done, `i.json`. `gpu-<host>-<devices>.lock` is shared by the
    workers of a GPU.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs = [Job.parse(line) for line in (folder / "jobs.jsonl").read_text().splitlines()]

    @classmethod
    def create(cls, folder: Path, todo: Sequence[Job]) -> Board:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "jobs.jsonl").write_text("".join(job.text() + "\n" for job in todo))
        return cls(folder)

    def outcome(self, index: int) -> dict[str, Any] | None:
        path = self.folder / f"{index}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def finish(self, index: int, outcome: dict[str, Any]) -> None:
        write_json(self.folder / f"{index}.json", outcome)

    def open(self) -> list[int]:
        """Jobs without an outcome."""
        return [i for i in range(len(self.jobs)) if not (self.folder / f"{i}.json").is_file()]

    def signs(self) -> int:
        """A number that grows whenever a job is begun or done."""
        return sum(
            p.stat().st_size if p.suffix == ".tries" else 1
            for p in self.folder.glob("[0-9]*.[tj]*")
        )

    @contextmanager
    def claim(self, index: int) -> Iterator[bool]:
        """Hold a job, unless another worker does or it is done; yields whether we hold it."""
        with (self.folder / f"{index}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield self.outcome(index) is None

    def begin(self, index: int) -> bool:
        """Count that a process begins a held job; False, and the job has failed, if too many have
        died of it."""
        path = self.folder / f"{index}.tries"
        tried = path.stat().st_size if path.is_file() else 0
        if tried >= ATTEMPTS:
            self.finish(
                index, {"error": f"its process died, {tried} times in a row", "traceback": ""}
            )
            return False
        with path.open("ab") as file:
            file.write(b".")
        return True

    @contextmanager
    def gpu(self, alone: bool) -> Iterator[None]:
        """Work on this process's GPU beside other workers, or `alone` on it once their jobs are
        done."""
        name = f"gpu-{socket.gethostname()}-{os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}.lock"
        with (self.folder / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield

    def attempt(self, index: int, wait: bool, show: bool) -> dict[str, Any] | None:
        """What comes of a job; one that is timed, or lacks memory beside others, is done alone on
        its GPU."""
        job = self.jobs[index]
        if job.what != "speed":
            with self.gpu(alone=False):
                outcome = jobs.run(job, wait, show)
            if not lacked_memory(outcome):
                return outcome
        with self.gpu(alone=True):
            outcome = jobs.run(job, wait, show)
        if lacked_memory(outcome):
            said = "out of memory with no other worker on its GPU, a smaller sampler.microbatch may help"
            outcome = {**outcome, "error": f"{said} ({outcome['error']})"}
        return outcome

    def postpone(self, index: int) -> None:
        """Take a `begin` back."""
        path = self.folder / f"{index}.tries"
        os.truncate(path, path.stat().st_size - 1)


def lacked_memory(outcome: dict[str, Any] | None) -> bool:
    """Whether a job failed for want of GPU memory."""
    return outcome is not None and any(sign in outcome.get("error", "") for sign in MEMORY)


@contextmanager
def shared_board(runs: Path, todo: Sequence[Job]) -> Iterator[Board]:
    """A board for the jobs, removed in the end; boards of commands that were killed are removed
    too."""
    from experiments.store.locks import Busy, hold_lock

    root = jobs.folder_of(str(runs))
    folder = root / f".board-{time.time_ns()}-{os.getpid()}"
    with ExitStack() as held:
        with hold_lock(root):  # so that nobody takes a board that is not locked yet for a stale one
            for stale in root.glob(".board-*"):
                try:
                    with hold_lock(stale, wait=False):
                        shutil.rmtree(stale, ignore_errors=True)
                except Busy:
                    continue
            held.enter_context(hold_lock(folder))
        try:
            yield Board.create(folder, todo)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
