"""What is said of a name that is none of those there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def describe_unknown(noun: str, value: object, allowed: Iterable[str]) -> str:
    """One line that lists the allowed names, and ends with the nearest if one is similar."""
    names = list(allowed)
    similar = difflib.get_close_matches(str(value), names, n=1)
    advice = f"; did you mean {similar[0]}?" if similar else ""
    return f"{noun}: {value!r} is not one of {', '.join(names)}{advice}"
