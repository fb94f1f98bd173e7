"""How far a job is: in lines of a log, in a file for another process, in the table's overview."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from experiments.store import progress
from experiments.store.progress import CountedImages, Progress, ProgressDisplay
from experiments.table import overview
from experiments.table.job_queue import JobQueue
from experiments.table.jobs import Job
from experiments.table.overview import Overview
from experiments.table.processes import run_child

CHILD = """
import time
from experiments.store.progress import CountedImages, ProgressDisplay
done = []
images = CountedImages(range(3), 24, lambda: 8 * len(done))
for number in ProgressDisplay.of_process()(images, "sampling"):
    done.append(number)
    time.sleep(1.1)
"""


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_a_log_has_a_line_every_half_minute_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clock = Clock(monkeypatch)
    done = [20]  # of an earlier call, which count in no rate
    counted = CountedImages(range(10), 120, lambda: done[0])
    for _ in ProgressDisplay()(counted, "sampling"):
        clock.now += 20.0
        done[0] += 10
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "sampling: 40 of 120 images, 0.5 a second, 02:40 left",
        "sampling: 60 of 120 images, 0.5 a second, 02:00 left",
        "sampling: 80 of 120 images, 0.5 a second, 01:20 left",
        "sampling: 100 of 120 images, 0.5 a second, 00:40 left",
        "sampling: 120 of 120 images, 0.5 a second",  # the end, whenever the last line was
    ]


def test_many_short_loops_have_lines_as_a_long_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clock = Clock(monkeypatch)
    display = ProgressDisplay()
    for block in range(4):
        for _ in display([1, 2], f"block {block}"):
            clock.now += 8.0
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["block 1: 2 of 2 steps", "block 3: 2 of 2 steps"]


def test_what_a_process_keeps_is_shown_by_the_one_that_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with ProgressDisplay().follow() as (file, look):
        done = run_child([sys.executable, "-c", CHILD], {progress.VARIABLE: str(file)}, look)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sampling: 8 of 24 images, " in capsys.readouterr().err
    assert not file.exists()


def test_a_file_that_is_missing_or_damaged_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "0.progress"
    assert progress.read_progress(path) is None
    path.write_text("{")
    assert progress.read_progress(path) is None
    ProgressDisplay(file=path).keep(Progress("sampling", 8, 16, progress.IMAGES, 0, 4.0))
    assert progress.read_progress(path).rate == 2.0


def test_the_table_says_which_cells_run_how_quickly_and_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(overview.time, "monotonic", lambda: clock.now)
    words = [("model=rar_b", f"method={name}", "quant=w6a6", "seed=0") for name in ("fp", "rtn")]
    queue = JobQueue.create(
        tmp_path / "queue", [Job("run", (*word, "eval=full")) for word in words]
    )
    with Overview(queue, workers=1) as shown:
        clock.now += 31.0
        sampling = Progress("sampling", 400, 1000, progress.IMAGES, 0, 40.0)
        ProgressDisplay(file=queue.progress_path(0)).keep(sampling)
        shown.show([0, 1])
        # the other cell takes as long as the one that runs
        assert capsys.readouterr().err.splitlines() == [
            "cells: 0 of 2 done; running: rar_b fp w6a6 s0 (10 images/s, 01:00 left); "
            "about 02:40 left in all"
        ]
        clock.now += 60.0
        shown.show([1])
        assert capsys.readouterr().err.splitlines() == [
            "cells: 1 of 2 done; about 01:00 left in all"
        ]
