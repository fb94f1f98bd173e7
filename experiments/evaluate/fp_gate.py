"""The gate on full precision: no quantized figure is called reproduced before the full-precision
one is.

A released model has a published FID. Its full-precision row under `sampler=official`, measured on
50,000 images by `experiments.evaluate` with the official Inception weights against ADM's
statistics, has to lie within 0.1 of it; until then something between weights, sampler and evaluator
is not as the authors have it, and quantized rows prove nothing.

    python -m experiments.evaluate.fp_gate RESULT.json ...

RESULT.json is a result of `experiments.evaluate`, or a metrics.json. The exit status is 1 if one is
refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.registry import PRESETS
from ptq.types import ConfigError

TOLERANCE = 0.1  # of FID
IMAGES = 50_000
INCEPTION = "6726825d"  # first digits of the official weights' sha256
ALLOWED = "reproduced allowed"
Result = Mapping[str, Any]  # the contents of a metrics.json


@dataclass(frozen=True)
class Verdict:
    """On one model: its published FID, the full-precision FID under both samplers (means over
    seeds), and the gate.

    Attributes:
        official, ptq4arvg: None where not run. reason: why the gate is shut, None if it is open.
    """

    model: str
    published: float
    official: float | None
    ptq4arvg: float | None
    reason: str | None

    @property
    def allowed(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        return ALLOWED if self.allowed else f"refused: {self.reason}"


def is_full_precision(result: Result, model: str, sampler: str) -> bool:
    """Whether a result is of the full-precision model under a sampler."""
    cell = result.get("cell")  # None: images of unknown origin
    return bool(cell) and (cell["model"], cell["method"], cell["sampler"]) == (model, "fp", sampler)


def find_weakness(result: Result) -> str | None:
    """Why a full-precision result does not count for the gate, or None if it does."""
    evaluator = result["provenance"].get("evaluator")
    if result["metrics"].get("fid") is None:
        return "its FID is not computed"
    if not evaluator or evaluator["extractor"] != "inception":
        return "its FID is not of Inception by experiments.evaluate"
    if not evaluator["weights"].startswith(INCEPTION):
        return f"its Inception weights are {evaluator['weights'][:8]}, not the official {INCEPTION}"
    if "statistics" not in (evaluator["reference"] or {}):
        return "its reference is made of images, not of the statistics of ADM's reference batch"
    cell = result["cell"]
    settings = result["provenance"].get("sampler_settings")
    if settings is not None and settings != dict(PRESETS[cell["model"]].samplers[cell["sampler"]]):
        return f"its sampler settings are not those of sampler={cell['sampler']}"
    images = result["provenance"]["images"]
    return None if images == IMAGES else f"its FID is of {images:,} images, not of {IMAGES:,}"


def judge_model(model: str, results: Iterable[Result]) -> Verdict:
    """The verdict on a model with a published FID."""
    published = PRESETS[model].published_fid
    rows = list(results)
    found: dict[str, float | None] = {}
    reasons: list[str] = []
    for sampler in ("official", "ptq4arvg"):
        of_sampler = [r for r in rows if is_full_precision(r, model, sampler)]
        usable = [r["metrics"]["fid"] for r in of_sampler if find_weakness(r) is None]
        found[sampler] = sum(usable) / len(usable) if usable else None
        if sampler == "official" and not usable:
            weak = f": {find_weakness(of_sampler[0])}" if of_sampler else ", it is not run"
            reasons.append(f"no full-precision row under sampler=official{weak}")
    if not reasons:
        distance = abs(found["official"] - published)
        if distance > TOLERANCE + 1e-9:
            reasons.append(
                f"full precision has FID {found['official']:.2f} under sampler=official, {distance:.2f} from the "
                f"published {published:.2f}; allowed is {TOLERANCE}"
            )
    return Verdict(
        model, published, found["official"], found["ptq4arvg"], reasons[0] if reasons else None
    )


def judge_results(results: Iterable[Result]) -> dict[str, Verdict]:
    """A verdict for every model with a published FID that the results are of, in the order of the
    presets."""
    rows = [r for r in results if r.get("cell")]
    models = {r["cell"]["model"] for r in rows}
    return {
        name: judge_model(name, rows)
        for name in PRESETS
        if name in models and PRESETS[name].published_fid is not None
    }


def claim_status(result: Result, judged: Mapping[str, Verdict], scale: str = "paper") -> str | None:
    """What may be said of a quantized result: the verdict on its model; None where there is nothing
    to reproduce.

    That is at any `scale` but "paper", for full precision, and for models without published
    figures.
    """
    cell = result.get("cell")
    if scale != "paper" or not cell or cell["method"] == "fp" or cell["model"] not in PRESETS:
        return None
    if PRESETS[cell["model"]].published_fid is None:
        return None
    return str(judged.get(cell["model"]) or judge_model(cell["model"], ()))


def verdict_table(judged: Mapping[str, Verdict]) -> str:
    """The verdicts as a markdown table."""

    def text(value: float | None) -> str:
        return "not run" if value is None else f"{value:.2f}"

    lines = [
        "| Model | Published FID | FP, official | FP, ptq4arvg | Verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for v in judged.values():
        lines.append(
            f"| `{v.model}` | {v.published:.2f} | {text(v.official)} | {text(v.ptq4arvg)} | {v} |"
        )
    return "\n".join(lines)


def read_result(path: Path) -> Result:
    """A result file.

    Raises:
        ConfigError: it is missing, or not a result.
    """
    try:
        found = json.loads(path.read_text())
        if (
            not {"cell", "metrics", "provenance"} <= set(found)
            or "images" not in found["provenance"]
        ):
            raise ValueError("it is not a result of a run or an evaluation")
    except (OSError, ValueError) as error:
        raise ConfigError(f"results: {path} cannot be read ({error})") from error
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Which models' quantized rows may be called reproduced."
    )
    parser.add_argument("results", nargs="+", type=Path, help="result files")
    try:
        judged = judge_results([read_result(path) for path in parser.parse_args().results])
    except ConfigError as error:
        sys.exit(f"error: {error}")
    if not judged:
        sys.exit("error: results: none is of a model with a published FID")
    print(verdict_table(judged))
    sys.exit(0 if all(v.allowed for v in judged.values()) else 1)


if __name__ == "__main__":
    main()
