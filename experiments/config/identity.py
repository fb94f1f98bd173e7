"""What makes two runs the same run: the value whose hash names a run's folder."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from experiments.config.schema import RunConfig
from experiments.store.results import RESULT_VERSION
from models.registry import find_preset

# How often the rows that a selector keeps of a family's pool have changed.
# 1: VAR's share of conditional rows comes from float32 distances, rounded in blocks of 32 images.
SELECTOR_REVISIONS = {"dgc_released": {"var": 1}}


def run_identity(config: RunConfig, weights: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs the same run.

    Tracker, paths and device are no part of it; quantization settings are no part of a
    full-precision run's.

    Args:
        weights: digests of transformer and tokenizer.
        settings: the sampler's, resolved.
    """
    plain = asdict(config)
    identity = {
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
        identity["sampler"]["compiled"] = True
    if not config.method.quantized:
        return identity | {"method": "fp"}
    defaults = asdict(RunConfig())
    for key in ("method", "quant", "calib", "scope"):
        identity[key] = changed_settings(plain[key], defaults[key])
    if config.calib.selector in SELECTOR_REVISIONS:
        family = find_preset(config.model.name).family
        revision = SELECTOR_REVISIONS[config.calib.selector].get(family, 0)
        if revision:  # none is left out: hashes from before stay
            identity["calib"]["revision"] = revision
    return identity


def changed_settings(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not the default.

    So a setting that is added later changes no run's identity.
    """
    changed = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            nested = changed_settings(value, defaults[key])
            if nested:
                changed[key] = nested
        elif value != defaults[key]:
            changed[key] = value
    return changed
