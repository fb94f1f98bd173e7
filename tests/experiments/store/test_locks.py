"""Locks keep processes apart, and a killed process frees its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiments.store import locks
from experiments.store.locks import Busy, hold_file, hold_lock, share_lock

HOLDER = """
import sys, time
from pathlib import Path
from experiments.store import locks
with locks.{call}:
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def other_process(call: str) -> Iterator[subprocess.Popen]:
    """A process that holds a lock until it is killed."""
    command = [sys.executable, "-c", HOLDER.format(call=call)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_held_folder_is_refused_and_freed_by_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with other_process(f"hold_lock(Path({str(folder)!r}))") as process:
        with (
            pytest.raises(Busy, match=f"^{folder}: locked by another process$"),
            hold_lock(folder, wait=False),
        ):
            pass
        process.kill()
        with hold_lock(folder):  # waits until the system has freed it
            pass


@pytest.mark.parametrize("is_known", [True, False])
def test_who_waits_says_once_for_what_and_for_whom(
    is_known: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    with other_process(f"hold_lock(Path({str(folder)!r}))") as process:
        if is_known:  # as Linux tells it, which some sandboxes do not
            status = (folder / ".lock").stat()
            device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
            line = f"1: FLOCK  ADVISORY  WRITE {process.pid} {device}:{status.st_ino} 0 EOF\n"
            (tmp_path / "locks").write_text(line)
        monkeypatch.setattr(locks, "LINUX_LOCKS", tmp_path / "locks")
        threading.Timer(3 * locks.POLL_SECONDS, process.kill).start()
        with hold_lock(folder):
            pass
    holder = f"process {process.pid}" if is_known else "another process"
    assert capfd.readouterr().err == f"waiting: {folder} is locked by {holder}\n"


def test_who_does_not_wait_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with hold_lock(tmp_path), share_lock(tmp_path / "gpu.lock", alone=True):
        pass
    assert capfd.readouterr().err == ""


def test_who_waits_for_a_gpu_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.lock"
    with other_process(f"share_lock(Path({str(path)!r}), alone=False)") as process:
        threading.Timer(3 * locks.POLL_SECONDS, process.kill).start()
        with share_lock(path, alone=True):
            pass
    assert capfd.readouterr().err == f"waiting: {path} is locked by another process\n"


def test_a_lock_is_free_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "0.lock"
    with pytest.raises(ValueError, match="inside"), hold_file(path):
        raise ValueError("inside")
    with hold_file(path, wait=False):
        pass


def test_a_shared_lock_is_shared_until_someone_wants_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    with other_process(f"share_lock(Path({str(path)!r}), alone=False)") as process:
        with share_lock(path, alone=False):
            pass
        process.kill()
    with share_lock(path, alone=True):
        pass
