"""Texts, JSON, tensors and arrays in files that are never half-written.

All are written by `ptq.files.replacing`: beside their place, and then renamed. What is read again
carries a digest of its content.
"""

from __future__ import annotations

import errno
import json
import math
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ptq.files import (
    DamagedFile,
    describe_damage,
    remove_quietly,
    replacing,
    seal_object,
    temporary_path,
)
from ptq.spec import ConfigError

PROBE_BYTES = 4096  # that a folder must have room for


def require_writable(path: Path, field: str) -> None:
    """Refuse, before hours of work, a place where a file could not be written after them.

    Nothing of the check is left.

    Raises:
        ConfigError: there is a folder, or the system refuses to write; `field` is how the line
            calls it.
    """
    if not path.name:  # "." and "/", which a file beside cannot be named after
        reason = os.strerror(errno.EISDIR)
        raise ConfigError(f"{field}: {path} cannot be written ({reason})")
    temporary = temporary_path(path)
    new_folders: list[Path] = []
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        new_folders = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(bytes(PROBE_BYTES))  # a full disk still takes an empty file
    except OSError as error:
        raise ConfigError(f"{field}: {path} cannot be written ({error.strerror})") from error
    finally:
        remove_quietly(temporary)
        for folder in new_folders:  # the deepest one first
            with suppress(OSError):
                folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write text to a file."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON.

    Raises:
        ConfigError: it holds NaN or infinity, which JSON does not know.
    """
    require_finite(value, str(path))  # `json` would not say which number it is
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as JSON with its digest, for `ptq.files.read_sealed`.

    Raises:
        ConfigError: it holds NaN or infinity, which JSON does not know.
    """
    require_finite(value, str(path))
    write_json(path, seal_object(value))


def require_finite(value: object, name: str) -> None:
    """Refuse numbers that JSON does not know.

    Raises:
        ConfigError: names the first one.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}: is {value}, only finite numbers are written")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            require_finite(entry, f"{name}: {key}" if ": " not in name else f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for entry in value:
            require_finite(entry, name)


def without_keys(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """A mapping without some of its keys."""
    return {key: value for key, value in values.items() if key not in keys}


def without_nonfinite(value: object) -> object:
    """`value` with None in place of numbers that JSON does not know, for a log that must go on."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: without_nonfinite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nonfinite(entry) for entry in value]
    return value


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write arrays by name as npz."""
    # `np.savez` leaves its archive open when the disk is full, and complains once more then
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:  # may pass 2 GiB
                np.lib.format.write_array(file, array, allow_pickle=False)


def read_arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Those of the named arrays that an npz holds, each compared with its checksum.

    Raises:
        DamagedFile: it cannot be read, or lacks the first of them.
    """
    try:
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in names if name in stored}
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make the reader fail in any way
        raise DamagedFile(f"{path}: cannot be read ({describe_damage(error)})") from error
    if names[0] not in arrays:
        raise DamagedFile(f"{path}: is damaged (it holds no {names[0]})")
    return arrays
