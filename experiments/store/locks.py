"""Locks of folders: whoever works in one holds its lock."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Busy(RuntimeError):
    """Another process holds a folder's lock."""


@contextmanager
def hold_lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """Make the folder and hold its lock, which the system frees when the process ends.

    Raises:
        Busy: another process holds it and we are not to wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise Busy(f"{folder}: another process is at it") from error
        yield
