"""The parts of the code that decide numbers, each with a version of its own.

A result states the versions of the parts that it used. Who changes the numbers of a part raises its
version in `RAISED_VERSIONS`; then the results that used it no longer count, and all others do. Two
golden files of the tests see to it: one of all defaults, one of the numbers of tiny models.

    family.FAMILY                    a model, its adapter and its tokenizer
    sampler.FAMILY                   how images of a family are drawn
    steps                            decoding steps that are compiled (`sampler.compiled`)
    quantizer                        specs, ranges, scopes, folding, the order of the pipeline
    method.SWITCH                    what a switch of `method` turns on, with its settings
    rounder.NAME, selector.NAME, softmax.NAME
    int8                             integer arithmetic of `mode=int8`
    evaluator.likelihood, evaluator.images
                                     what a run is judged by
    evaluator.features               what `evaluate` judges samples by
    analysis.NAME, benchmark         measurements that are no runs
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.identity.resolved import resolved_values
from experiments.store.results import RESULT_VERSION
from models.registry import find_preset

# versions above RESULT_VERSION, where all start: {"method.gps": 3}
RAISED_VERSIONS: dict[str, int] = {
    # AdaLN ahead, draws in the graph, and INT8 by kernels of its own round sums in another order
    "steps": 4,
    # on a GPU whole blocks run by kernels, whose GELU gives one code in a thousand another value
    "int8": 3,
}

BENCHMARK = "speed"  # what a benchmark calls itself
# switches of `method` that belong to the specs, and so to the quantizer
SPEC_SWITCHES = ("quantized", "symmetric", "dynamic")


def version_of(part: str) -> int:
    """The version of a part in this code."""
    return RAISED_VERSIONS.get(part, RESULT_VERSION)


def used_parts(values: Mapping[str, Any]) -> list[str]:
    """The parts that decide the numbers of a run, an analysis or a benchmark.

    Args:
        values: what makes it the same one, with or without defaults.

    Raises:
        CheckpointError: its model is not registered.
    """
    if values.get("what") == BENCHMARK:
        return ["benchmark"]
    family = find_preset(values["model"]).family
    parts = sampling_parts(family)
    if values.get("sampler", {}).get("compiled"):
        parts.append("steps")
    if "what" in values:
        parts.append(f"analysis.{values['what']}")
    elif "judged" in values:
        parts.append("evaluator.features")
        if "held_out" in values:
            parts.append("evaluator.likelihood")
    elif "eval" in values:
        parts += ["evaluator.likelihood", "evaluator.images"]
    if values["mode"] == "int8":
        parts.append("int8")
    if isinstance(values["method"], dict):
        parts += quantization_parts(resolved_values(values))
    return parts


def sampling_parts(family: str) -> list[str]:
    """The parts that decide which images a full-precision model draws."""
    return [f"family.{family}", f"sampler.{family}"]


def quantization_parts(resolved: Mapping[str, Any]) -> list[str]:
    """The parts that decide what becomes of a quantized model."""
    method = resolved["method"]  # switches that are off are not in it
    parts = ["quantizer", f"selector.{resolved['calib']['selector']}"]
    parts.append(f"rounder.{method['rounder']}")
    if method["softmax"] != "int":
        parts.append(f"softmax.{method['softmax']}")
    # texts and numbers are settings of these or of the quantizer
    for switch, value in method.items():
        if value is True and switch not in SPEC_SWITCHES:
            parts.append(f"method.{switch}")
    return parts


def part_versions(values: Mapping[str, Any]) -> dict[str, int]:
    """The versions in this code of the parts that are used."""
    return {part: version_of(part) for part in used_parts(values)}


def raised_versions(values: Mapping[str, Any]) -> dict[str, int]:
    """Of the parts that are used, those whose version has been raised."""
    versions = part_versions(values)
    return {part: version for part, version in versions.items() if version != RESULT_VERSION}


def stated_version(values: Mapping[str, Any], part: str) -> int:
    """The version of a part that a result's departures state."""
    return values.get("versions", {}).get(part, values.get("version", 1))
