"""The gate on full precision: no quantized figure is called reproduced before it is.

A released model has a published FID. Its full-precision row under `sampler=official`, measured on
50,000 images by `experiments.evaluate` with the official Inception weights against ADM's
statistics, has to lie within 0.1 of it. A sampler of another name with the same settings counts as
well, since it gives the same images: `ptq4arvg`, of all models but MAR. Until then something
between weights, sampler and evaluator is not as the authors have it, and quantized rows prove
nothing.

    python -m experiments.evaluate.fp_gate RESULT.json ...

RESULT.json is a result of `experiments.evaluate`, or a metrics.json. The exit status is 1 if one
is refused.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.evaluate.options import OFFICIAL_INCEPTION
from experiments.options import answer_help, option, option_names, parse_options, refuse_unknown
from ptq.errors import user_errors
from ptq.files import read_json, seal_fault
from ptq.spec import ConfigError

if typing.TYPE_CHECKING:
    from models.preset import Preset

TOLERANCE = 0.1  # of FID
ROUNDING = 1e-9  # of a difference of two FIDs
IMAGES = 50_000
ALLOWED = "reproduced allowed"
FIELDS = {"cell", "metrics", "provenance"}
Result = Mapping[str, Any]  # the contents of a metrics.json

TABLE_HEAD = (
    "| Model | Published FID | FP, official | FP, ptq4arvg | Verdict |",
    "| --- | --- | --- | --- | --- |",
)


def load_presets() -> Mapping[str, Preset]:
    """All models by name."""
    from models.registry import PRESETS  # with PyTorch, for which --help does not wait

    return PRESETS


@dataclass(frozen=True)
class Verdict:
    """On one model: may its quantized rows be called reproduced?

    Attributes:
        published: the FID that its authors give.
        official, ptq4arvg: full-precision FID under both samplers, means over seeds; None where
            not run.
        reason: why the gate is shut, None if it is open.
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
    cell = result.get("cell")
    if not cell:
        return False  # images of unknown origin
    return (cell["model"], cell["method"], cell["sampler"]) == (model, "fp", sampler)


def find_weakness(result: Result) -> str | None:
    """Why a full-precision result does not count for the gate, or None if it does."""
    origin = result["provenance"]
    evaluator = origin.get("evaluator")
    if result["metrics"].get("fid") is None:
        return "its FID is not computed"
    if not evaluator or evaluator["extractor"] != "inception":
        return "its FID is not of Inception by experiments.evaluate"
    if not evaluator["weights"].startswith(OFFICIAL_INCEPTION):
        weights = evaluator["weights"][:8]
        return f"its Inception weights are {weights}, not the official {OFFICIAL_INCEPTION}"
    if "statistics" not in (evaluator["reference"] or {}):
        return "its reference is made of images, not of the statistics of ADM's reference batch"
    cell = result["cell"]
    settings = origin.get("sampler_settings")
    official_settings = dict(load_presets()[cell["model"]].samplers[cell["sampler"]])
    if settings is not None and settings != official_settings:
        return f"its sampler settings are not those of sampler={cell['sampler']}"
    if origin["images"] != IMAGES:
        return f"its FID is of {origin['images']:,} images, not of {IMAGES:,}"
    return None


def judge_model(model: str, results: Iterable[Result]) -> Verdict:
    """The verdict on a model with a published FID."""
    rows = list(results)
    published = load_presets()[model].published_fid
    official_rows = [row for row in rows if is_full_precision(row, model, "official")]
    ptq4arvg_rows = [row for row in rows if is_full_precision(row, model, "ptq4arvg")]
    samplers = load_presets()[model].samplers
    if not official_rows and samplers["ptq4arvg"] == samplers["official"]:
        official_rows = ptq4arvg_rows
    official = mean_fid(official_rows)
    return Verdict(
        model=model,
        published=published,
        official=official,
        ptq4arvg=mean_fid(ptq4arvg_rows),
        reason=refusal_reason(published, official, official_rows),
    )


def mean_fid(rows: Iterable[Result]) -> float | None:
    """Mean FID of the rows that count, None if there are none."""
    fids = [row["metrics"]["fid"] for row in rows if find_weakness(row) is None]
    return sum(fids) / len(fids) if fids else None


