"""Files of results.

A result is read only if it is whole; whether it counts for this code is said by `identity.results`.
It is what a run writes (`metrics.json` in `<...>-<hash>/`), or a copy of it with its place in a
table:

    {"schema", "cell", "seed", "metrics", "cost", "provenance": {"hash", "identity", "config", ...},
     "files", "digest"}
    + {"table": {"name", "scale", "row", "point"}}

`provenance.identity` is what was hashed, the departures from the defaults (`identity.departures`);
`identity_digest` is of the whole identity (`identity.whole`), and `device_class` the part of it
that departures do not have. `digest` is that of all other fields, `files` are those of the run's
folder (`folders.py`): a run counts while they are whole. Results in folders of runs that are older
than these two fields count without them.

Copies are committed, without `config` and `files`: those of a table and model are the lines of one
file, `<table>/<model>.jsonl`. Its first line is about all of them:

    {"results", "digest", "common": {"schema", "cell", "provenance", "table", "digest"}}

It says how many they are, and has the digest of their digests, so that a line that is lost is
noticed. What all of them have in common of `COMMON_FIELDS` stands there once, with a digest of its
own. Every other line holds what is one result's own, and is read together with the common part
(`common_part.py`); its digest is that of the whole result. A file without `common` has whole
results in its lines, as that of a single result has, and those of former code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.store import files
from experiments.store.common_part import common_part, with_common, without_common
from ptq.files import (
    DIGEST,
    DamagedFile,
    describe_damage,
    open_seal,
    parse_json,
    read_json,
    seal_fault,
    seal_object,
    value_digest,
)

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
# Fewer images than that, and a metric of the whole set is not shown: FID and FID to FP are biased
# upwards by about 1/N (of the RAR twin at W6A6, FID to FP is .012 by 10,000 images and .23 by 256,
# whose seeds spread by .02), IS downwards, and one image in 256 moves precision by .004.
LEAST_IMAGES = {
    "fid": 2000,
    "sfid": 2000,
    "is": 2000,
    "is_file_order": 2000,
    "precision": 2000,
    "recall": 2000,
    "fid2fp": 2000,
    "agreement": 64,
}
# where the versions of all parts start (`identity.parts` raises them one by one); in every hash
# 2: dynamic ranges of attention weights hold zero
RESULT_VERSION = 2
ROOT = Path(__file__).parents[1] / "results"  # committed results, one folder per table
RESULT = "metrics.json"  # in the folder of a run
COMMITTED = ".jsonl"  # suffix of a file of committed results
COMMON = "common"  # in its first line
# what a result is of; what was measured stays in its own line, in its order
COMMON_FIELDS = ("schema", "cell", "provenance", "table")
FIELDS = ("cell", "seed", "metrics", "cost", "provenance")


class ResultError(ValueError):
    """A result file does not count. The message is one line: the file, and why."""


def read_result(path: Path) -> dict[str, Any]:
    """The result in the folder of a run, without its digest.

    Raises:
        ResultError: it cannot be read, is no result, of another RESULT_VERSION, or not of the run
            that the folder is named after.
    """
    try:
        result = read_json(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is truncated or damaged"
        raise ResultError(f"{path}: cannot be read ({reason})") from error
    fault = find_fault(result)
    if fault:
        raise ResultError(f"{path}: {fault}")
    key = result["provenance"]["hash"]
    if path.parent.name.rpartition("-")[2] != key:
        raise ResultError(f"{path}: is of run {key}, but is named after another")
    return files.without_keys(result, DIGEST)


def read_committed(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The whole results in a file of committed ones, and what is wrong with the others; "" if
    nothing is.
    """
    try:
        head, *lines = path.read_text().splitlines() or [""]
    except (OSError, ValueError) as error:
        return [], f"{path}: cannot be read ({describe_damage(error)})"
    faults = []
    summary: dict[str, Any] = {}
    common: dict[str, Any] = {}
    try:
        summary, common = _parse_head(head)
    except DamagedFile as error:
        faults.append(str(error))
    by_digest = {}  # one that is there twice counts once
    digests = []
    for number, line in enumerate(lines, start=2):
        try:
            own = parse_json(line)
        except ValueError:
            faults.append(f"line {number}: cannot be read (it is truncated or damaged)")
            continue
        result = with_common(own, common) if isinstance(own, dict) else own
        fault = find_fault(result) or _copy_fault(result, path.stem)
        if fault:
            faults.append(f"line {number}: {fault}")
            continue
        digests.append(result[DIGEST])
        by_digest[result[DIGEST]] = files.without_keys(result, DIGEST)
    # as text: 1 equals true
    if not faults and json.dumps(summary) != json.dumps(_summary(digests)):
        faults = ["is damaged (its first line is not that of the results below)"]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return list(by_digest.values()), f"{path}: {faults[0]}{more}" if faults else ""


