"""Files that are never half-written, and digests of values.

A file is written under a temporary name beside its place and then renamed: whoever reads it finds
the old content or the new one, whenever the writer is killed. What the system refuses is an OSError
that names the file, whichever library wrote it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
import typing
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ptq.errors import system_code
from ptq.spec import ConfigError

if typing.TYPE_CHECKING:
    from torch import Tensor


TEMPORARY = ".tmp"  # what the suffix of a temporary name begins with
KEPT_LETTERS = (
    40  # of the file's and the host's name in a temporary one, which must not be too long
)
PROBE_BYTES = 4096  # that a folder must have room for


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path` at the end of the block, or removed if it fails.

    The block writes a file there, or makes a folder; a folder that is at `path` already is for the
    block to remove.

    Raises:
        OSError: the system refuses to write; the error names `path`.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)  # atomic: both are on one file system
    except BaseException as error:  # Ctrl-C and signals, too
        _remove_quietly(temporary)
        code = refusal_code(error, temporary)
        if code is not None:
            raise OSError(code, os.strerror(code), str(path)) from error
        raise


def temporary_path(path: Path) -> Path:
    """A name beside `path` that no other writer has, on whichever host."""
    start = path.name[:KEPT_LETTERS]
    host = socket.gethostname()[:KEPT_LETTERS]
    return path.with_name(f"{start}{TEMPORARY}-{host}-{secrets.token_hex(8)}")


def refusal_code(error: BaseException, temporary: Path) -> int | None:
    """Why the system refused to write `temporary`, as a number of `errno`; None for other errors.

    An error that names another file is of that one. Libraries in Rust or C++ tell the system's
    reasons in the text of errors of their own.
    """
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return error.__context__.errno  # PyTorch's archive fails once more after its file has
    if not isinstance(error, OSError):
        return system_code(error)
    is_of_temporary = error.filename is None or str(error.filename).startswith(str(temporary))
    return error.errno if is_of_temporary else None


def require_writable(path: Path, field: str) -> None:
    """Refuse, before hours of work, a place where a file could not be written after them.

    Nothing of the check is left.

    Raises:
        ConfigError: there is a folder, or the system refuses to write; `field` is how the line
            calls it.
    """
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
        _remove_quietly(temporary)
        for folder in new_folders:  # the deepest one first
            with suppress(OSError):
                folder.rmdir()


def _remove_quietly(path: Path) -> None:
    """Remove a file or a folder, if it is there; an error here must not hide the one before it."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


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


def without_nonfinite(value: object) -> object:
    """`value` with None in place of numbers that JSON does not know, for a log that must go on."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: without_nonfinite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nonfinite(entry) for entry in value]
    return value


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, holds NaN or infinity, or is nested too deep.
    """
    try:
        return json.loads(path.read_text(), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON, only finite numbers are")


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors by name, and texts by name beside them, as safetensors."""
    from safetensors.torch import save_file  # with PyTorch, which texts and JSON do without

    # safetensors refuses views that are not contiguous
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(stored, temporary, metadata)


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write arrays by name as npz."""
    # `np.savez` leaves its archive open when the disk is full, and complains once more then
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:  # may pass 2 GiB
                np.lib.format.write_array(file, array, allow_pickle=False)


def value_digest(value: object, length: int = 8) -> str:
    """First hex digits of the sha256 of a JSON-able value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
