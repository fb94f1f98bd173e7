"""Locks: whoever works in a folder holds its lock.

The system frees a lock when its process ends, however it ends. Who has to wait for one says so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, ReadWriteLock, Timeout

POLL_SECONDS = 0.1  # between two looks at a lock that another process holds
LINUX_LOCKS = Path("/proc/locks")  # which process holds which lock


class Busy(RuntimeError):
    """Another process holds a lock."""


@contextmanager
def hold_lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """Make the folder and hold its lock.

    Raises:
        Busy: another process holds it and we are not to wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with hold_file(folder / ".lock", wait, name=str(folder)):
        yield


@contextmanager
def hold_file(path: Path, wait: bool = True, name: str = "") -> Iterator[None]:
    """Hold the lock that the file `path` stands for; it is made if need be.

    Args:
        name: what the error calls it; its path by default.

    Raises:
        Busy: another process holds it and we are not to wait.
    """
    # where a file system has no flock, filelock would leave a marker that outlives a killed process
    lock = FileLock(path, poll_interval=POLL_SECONDS, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)  # tried first: only a wait is announced
    except Timeout as error:
        if not wait:
            raise Busy(f"{name or path}: locked by another process") from error
        announce_wait(name or str(path), lock_holder(path))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def share_lock(path: Path, alone: bool) -> Iterator[None]:
    """Hold the lock of a file together with others, or `alone`; waits for that.

    The file is a small database of SQLite, in which filelock keeps locks that can be shared.
    """
    lock = ReadWriteLock(path, is_singleton=False)
    acquire = lock.acquire_write if alone else lock.acquire_read
    try:
        try:
            acquire(blocking=False)
        except Timeout:
            announce_wait(str(path), None)
            acquire()
        try:
            yield
        finally:
            lock.release()
    finally:
        lock.close()


def announce_wait(name: str, holder: int | None) -> None:
    """Say on stderr what this process waits for, and for whom where that is known."""
    process = "another process" if holder is None else f"process {holder}"
    print(f"waiting: {name} is locked by {process}", file=sys.stderr, flush=True)


def lock_holder(path: Path) -> int | None:
    """The process of this machine that holds the lock of a file, where the system tells it."""
    try:
        status = path.stat()
        lines = LINUX_LOCKS.read_text().splitlines()
    except OSError:
        return None
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    file = f"{device}:{status.st_ino}"
    for line in lines:
        # "7: FLOCK  ADVISORY  WRITE 2344 fe:00:2285602 0 EOF"; of one that waits with "->"
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5] == file:
            # not positive where the holder is outside this container
            return int(words[4]) if int(words[4]) > 0 else None
    return None
