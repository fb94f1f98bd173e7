"""What is said of a name that is none of those there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def describe_unknown(noun: str, value: object, allowed: Iterable[str]) -> str:
    """One line that lists the allowed names, and ends with the nearest if one is similar.

    Case and hyphens do not count: `RAR-B` is `rar_b`.
    """
    names = list(allowed)
    by_plain_name: dict[str, str] = {}
    for name in names:
        by_plain_name.setdefault(plain_name(name), name)
    similar = difflib.get_close_matches(plain_name(str(value)), by_plain_name, n=1)
    advice = f"; did you mean {by_plain_name[similar[0]]}?" if similar else ""
    return f"{noun}: {value!r} is not one of {', '.join(names)}{advice}"


def plain_name(word: str) -> str:
    """A word as names of presets are written."""
    return word.lower().replace("-", "_")
