"""Files that are never half-written, and digests of values.

A file is written under a temporary name beside its place and then renamed: whoever reads it finds
the old content or the new one, whenever the writer is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

if typing.TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = ".tmp"  # what the suffix of a temporary name begins with


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path` at the end of the block, or removed if it fails.

    The block writes a file there, or makes a folder; a folder that is at `path` already is for the
    block to remove. The random part of the name keeps writers on several hosts apart.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}{TEMPORARY}-{secrets.token_hex(8)}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        _remove_quietly(temporary)
        raise


def _remove_quietly(path: Path) -> None:
    """Remove a file or a folder, if it is there; an error here must not hide the one before it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write text to a file."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors by name, and texts by name beside them, as safetensors."""
    from safetensors.torch import save_file  # with PyTorch, which texts and JSON do without

    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(stored, temporary, metadata)


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write arrays by name as npz."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def value_digest(value: object, length: int = 8) -> str:
    """First hex digits of the sha256 of a JSON-able value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
