"""Files that are never half-written.

A file is written under a temporary name beside its place and then renamed: whoever reads it finds
the old content or the new one, whenever the writer is killed. What the system refuses is an OSError
that names the file, whichever library wrote it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ptq.errors import system_code

TEMPORARY = ".tmp"  # what the suffix of a temporary name begins with
KEPT_LETTERS = (
    40  # of the file's and the host's name in a temporary one, which must not be too long
)


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
        remove_quietly(temporary)
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


def remove_quietly(path: Path) -> None:
    """Remove a file or a folder, if it is there; an error here must not hide the one before it."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
