"""Digests of what ships: `SHA256SUMS` in `models/zoo`, in the format of `sha256sum`.

A file below the table is compared with its line whenever it is asked for, and read for that once
per process. What is trained there puts its own digest into the table.
"""

from __future__ import annotations

import os
from pathlib import Path

from models.weights.checkpoints import CheckpointError
from models.weights.conversions import temporary_file
from models.weights.digests import file_digest

TABLE = "SHA256SUMS"
SHOWN = 16  # digits of a digest, in an error


def require_pinned(path: Path) -> Path:
    """The path itself, unless the file there is not the one that the table names.

    A file without a table above it is not compared.

    Raises:
        CheckpointError: it is another one, has no line, or the table is damaged.
    """
    table = find_table(path)
    if table is None or not path.is_file():
        return path
    name = path.relative_to(table.parent).as_posix()
    expected = read_table(table).get(name)
    if expected is None:
        raise CheckpointError(
            f"weights: {table} has no line for {name}; training writes one, and so does "
            f"`sha256sum {name} >> {TABLE}` in its folder"
        )
    found = file_digest(path)
    if found != expected:
        raise CheckpointError(
            f"weights: {path} is not the file that ships: its sha256 is {found[:SHOWN]}..., "
            f"expected {expected[:SHOWN]}..."
        )
    return path


def pin_file(path: Path) -> None:
    """Put the digest of a file into the table above it, if there is one."""
    table = find_table(path)
    if table is None:
        return
    pins = read_table(table)
    pins[path.relative_to(table.parent).as_posix()] = file_digest(path)
    lines = [f"{digest}  {name}\n" for name, digest in sorted(pins.items())]
    with temporary_file(table.parent) as part:
        part.write_text("".join(lines))
        os.replace(part, table)


def find_table(path: Path) -> Path | None:
    """The table that stands beside a file, or one folder higher."""
    for folder in list(path.parents)[:2]:
        if (folder / TABLE).is_file():
            return folder / TABLE
    return None


def read_table(table: Path) -> dict[str, str]:
    """Digests by the names of files.

    Raises:
        CheckpointError: a line is no digest with a name.
    """
    pins = {}
    for line in table.read_text(errors="replace").splitlines():
        digest, separator, name = line.partition("  ")
        is_digest = len(digest) == 64 and not digest.strip("0123456789abcdef")
        if not separator or not is_digest:
            raise CheckpointError(f"weights: {table} is damaged, {line[:80]!r} is no line of it")
        pins[name] = digest
    return pins
