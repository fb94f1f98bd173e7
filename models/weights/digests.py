"""Digests of weights: sha256 of a file, and of what a module holds.

A file is hashed once per process and state: its digest is remembered under path, inode, size and
times. A file system's clock moves in steps of some milliseconds, so a file that has only just
changed could change again unseen; its digest is not remembered.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.weights.checkpoints import CheckpointError, split_entry

SETTLED = 2.0  # seconds after its last change from which on a file can be known by its times

_memory: dict[tuple[FileState, Hashable], str] = {}


class FileState(NamedTuple):
    """What changes whenever a file is written or replaced."""

    path: str
    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int  # status change: unlike the modification time, no program can set it back

    @property
    def settled(self) -> bool:
        """Whether any further change would show in the times."""
        return time.time() - max(self.modified_ns, self.changed_ns) / 1e9 > SETTLED


def file_state(path: Path) -> FileState:
    """The state of a file; links are followed.

    Raises:
        OSError: there is no such file.
    """
    stat = path.stat()
    return FileState(
        path=os.path.realpath(path),
        device=stat.st_dev,
        inode=stat.st_ino,
        size=stat.st_size,
        modified_ns=stat.st_mtime_ns,
        changed_ns=stat.st_ctime_ns,
    )


def remember_digest(path: Path, what: Hashable, compute: Callable[[], str]) -> str:
    """`compute()`, which depends on the file's content and on `what` alone; computed once per
    process for each state of the file.

    A missing file is left to `compute`. An entry that `path` names (`PATH::ENTRY`) counts.
    """
    path, entry = split_entry(path)
    if not path.is_file():
        return compute()
    what = (what, entry)
    state = file_state(path)
    key = (state, what)
    if key in _memory:
        return _memory[key]
    digest = compute()
    if state.settled and file_state(path) == state:  # nobody wrote to it meanwhile
        _memory[key] = digest
    return digest


def file_digest(path: Path, field: str = "weights") -> str:
    """sha256 (64 hex digits) of a file, whichever entry of it is named.

    Args:
        field: what an error calls the file.

    Raises:
        CheckpointError: the file is missing or unreadable.
    """

    path, _ = split_entry(path)

    def hash_content() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    try:
        return remember_digest(path, "sha256", hash_content)
    except OSError as error:
        raise CheckpointError(f"{field}: {path} cannot be read ({error.strerror})") from error


def module_digest(module: nn.Module) -> str:
    """sha256 (16 hex digits) over names and values of a module's state dict: the identity of its
    weights."""
    return tensors_digest(module.state_dict().items())


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 (16 hex digits) over names and values, in the order in which they come."""
    sha256 = hashlib.sha256()
    for name, value in tensors:
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        sha256.update(name.encode())
        sha256.update(raw.numpy())
    return sha256.hexdigest()[:16]