def refusal_reason(
    published: float, official: float | None, official_rows: list[Result]
) -> str | None:
    """Why the gate is shut, or None if it is open.

    Args:
        official: mean full-precision FID under sampler=official, of the rows that count.
        official_rows: all rows under it.
    """
    if official is None:
        weakness = f": {find_weakness(official_rows[0])}" if official_rows else ", it is not run"
        return f"no full-precision row under sampler=official{weakness}"
    distance = abs(official - published)
    if distance > TOLERANCE + ROUNDING:
        return (
            f"full precision has FID {official:.2f} under sampler=official, {distance:.2f} from "
            f"the published {published:.2f}; allowed is {TOLERANCE}"
        )
    return None


def judge_results(results: Iterable[Result]) -> dict[str, Verdict]:
    """Verdicts on all models of the results with a published FID, in the order of the presets."""
    rows = [row for row in results if row.get("cell")]
    measured = {row["cell"]["model"] for row in rows}
    verdicts: dict[str, Verdict] = {}
    for name, preset in load_presets().items():
        if name in measured and preset.published_fid is not None:
            verdicts[name] = judge_model(name, rows)
    return verdicts


def verdict_table(verdicts: Mapping[str, Verdict]) -> str:
    """The verdicts as a markdown table."""
    lines = list(TABLE_HEAD)
    for verdict in verdicts.values():
        cells = (
            f"`{verdict.model}`",
            f"{verdict.published:.2f}",
            fid_text(verdict.official),
            fid_text(verdict.ptq4arvg),
            str(verdict),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fid_text(fid: float | None) -> str:
    """A measured FID as a cell of the table."""
    return "not run" if fid is None else f"{fid:.2f}"


def read_result(path: Path) -> Result:
    """A result file.

    Raises:
        ConfigError: it is missing, or not a result.
    """
    try:
        result = read_json(path)
    except (OSError, ValueError) as error:
        from models.weights.file_kinds import describe_foreign  # with PyTorch

        reason = describe_foreign(path) or getattr(error, "strerror", None) or error
        raise ConfigError(f"results: {path} cannot be read ({reason})") from error
    if not is_result(result):
        raise ConfigError(
            f"results: {path} cannot be read (it is not a result of a run or an evaluation)"
        )
    fault = seal_fault(result)
    if fault:
        raise ConfigError(f"results: {path} is damaged ({fault})")
    return result


def is_result(value: object) -> bool:
    """Whether a JSON value has all that the gate reads of a result, each of its type."""
    if not isinstance(value, dict) or not set(value) >= FIELDS:
        return False
    metrics = value["metrics"]
    origin = value["provenance"]
    if not isinstance(metrics, dict) or not isinstance(origin, dict):
        return False
    fid = metrics.get("fid")
    number = int | float
    # a boolean is an int to Python
    if fid is not None and (not isinstance(fid, number) or isinstance(fid, bool)):
        return False
    if not isinstance(origin.get("images"), int) or not is_evaluator(origin.get("evaluator")):
        return False
    return value["cell"] is None or is_cell(value["cell"])


def is_evaluator(value: object) -> bool:
    """Whether a value says what evaluator a result is of, or that it is of none."""
    if not value:
        return value is None or value == {}  # a metrics.json names none
    if not isinstance(value, dict) or not isinstance(value.get("reference") or {}, dict):
        return False
    return isinstance(value.get("extractor"), str) and isinstance(value.get("weights"), str)


def is_cell(value: object) -> bool:
    """Whether a value says which model, method and sampler a result is of."""
    if not isinstance(value, dict):
        return False
    names = [value.get(name) for name in ("model", "method", "sampler")]
    if not value or not all(isinstance(name, str) for name in names):
        return value == {}
    presets = load_presets()
    model, _, sampler = names
    return model not in presets or sampler in presets[model].samplers


@dataclass
class Options:
    """What to judge."""

    results: list[str] = option(help="result files", positional=True)


def main() -> None:
    with user_errors():
        answer_help(__doc__, {"Options": Options})
        options, others = parse_options(Options, sys.argv[1:])
        refuse_unknown(others, option_names(Options))
        verdicts = judge_results([read_result(Path(path)) for path in options.results])
        if not verdicts:
            raise ConfigError("results: none is of a model with a published FID")
    print(verdict_table(verdicts))
    all_allowed = all(verdict.allowed for verdict in verdicts.values())
    sys.exit(0 if all_allowed else 1)


if __name__ == "__main__":
    main()
