"""Locks: whoever works in a folder holds its lock.

The system frees a lock when its process ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, ReadWriteLock, Timeout

POLL_SECONDS = 0.1  # between two looks at a lock that another process holds


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
        lock.acquire(blocking=wait)
    except Timeout as error:
        raise Busy(f"{name or path}: locked by another process") from error
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
    try:
        with lock.write_lock() if alone else lock.read_lock():
            yield
    finally:
        lock.close()
