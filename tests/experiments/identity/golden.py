"""What may not change unless the version of a part is raised: defaults, and numbers of tiny models.

    python -m tests.experiments.identity.golden      # write both golden files anew

`defaults.yaml` has the defaults of every part, `numbers.json` what every method makes of a tiny
model of every family, and a digest of a few tokens that each twin draws. Numbers are computed in
float64, where instruction sets of CPUs round no tie another way, and are means over many values.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import models
from experiments.identity.departures import add_versions, describe_run
from experiments.identity.parts import used_parts, version_of
from experiments.identity.resolved import default_settings
from ptq.config.files import CONF
from ptq.files import digest_tensors
from ptq.modules import QuantLinear
from ptq.pipeline import quantize
from ptq.recipe import named
from ptq.registry.entries import ROUNDERS
from ptq.types import Adapter
from tests.experiments.cells import config_of
from tests.families import FAMILIES, calibration, tiny

FOLDER = Path(__file__).parents[2] / "golden" / "identity"
DEFAULTS = FOLDER / "defaults.yaml"
NUMBERS = FOLDER / "numbers.json"
WRITE = "python -m tests.experiments.identity.golden"

# settings that other parts than the quantizer read
OWNERS = {"alpha": "method.smoothquant", "gps_form": "method.gps"}
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml") if path.stem != "fp")
# of methods that train or search: fewer steps, their defaults stand in the other file
SHORTER: dict[str, dict[str, Any]] = {
    "omniquant": {"options": {"omniquant": {"epochs": 1, "batch": 4}}},
    "omniquant_paper": {"options": {"omniquant": {"epochs": 1, "batch": 4}}},
    "os_plus": {"options": {"os_plus": {"steps": 1}}},
    "staq": {"options": {"geometric": {"steps": 4}}},
    "svdquant": {"options": {"svd": {"iterations": 1, "sites": ["fc1"]}}},
}
# what they choose of equally good thresholds differs between machines, and their scales with it
UNSTABLE = {"os_plus": ("w_scale", "x_scale", "error")}
# methods that some families alone have
OWN_FAMILIES = {"shift_and_sum": ("var",)}
IMAGES = 2  # of a tiny model's calibration, and of those that a twin draws
DIGITS = 6  # of numbers in the file
FEWER_STEPS = {"mar": {"num_iter": 4}}  # of twins that draw slowly


def defaults_by_part() -> dict[str, dict[str, Any]]:
    """The defaults of all parts, by name of the setting."""
    by_part: dict[str, dict[str, Any]] = {"quantizer": {}}
    for name, value in flat_settings(default_settings()):
        by_part.setdefault(owner_of(name), {})[name] = value
    return by_part


def flat_settings(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings below a group with their whole names."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def owner_of(name: str) -> str:
    """The part whose numbers a setting decides."""
    match name.split("."):
        case ["method", "options", group, _] if group in ROUNDERS:
            return f"rounder.{group}"
        case ["method", "options", group, _]:
            return f"method.{group}"
        case ["method", field] if field in OWNERS:
            return OWNERS[field]
    return "quantizer"


def describe_defaults() -> dict[str, Any]:
    """The contents of `defaults.yaml`."""
    parts = defaults_by_part()
    return {part: {"version": version_of(part), **parts[part]} for part in sorted(parts)}


@cache
def tiny_model(family: str) -> Adapter:
    return tiny(family)


def parts_of(method: str, family: str) -> list[str]:
    """The parts that decide what a method makes of a family's models."""
    overrides = [f"method={method}", "quant=w6a6", f"model={family}_twin"]
    if method.endswith("_released"):
        overrides += ["scope=released", "calib.layout=released"]
    config = config_of(*overrides)
    values = add_versions(describe_run(config, "", {}))
    del values["eval"]  # nothing is evaluated as runs are
    return used_parts(values)


