"""A worker: a process that does the jobs of a queue, one after the other.

python -m experiments.table.workers QUEUE      # what the engines `local` and `slurm` start
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

from tqdm import tqdm

from experiments.table.job_queue import JobQueue
from ptq.errors import user_errors

PATIENCE = 10.0  # seconds after which a job that waited for another process is tried again


class Worker:
    """Does jobs until none is left that nobody holds: always the first that waits for nobody.

    A job may wait for another process that computes the same cell, such as the full-precision run
    of its model. It is tried again after `PATIENCE`, or waited for when nothing else is left.
    """

    def __init__(self, queue: JobQueue, in_terminal: bool = False) -> None:
        self.queue = queue
        self.in_terminal = in_terminal
        self.waited_at: dict[int, float] = {}  # when a job last had to wait

    def work(self) -> None:
        """Do all jobs that can be done."""
        # modules stay: runs, which collect garbage before they measure memory, pass over them
        gc.freeze()
        total = len(self.queue.jobs)
        hidden = not (self.in_terminal and sys.stderr.isatty())
        with tqdm(total=total, desc="cells", dynamic_ncols=True, disable=hidden) as bar:
            # waiting blocks this worker, so it waits only when nothing else is ready
            while self.finish_one_ready() or self.finish_one_waiting():
                # other workers finish jobs, too
                done = total - len(self.queue.open_jobs())
                if self.in_terminal and hidden:
                    print(f"cells: {done} of {total} done", file=sys.stderr, flush=True)
                elif not hidden:
                    bar.update(done - bar.n)

    def finish_one_ready(self) -> bool:
        """Finish the first job that can be done at once; False if there is none."""
        for index in self.queue.open_jobs():
            if self.is_ready(index) and self.finish_job(index, wait=False):
                return True
        return False

    def finish_one_waiting(self) -> bool:
        """Finish the first open job, waiting for other processes; False if others hold them all."""
        return any(self.finish_job(index, wait=True) for index in self.queue.open_jobs())

    def is_ready(self, index: int) -> bool:
        """Whether the job has not had to wait lately."""
        waited_at = self.waited_at.get(index, -PATIENCE)  # ready at once if it never waited
        return time.monotonic() - waited_at >= PATIENCE

    def finish_job(self, index: int, wait: bool) -> bool:
        """Do a job; False if another worker holds it, or it has to wait and we do not."""
        # held while the job runs: the lock ends with this process, however it ends
        with self.queue.claim(index) as is_ours:
            if not is_ours:
                return False
            if not self.queue.begin(index):
                return True  # it has failed too often
            outcome = self.queue.attempt(index, wait, self.in_terminal)
            if outcome is None:
                self.queue.postpone(index)  # waiting counts as no attempt
                self.waited_at[index] = time.monotonic()
                return False
            self.queue.finish(index, outcome)
            return True


def worker_command(queue: JobQueue) -> list[str]:
    """The command line that starts a worker."""
    folder = str(queue.folder.resolve())
    return [sys.executable, "-m", "experiments.table.workers", folder]


def main() -> None:
    with user_errors():
        (folder,) = sys.argv[1:]
        Worker(JobQueue(Path(folder))).work()


if __name__ == "__main__":
    main()
