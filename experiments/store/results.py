"""Reading results: a file counts only if it is whole and of this code's RESULT_VERSION and of the
hash in its name.

A result file is what a run writes (`metrics.json` in `<...>-<hash>/`), or a copy
`<...>-<hash>.json` of it with its
place in a table:

    {"schema", "cell", "seed", "metrics", "cost", "provenance": {"hash", "identity", "config", ...}}
    + {"table": {"name", "scale", "row", "point"}}

Committed copies are without `config`. `provenance.identity` is what was hashed (`config.identity`),
RESULT_VERSION in it, so a file proves what it is of.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.store import files

SCHEMA = 1
METRICS = (
    "fid",
    "sfid",
    "is",
    "precision",
    "recall",
    "fid2fp",
    "paired_distance",
    "psnr",
    "token_agreement",
    "nll",
    "kl",
    "agreement",
)
# raise when the same config gives other numbers; 2: dynamic ranges of attention weights hold zero
RESULT_VERSION = 2
ROOT = Path(__file__).parents[1] / "results"  # committed results, one folder per table
FIELDS = ("cell", "seed", "metrics", "cost", "provenance")


class ResultError(ValueError):
    """A result file does not count. The message is one line: the file, and why."""


def read_result(path: Path) -> dict[str, Any]:
    """The result in a file.

    Raises:
        ResultError: it cannot be read, is no result, of another RESULT_VERSION, or not of the run
            it is named after.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is truncated or damaged"
        raise ResultError(f"{path}: cannot be read ({reason})") from error
    if fault := find_fault(found):
        raise ResultError(f"{path}: {fault}")
    key = found["provenance"]["hash"]
    name = path.parent.name if path.name == "metrics.json" else path.stem
    if name.rpartition("-")[2] != key:
        raise ResultError(f"{path}: is of run {key}, but is named after another")
    return found


def find_fault(found: Any) -> str:
    """Why a value from a file is no result that counts; "" if it is one."""
    if not isinstance(found, dict) or any(key not in found for key in FIELDS):
        lacking = (
            next((k for k in FIELDS if k not in found), "")
            if isinstance(found, dict)
            else FIELDS[0]
        )
        return f"is no result, it lacks {lacking}"
    origin = found["provenance"]
    identity = (origin.get("identity") or {}) if isinstance(origin, dict) else None
    for key, value in (
        *((k, found[k]) for k in ("cell", "metrics", "cost")),
        ("provenance.identity", identity),
    ):
        if not isinstance(value, dict):
            return f"is no result, its {key} is no mapping"
    place = found.get("table", {"row": "", "point": {}})
    if (
        not isinstance(place, dict)
        or not isinstance(place.get("row"), str)
        or not isinstance(place.get("point"), dict)
    ):
        return "is no result, its table has no row or no point"
    if type(found["seed"]) is not int:
        return f"is no result, its seed is {found['seed']!r}"
    for name, value in found["metrics"].items():
        if not is_finite(value):
            return f"is no result, its {name} is {value!r}"
    if identity.get("version") != RESULT_VERSION:
        return f"is of RESULT_VERSION {identity.get('version', 1)}, this code's is {RESULT_VERSION}"
    key = files.value_digest(identity)
    if key != origin.get("hash"):
        return f"is of run {key}, but calls itself {origin.get('hash')}"
    return ""


def is_finite(value: Any) -> bool:
    """Whether a metric is a finite number or unknown."""
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))


def stored_result(folder: Path) -> dict[str, Any] | None:
    """The result in the folder of a run, if there is one; a file that does not count is named on
    stderr."""
    if not (folder / "metrics.json").is_file():
        return None
    try:
        return read_result(folder / "metrics.json")
    except ResultError as error:
        print(f"ignored: {error}", file=sys.stderr)
        return None


def read_results(paths: Iterable[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """The results in files, sorted by path, and for every file that does not count one line that
    says why."""
    results = []
    ignored = []
    for path in sorted(paths):
        try:
            results.append(read_result(path))
        except ResultError as error:
            ignored.append(str(error))
    return results, ignored


def table_label(name: str, scale: str) -> str:
    """What a table's results are filed under: those at another scale than the twins' stand
    apart."""
    return name if scale == "twin" else f"{name}-{scale}"


def committed_results(name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The committed results filed under a name, and one line for every file that does not count or
    is of another table."""
    found, ignored = read_results((ROOT / name).glob("*.json"))
    own = []
    for result in found:
        place = result.get("table", {})
        of = table_label(place.get("name", name), place.get("scale", "twin"))
        if of == name:
            own.append(result)
        else:
            ignored.append(
                f"{ROOT / name}: the result of run {result['provenance']['hash']} is of {of}"
            )
    return own, ignored
