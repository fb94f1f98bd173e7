"""What a table's command shows while its workers run: cells that are done, what runs, time left.

Each worker keeps a file of its job's progress in the folder of the queue, which all engines share;
so the overview is the same for processes of this machine and for tasks of Slurm.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, field

from tqdm import tqdm

from experiments.store.progress import IMAGES, LINE_SECONDS, Progress, read_progress, show_rate
from experiments.table.job_queue import JobQueue
from experiments.table.jobs import Job

NAMED = ("model", "method", "quant", "calib", "seed")  # overrides that name a cell
STALE_SECONDS = 600.0  # after which a worker that said nothing is not shown
SHOWN_JOBS = 4  # that a line names


@dataclass
class Overview:
    """Cells of a queue, on a bar or, where there is no terminal, in a line every half minute.

    Attributes:
        taken: seconds of the jobs that were finished meanwhile.
    """

    queue: JobQueue
    workers: int
    taken: dict[int, float] = field(default_factory=dict)
    seen_at: dict[int, float] = field(default_factory=dict)  # when a job was first seen running
    line_at: float = field(default_factory=lambda: time.monotonic() + LINE_SECONDS)

    def __enter__(self) -> Overview:
        total = len(self.queue.jobs)
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=total, desc="cells", dynamic_ncols=True, disable=hidden)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self, open_jobs: list[int]) -> None:
        """Show the state of the queue."""
        done = len(self.queue.jobs) - len(open_jobs)
        running = self.running_jobs(open_jobs)
        if not self.bar.disable:
            self.bar.update(done - self.bar.n)
            self.bar.set_postfix_str(self.describe_jobs(running), refresh=False)
        elif time.monotonic() >= self.line_at:
            self.line_at = time.monotonic() + LINE_SECONDS
            print(self.line(done, running), file=sys.stderr, flush=True)

    def line(self, done: int, running: dict[int, Progress]) -> str:
        """The state in words."""
        words = [f"cells: {done} of {len(self.queue.jobs)} done"]
        if running:
            words.append(f"running: {self.describe_jobs(running)}")
        left = self.seconds_left(done, running)
        if left is not None:
            words.append(f"about {tqdm.format_interval(left)} left in all")
        return "; ".join(words)

    def running_jobs(self, open_jobs: list[int]) -> dict[int, Progress]:
        """What the workers say of the open jobs; finished ones are noted with their seconds."""
        now = time.monotonic()
        running = {}
        for index in open_jobs:
            path = self.queue.progress_path(index)
            progress = read_progress(path)
            if progress is None or time.time() - path.stat().st_mtime > STALE_SECONDS:
                continue
            self.seen_at.setdefault(index, now)
            running[index] = progress
        for index in self.seen_at.keys() - set(open_jobs) - self.taken.keys():
            self.taken[index] = now - self.seen_at[index]
        return running

    def seconds_left(self, done: int, running: dict[int, Progress]) -> float | None:
        """Seconds until all cells are done: those that wait take what others have taken."""
        lefts = [progress.left_s for progress in running.values() if progress.left_s is not None]
        waiting = len(self.queue.jobs) - done - len(running)
        longest = max(lefts, default=0.0)
        if waiting <= 0:
            return longest if lefts else None
        times = list(self.taken.values())
        if not times:  # the cells that run are the only ones known
            for progress in running.values():
                if progress.left_s is not None:
                    times.append(progress.seconds + progress.left_s)
        if not times:
            return None
        return longest + waiting * statistics.mean(times) / self.workers

    def describe_jobs(self, running: dict[int, Progress]) -> str:
        """Jobs that run, each with its images per second and the time left."""
        lines = []
        for index, progress in list(running.items())[:SHOWN_JOBS]:
            lines.append(f"{describe_job(self.queue.jobs[index])} {describe_progress(progress)}")
        if len(running) > SHOWN_JOBS:
            lines.append(f"and {len(running) - SHOWN_JOBS} more")
        return ", ".join(lines)


def describe_job(job: Job) -> str:
    """A job by the overrides that name its cell."""
    values = dict(override.split("=", 1) for override in job.overrides if "=" in override)
    words = [] if job.what == "run" else [job.what]
    for key in NAMED:
        if key in values:
            words.append(f"s{values[key]}" if key == "seed" else values[key])
    return " ".join(words)


def describe_progress(progress: Progress) -> str:
    """What a job does, its images per second and the time left."""
    words = [progress.what]
    if progress.unit == IMAGES and progress.rate:
        words = [f"{show_rate(progress.rate)} images/s"]
    if progress.left_s is not None:
        words.append(f"{tqdm.format_interval(progress.left_s)} left")
    return f"({', '.join(words)})"
