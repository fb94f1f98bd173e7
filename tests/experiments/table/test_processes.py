"""Processes that a worker starts end with it: with those that they start, and however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.table.processes import (
    child_environment,
    end_processes,
    fix_folders,
    run_child,
)
from ptq import errors

ROOT = Path(__file__).parents[3]
# a worker with its command; a launcher such as torchrun stands between it and the process at work
LEAF = """
import os, sys, time
from ptq.errors import user_errors
with user_errors():
    open(sys.argv[1], "w").write(str(os.getpid()))
    time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2]])
"""
WORKER = """
import sys
from ptq.errors import user_errors
from experiments.table.processes import run_child
with user_errors():
    run_child([sys.executable, "-c", *sys.argv[1:]])
"""


def wait_for(condition: object, seconds: float = 20) -> bool:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("launcher", [False, True], ids=["alone", "launched"])
def test_what_a_stopped_worker_started_ends(number: int, launcher: bool, tmp_path: Path) -> None:
    note = tmp_path / "leaf"
    started = [LAUNCHER, LEAF, str(note)] if launcher else [LEAF, str(note)]
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, *started],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert wait_for(lambda: note.is_file() and note.read_text())
    leaf = int(note.read_text())
    assert errors.is_alive(leaf)
    worker.send_signal(number)
    stderr = worker.communicate(timeout=30)[1]
    assert wait_for(lambda: not errors.is_alive(leaf))
    if number != signal.SIGKILL:
        lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert worker.returncode == 128 + number
        assert len(lines) == 1
        assert "Traceback" not in stderr


def test_a_child_says_what_it_says() -> None:
    done = run_child([sys.executable, "-c", "import sys; print(1); sys.exit('error: no')"])
    assert (done.returncode, done.stdout, done.stderr) == (1, "1\n", "error: no\n")


def test_who_does_not_end_when_asked_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.table.processes.GRACE_SECONDS", 0.2)
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print(1, flush=True); time.sleep(60)"
    )
    stubborn = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=child_environment()
    )
    stubborn.stdout.readline()
    end_processes([stubborn])
    assert stubborn.returncode == -signal.SIGKILL
    stubborn.stdout.close()


def test_folders_that_variables_name_are_this_processs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AR_PTQ_WEIGHTS", "weights")
    monkeypatch.delenv("AR_PTQ_DATA", raising=False)
    monkeypatch.setenv("AR_PTQ_CACHE", "")
    fix_folders()
    assert child_environment()["AR_PTQ_WEIGHTS"] == str(tmp_path / "weights")
    assert child_environment()["AR_PTQ_CACHE"] == ""
    assert "AR_PTQ_DATA" not in child_environment()
