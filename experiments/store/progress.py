"""How a long job shows that it goes on.

On a terminal there is a bar. Elsewhere, as in a log, there is a line every half minute, and one at
the end of images:

    sampling: 1,280 of 50,000 images, 12.3 a second, 1:06:00 left

A job whose process another one waits for also keeps a file, which that one reads and shows:
workers of a table for the table's command, and `experiments.sample` for a cell at scale=paper,
which names the file in `AR_PTQ_PROGRESS`.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.store.files import write_json
from ptq.files import read_json

VARIABLE = "AR_PTQ_PROGRESS"  # names the file, of a process that another one waits for
LINE_SECONDS = 30.0  # between two lines, where there is no terminal
FILE_SECONDS = 1.0  # between two writings of the file
IMAGES = "images"
STEPS = "steps"
# images per second, below one a second too
IMAGE_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


@dataclass(frozen=True)
class CountedImages:
    """Things to go through of which images are counted, such as micro-batches.

    Attributes:
        total: images in all. count: how many are finished, by whichever process.
    """

    items: Iterable[Any]
    total: int
    count: Callable[[], int]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        what: it does, in words. unit: what is counted.
        begun: how many were done before. seconds: since then.
    """

    what: str
    done: int
    total: int | None
    unit: str = STEPS
    begun: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """How many a second; 0 as long as none is done."""
        made = self.done - self.begun
        return made / self.seconds if self.seconds > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds that are left; None while nothing says how many."""
        if not self.rate or self.total is None:
            return None
        return (self.total - self.done) / self.rate

    @property
    def is_last_image(self) -> bool:
        """Whether all images are done, which has a line of its own."""
        return self.unit == IMAGES and self.done == self.total

    def line(self) -> str:
        """The progress in words, for a log."""
        of_all = "" if self.total is None else f" of {self.total:,}"
        words = [f"{self.what}: {self.done:,}{of_all} {self.unit}"]
        if self.unit == IMAGES and self.rate:
            words.append(f"{show_rate(self.rate)} a second")
        if self.left_s:
            words.append(f"{tqdm.format_interval(self.left_s)} left")
        return ", ".join(words)


def show_rate(rate: float) -> str:
    """Images a second with three digits."""
    return f"{rate:.3g}" if rate < 1000 else f"{rate:,.0f}"


@dataclass
class ProgressDisplay:
    """Shows how far loops are; calling it wraps what a loop goes through.

    Attributes:
        shown: on stderr. file: that is kept for another process.
    """

    shown: bool = True
    file: Path | None = None
    line_at: float = field(default=0.0, init=False)  # when the next line is due
    file_at: float = field(default=0.0, init=False)

    @classmethod
    def of_process(cls) -> ProgressDisplay:
        """On stderr, or in the file that the process names which waits for this one."""
        path = os.environ.get(VARIABLE)
        return cls() if path is None else cls(shown=False, file=Path(path))

    def __call__(self, items: Iterable[Any], what: str) -> Iterator[Any]:
        """The items, while the loop over them is shown."""
        if isinstance(items, CountedImages):
            total, unit, begun = items.total, IMAGES, items.count()
        else:
            total, unit, begun = count_items(items), STEPS, 0
        started = time.monotonic()
        self.line_at = self.line_at or started + LINE_SECONDS  # many short loops are one long one
        progress = Progress(what, begun, total, unit, begun)
        with self.open_bar(what, total, unit, begun) as bar:
            for item in items:
                yield item
                done = items.count() if unit == IMAGES else progress.done + 1
                seconds = time.monotonic() - started
                progress = replace(progress, done=done, seconds=seconds)
                self.update(bar, progress)
        if unit == IMAGES and bar.disable and self.shown:
            print(progress.line(), file=sys.stderr, flush=True)  # a log says how quick it was

    def open_bar(self, what: str, total: int | None, unit: str, begun: int) -> tqdm:
        """A bar, which shows nothing where there is no terminal."""
        hidden = not (self.shown and sys.stderr.isatty())
        look = {"unit": "img", "bar_format": IMAGE_BAR} if unit == IMAGES else {}
        return tqdm(
            total=total,
            initial=begun,
            desc=what,
            leave=False,
            dynamic_ncols=True,
            disable=hidden,
            **look,
        )

    def update(self, bar: tqdm, progress: Progress) -> None:
        """Show a step on the bar, or in a line if one is due, and in the file."""
        if not bar.disable:
            bar.update(progress.done - bar.n)
        elif self.shown and not progress.is_last_image:
            self.say_sometimes(progress.line())
        self.keep(progress)

    def say_sometimes(self, line: str) -> None:
        """Say a line on stderr, unless the last one was said just now."""
        now = time.monotonic()
        if now >= self.line_at:
            self.line_at = now + LINE_SECONDS
            print(line, file=sys.stderr, flush=True)

    def keep(self, progress: Progress) -> None:
        """Write the file, unless that was done just now."""
        now = time.monotonic()
        if self.file is None or now < self.file_at:
            return
        self.file_at = now + FILE_SECONDS
        try:
            write_json(self.file, asdict(progress))
        except OSError:  # a job does not fail because its progress cannot be said
            self.file = None

    @contextmanager
    def follow(self) -> Iterator[tuple[Path, Callable[[], None]]]:
        """Show another process's progress: the file that it keeps, and what looks into it."""
        with tempfile.TemporaryDirectory(prefix="ar-ptq-") as folder:
            file = self.file or Path(folder) / "progress.json"
            self.line_at = time.monotonic() + LINE_SECONDS
            with self.open_bar("starting", None, IMAGES, 0) as bar:
                yield file, lambda: self.show_other(file, bar)

    def show_other(self, file: Path, bar: tqdm) -> None:
        """Show what another process keeps in its file."""
        progress = read_progress(file)
        if progress is None:
            return
        if not bar.disable:
            bar.set_description_str(progress.what, refresh=False)
            bar.total = progress.total
            bar.update(progress.done - bar.n)
        elif self.shown:
            self.say_sometimes(progress.line())


SILENT = ProgressDisplay(shown=False)


def count_items(items: Iterable[Any]) -> int | None:
    """How many items there are, if they know."""
    return len(items) if hasattr(items, "__len__") else None


def read_progress(path: Path) -> Progress | None:
    """What a file says of a job; None without one that can be read."""
    try:
        return Progress(**read_json(path))
    except (OSError, ValueError, TypeError):
        return None
