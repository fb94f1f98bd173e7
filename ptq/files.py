"""Files that are never half-written.

A file is written under a temporary name beside its place and then renamed: whoever reads it finds
the old content or the new one, whenever the writer is killed.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path` at the end of the block, or removed if it fails.

    The random part of the name keeps writers on several hosts apart.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(16)}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # is there only if the block or the renaming failed