def _parse_head(line: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first line of a file of committed results: their summary, and what they have in common.

    Raises:
        DamagedFile: it is another line, or not what its digest says.
    """
    try:
        head = parse_json(line)
    except ValueError as error:
        raise DamagedFile("line 1: cannot be read (it is truncated or damaged)") from error
    if not isinstance(head, dict) or head.keys() - {COMMON} != _summary([]).keys():
        raise DamagedFile("line 1: is damaged (it is not the first line of committed results)")
    common = open_seal(head[COMMON], f"line 1: {COMMON}") if COMMON in head else {}
    return files.without_keys(head, COMMON), common


def _copy_fault(result: Mapping[str, Any], model: str) -> str:
    """Why a whole result is no line of the file of a model; "" if it is one."""
    if DIGEST not in result:
        return "is damaged (a copy has a digest, this one has none)"
    own = result["cell"].get("model")
    return "" if own == model else f"is of model {own}"


def write_committed(path: Path, copies: Sequence[Mapping[str, Any]]) -> None:
    """Write results, each in a line and with its digest, as a file of committed ones."""
    for result in copies:
        files.require_finite(result, str(path))
    sealed = [seal_object(result) for result in copies]
    head = _summary([result[DIGEST] for result in sealed])
    common = _common_fields(sealed)
    if common:
        head[COMMON] = seal_object(common)
    lines = [json.dumps(head)]
    for result in sealed:
        own = without_common(result, common)
        # without blanks: there are thousands of lines
        lines.append(json.dumps(own, separators=(",", ":"), allow_nan=False))
    files.write_text(path, "\n".join(lines) + "\n")


def _common_fields(sealed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What results have in common of `COMMON_FIELDS`."""
    if len(sealed) < 2:  # a single result is whole in its line
        return {}
    descriptions = []
    for result in sealed:
        descriptions.append({name: result[name] for name in COMMON_FIELDS if name in result})
    return common_part(descriptions)


def _summary(digests: Sequence[str]) -> dict[str, Any]:
    """What the first line of a file of committed results says of the others."""
    return {"results": len(digests), DIGEST: value_digest(digests)}


def known_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that are known: what cannot be computed, or is not, is null."""
    return {name: value for name, value in figures.items() if value is not None}


def find_fault(result: Any) -> str:
    """Why a value from a file is no result that counts; "" if it is one."""
    return (
        _form_fault(result)
        or _value_fault(result)
        or _identity_fault(result["provenance"])
        or describe_seal(result)
    )


def describe_seal(result: dict[str, Any]) -> str:
    """Whether a result differs from its digest; results in older folders have none."""
    fault = seal_fault(result)
    return f"is damaged ({fault})" if fault else ""


def _form_fault(result: Any) -> str:
    """Which part of a result is missing or of another kind."""
    present = result if isinstance(result, dict) else {}
    for field in FIELDS:
        if field not in present:
            return f"is no result, it lacks {field}"
    for field in ("cell", "metrics", "cost", "files"):
        if not isinstance(result.get(field, {}), dict):
            return f"is no result, its {field} is no mapping"
    if not isinstance(_identity(result["provenance"]), dict):
        return "is no result, its provenance.identity is no mapping"
    # only copies have a place in a table; a run's own file is whole without
    table = result.get("table", {"row": "", "point": {}})
    has_place = (
        isinstance(table, dict)
        and isinstance(table.get("row"), str)
        and isinstance(table.get("point"), dict)
    )
    return "" if has_place else "is no result, its table has no row or no point"


def _value_fault(result: dict[str, Any]) -> str:
    """Which value of a result is not allowed."""
    if type(result["seed"]) is not int:  # a boolean is none
        return f"is no result, its seed is {result['seed']!r}"
    for name, value in result["metrics"].items():
        if not is_finite(value):
            return f"is no result, its {name} is {value!r}"
    return ""


def _identity_fault(provenance: dict[str, Any]) -> str:
    """Whether a result is of another version, or its hash is not that of its identity."""
    identity = _identity(provenance)
    if identity.get("version") != RESULT_VERSION:
        # results of version 1 did not state it
        return f"is of RESULT_VERSION {identity.get('version', 1)}, this code's is {RESULT_VERSION}"
    key = value_digest(identity)
    if key != provenance.get("hash"):
        return f"is of run {key}, but calls itself {provenance.get('hash')}"
    return ""


def _identity(provenance: Any) -> Any:
    """What was hashed, empty if nothing is said of it; None without any provenance."""
    return (provenance.get("identity") or {}) if isinstance(provenance, dict) else None


def is_finite(value: Any) -> bool:
    """Whether a metric is a finite number or unknown."""
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))


def is_shown(metric: str, images: int | None) -> bool:
    """Whether a metric says something at so many images; None where it is not of images."""
    least = LEAST_IMAGES.get(metric.removeprefix("lite0_"), 0)
    return images is None or images >= least


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result with its digest. One that cannot be written is printed: it may have taken
    hours.

    Raises:
        OSError: the system refuses to write; the error names `path`.
    """
    try:
        files.write_sealed(path, result)
    except OSError:
        figures = known_figures({**result["metrics"], **result["cost"]})
        known = (f"{name}={value:.6g}" for name, value in figures.items())
        print(f"not written: {'  '.join(known)}", flush=True)
        raise


def table_label(name: str, scale: str) -> str:
    """What a table's results are filed under; those at another scale than the twins' are apart."""
    return name if scale == "twin" else f"{name}-{scale}"
