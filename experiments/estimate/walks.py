"""Commands on models of released shapes that were run once, on made-up weights: what the dry run
said before, and what they took.

They stand in one file (`RECORD`); `experiments/REPRODUCE.md` has them from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.store import results
from ptq.files import read_sealed

RECORD = results.ROOT / "raw" / "walks.json"
NOTHING = "–"
HEADS = ["What", "Cells", "Device", "Estimated [s]", "Took [s]", "Took / estimated", "Revision"]


def walks_block() -> str:
    """All walks of the record, a line each.

    Raises:
        DamagedFile: the record is not what its digest says.
    """
    lines = [HEADS, ["---"] * len(HEADS)]
    lines += map(describe_walk, read_sealed(RECORD)["walks"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe_walk(walk: Mapping[str, Any]) -> list[str]:
    """The line of a walk; one that was not priced for its device has no estimate."""
    estimated = NOTHING
    ratio = NOTHING
    if walk["estimated_s"] is not None:
        value, least, most = walk["estimated_s"]
        estimated = f"{value:.0f} ({least:.0f} to {most:.0f})"
        ratio = f"{walk['took_s'] / value:.2f}"
    took = f"{walk['took_s']:.0f}"
    return [
        walk["what"],
        str(walk["cells"]),
        walk["device"],
        estimated,
        took,
        ratio,
        f"`{walk['revision']}`",
    ]
