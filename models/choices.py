"""What is said of a name that is none of those there are."""

from __future__ import annotations

from collections.abc import Iterable

from ptq.errors import nearest


def describe_unknown(noun: str, value: object, allowed: Iterable[str]) -> str:
    """One line that lists the allowed names, and ends with the nearest if one is similar."""
    names = list(allowed)
    return f"{noun}: {value!r} is not one of {', '.join(names)}{nearest(str(value), names)}"
