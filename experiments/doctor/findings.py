"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass

OK = "ok"
PART = "in part"
MISSING = "missing"
STATES = (OK, PART, MISSING)  # from best to worst


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        text: what is there, or how to get it.
    """

    name: str
    state: str
    text: str


def worst_state(findings: list[Finding]) -> str:
    """The worst state of some findings; `ok` of none."""
    return max((finding.state for finding in findings), key=STATES.index, default=OK)
