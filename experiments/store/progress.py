"""How a long job shows that it goes on."""

from __future__ import annotations

from collections.abc import Iterable

from tqdm import tqdm


def progress_bar(items: Iterable, what: str) -> Iterable:
    """A progress bar on stderr."""
    return tqdm(items, desc=what, leave=False, dynamic_ncols=True)
