"""Whether the files in the folder of a result are those that the result was written with.

A result names them, each with its size and digest, so that a folder in which one is missing, cut or
another run's is noticed:

    "files": {"samples.npz": {"bytes": 1024, "sha256": "0123456789abcdef"}}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ptq.files import DIGEST_LETTERS


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and digest of those of the named files that are in a folder."""
    described = {}
    for name in names:
        path = folder / name
        if path.is_file():
            described[name] = {"bytes": path.stat().st_size, "sha256": short_digest(path)}
    return described


def find_damage(folder: Path, described: Mapping[str, Any], contents: bool = False) -> str:
    """How a folder's files differ from their description: one line; "" if they do not.

    Args:
        contents: compare their digests, too, which reads files that this process has not read.
    """
    for name, expected in described.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: is missing, expected {expected['bytes']} bytes"
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path}: is damaged (it has {size} bytes, expected {expected['bytes']})"
        if contents and short_digest(path) != expected["sha256"]:
            return (
                f"{path}: is damaged (its sha256 is {short_digest(path)}, "
                f"expected {expected['sha256']})"
            )
    return ""


def short_digest(path: Path) -> str:
    """The first digits of a file's sha256; a file that has not changed is read once."""
    from models.weights.digests import file_digest  # with PyTorch, which readers of figures lack

    return file_digest(path, "files")[:DIGEST_LETTERS]