def measure_method(method: str, family: str) -> dict[str, float]:
    """Mean scales and codes of a tiny quantized model, and how far its output is off."""
    adapter = copy.deepcopy(tiny_model(family))
    scope = "paper"
    if method.endswith("_released"):
        adapter.layout = scope = "released"
    rows = calibration(family, adapter, IMAGES)
    recipe = named(method, "w6a6", scope, family=family, changes=SHORTER.get(method))
    with torch.no_grad():
        before = adapter.forward(rows.rows)
    tensors = quantize(adapter, rows, recipe, batch=2 * IMAGES).tensors
    with torch.no_grad():
        after = adapter.forward(rows.rows)
    layers = [layer for layer in adapter.model.modules() if isinstance(layer, QuantLinear)]
    layers = [layer for layer in layers if layer.weight_params is not None]
    numbers = {
        "w_scale": mean_of(value for name, value in tensors.items() if ".weight.scale" in name),
        "x_scale": mean_of(value for name, value in tensors.items() if ".input.scale" in name),
        "codes": mean_of(layer_codes(layer).abs() for layer in layers),
        "error": float((after - before).norm() / before.norm()),
    }
    if family != "mar":  # whose outputs are no logits
        numbers["kl"] = divergence(before, after)
    for name in UNSTABLE.get(method, ()):
        del numbers[name]
    return {name: float(f"{value:.{DIGITS}g}") for name, value in numbers.items()}


def layer_codes(layer: QuantLinear) -> Tensor:
    """Codes (O, I) of a layer's weights, from the zero point on."""
    scale = layer.weight_params.scale
    groups = layer.weight.reshape(len(scale), -1)
    return groups / scale[:, None]


def mean_of(values: Iterator[Tensor]) -> float:
    """Mean over all elements of some tensors; 0 without any, as of dynamic ranges."""
    parts = [value.double().flatten() for value in values]
    return float(torch.cat(parts).mean()) if parts else 0.0


def divergence(before: Tensor, after: Tensor) -> float:
    """Mean KL of logits (..., V) from those of before, in nats."""
    log_p = before.log_softmax(dim=-1)
    log_q = after.log_softmax(dim=-1)
    return float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())


def draw_tokens(family: str) -> str | list[float]:
    """A digest of the tokens that a twin draws; of MAR, whose tokens are vectors, their moments."""
    generator = models.load(f"{family}_twin", device="cpu")
    settings = {**generator.preset.samplers["official"], **FEWER_STEPS.get(family, {})}
    tokens = generator.sample(torch.arange(IMAGES), 0, torch.arange(IMAGES), settings)
    if tokens.is_floating_point():
        return [float(f"{value:.3g}") for value in (tokens.mean(), tokens.std())]
    return digest_tensors({"tokens": tokens})


def method_cases() -> list[tuple[str, str]]:
    """All families with the methods that they have."""
    cases = itertools.product(FAMILIES, METHODS)
    return [case for case in cases if case[0] in OWN_FAMILIES.get(case[1], FAMILIES)]


def describe_numbers() -> dict[str, Any]:
    """The contents of `numbers.json`."""
    cases = {}
    versions: dict[str, int] = {}
    for family, method in method_cases():
        cases[f"{family} {method}"] = measure_method(method, family)
        versions |= {part: version_of(part) for part in parts_of(method, family)}
    tokens = {family: draw_tokens(family) for family in FAMILIES}
    return {"versions": dict(sorted(versions.items())), "cases": cases, "tokens": tokens}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    DEFAULTS.write_text(yaml.safe_dump(describe_defaults(), sort_keys=False, width=100))
    numbers = describe_numbers()
    # a case a line
    lines = [f"  {json.dumps(name)}: {json.dumps(case)}" for name, case in numbers["cases"].items()]
    NUMBERS.write_text(
        "{\n"
        f' "versions": {json.dumps(numbers["versions"])},\n'
        f' "tokens": {json.dumps(numbers["tokens"])},\n'
        ' "cases": {\n' + ",\n".join(lines) + "\n }\n}\n"
    )


if __name__ == "__main__":
    main()
