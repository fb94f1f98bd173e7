"""What names a run: the values in which it departs from the defaults, whose hash its folder has.

Departures alone, so that a setting that is added later changes no run's hash. They do not identify
a run, since a default may change: `identity.whole` makes all values out of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from experiments.config.schema import RunConfig
from experiments.identity.own_methods import plugin_digests
from experiments.identity.parts import raised_versions
from experiments.identity.resolved import changed_settings, default_settings, without_label
from experiments.store.results import RESULT_VERSION
from models.registry import find_preset

# How often the rows that a selector keeps of a family's pool have changed.
# 1: VAR's share of conditional rows comes from float32 distances, rounded in blocks of 32 images.
SELECTOR_REVISIONS = {"dgc_released": {"var": 1}}


def describe_run(
    config: RunConfig, weights: str, settings: Mapping[str, Any], held_out: str | None = None
) -> dict[str, Any]:
    """What makes two runs the same run, as far as it departs from the defaults.

    Tracker and paths are no part of it; quantization settings are no part of a full-precision
    run's. `add_versions` completes it.

    Args:
        weights: digests of transformer and tokenizer.
        settings: the sampler's, resolved.
        held_out: digest of held-out images that the user has named.
    """
    plain = without_label(asdict(config))
    values = {
        "eval": plain["eval"],
        "seed": config.seed,
        "dtype": config.dtype,
        "mode": config.mode,
        "model": config.model.name,
        "weights": weights,
        "version": RESULT_VERSION,
        "sampler": {
            "name": config.sampler.name,
            "microbatch": config.sampler.microbatch,
            **settings,
        },
    }
    # said only where it is on: hashes from before there was such a setting stay
    if config.sampler.compiled:
        values["sampler"]["compiled"] = True
    if held_out is not None:
        values["held_out"] = held_out
    if not config.method.quantized:
        return values | {"method": "fp"}
    defaults = default_settings()
    for key, group_defaults in defaults.items():
        values[key] = changed_settings(plain[key], group_defaults)
    revision = selector_revision(config.calib.selector, config.model.name)
    if revision:  # none is left out: hashes from before stay
        values["calib"]["revision"] = revision
    digests = plugin_digests(config)
    if digests:
        values["plugins"] = digests
    return values


def selector_revision(selector: str, model: str) -> int:
    """How often the rows have changed that a selector keeps of a model's pool."""
    family = find_preset(model).family
    return SELECTOR_REVISIONS.get(selector, {}).get(family, 0)


def add_versions(values: Mapping[str, Any]) -> dict[str, Any]:
    """The departures of a run, an analysis or a benchmark: its values, and the versions that have
    been raised of the parts that it uses."""
    raised = raised_versions(values)
    return {**values, "versions": raised} if raised else dict(values)
