"""Shards: one file per finished micro-batch of a sampling run, complete or absent.

    <folder>/00003.npz    images uint8 (B, 3, S, S); tokens int32 (B, T) of models whose tokens are
                          ids; run: identity of the run; number: which micro-batch

A shard knows its run and its place, so a folder into which shards of two runs were put together is
noticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.store import files
from ptq.files import describe_damage
from ptq.types import ConfigError

ARRAYS = {"images", "tokens", "run", "number"}  # of a shard


class StorageError(ConfigError):
    """A file could not be written: a full disk, no permission. The message is one line."""


@dataclass(frozen=True, eq=False)
class Shard:
    """Images uint8 (B, 3, S, S) and, for models whose tokens are ids, tokens int32 (B, T)."""

    images: np.ndarray
    tokens: np.ndarray | None = None


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npz"


def write_shard(folder: Path, number: int, shard: Shard, run: str) -> None:
    """Write a micro-batch under its final name in one step.

    Raises:
        StorageError: it cannot be written; nothing of it is left.
    """
    path = shard_path(folder, number)
    arrays = {"images": shard.images, "run": np.array(run), "number": np.array(number)}
    if shard.tokens is not None:
        arrays["tokens"] = shard.tokens.astype(np.int32)
    try:
        files.save_arrays(arrays, path)
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(f"samples: {path} cannot be written ({reason})") from error


def is_finished(folder: Path, number: int, run: str, contents: bool = False) -> bool:
    """Whether a micro-batch is there; a damaged file is not.

    Args:
        contents: read the pixels, too, and so compare their checksum.

    Raises:
        ConfigError: it is of another run or place.
    """
    path = shard_path(folder, number)
    if not path.is_file():
        return False
    try:
        with np.load(path) as stored:
            stored_run = str(stored["run"])
            stored_number = int(stored["number"])
            # named in the zip's directory: looking for them reads no pixels
            names = set(stored.files)
            if "images" not in names or not names <= ARRAYS:  # a name may be what is damaged
                return False
            if contents:
                _ = stored["images"], stored.get("tokens")
    except MemoryError:
        raise
    except Exception:  # damaged bytes make the reader fail in any way
        return False
    if (stored_run, stored_number) != (run, number):
        raise ConfigError(
            f"samples: {path} is micro-batch {stored_number} of the run {stored_run!r},"
            f" expected {number} of {run!r}"
        )
    return True


def read_shard(folder: Path, number: int, run: str) -> Shard:
    """A finished micro-batch.

    Raises:
        ConfigError: it is missing, damaged, or of another run or place.
    """
    path = shard_path(folder, number)
    if not is_finished(folder, number, run):
        state = "damaged" if path.is_file() else "missing"
        raise ConfigError(
            f"samples: {path} is {state}; the command that made the others makes it again"
        )
    try:
        # the first reading of the images, which compares their checksum
        with np.load(path) as stored:
            return Shard(stored["images"], stored.get("tokens"))
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise ConfigError(
            f"samples: {path} is damaged ({describe_damage(error)}); delete it and sample again"
        ) from error
