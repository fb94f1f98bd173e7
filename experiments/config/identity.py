"""What makes two runs the same run: the value whose hash names a run's folder."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from experiments.config.schema import RunConfig
from experiments.store.results import RESULT_VERSION


def run_identity(config: RunConfig, weights: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs the same run. `weights`: digest of both modules. `settings`: the
    sampler's, resolved.

    Tracker, paths, and device are not part of it; quantization settings are not part of a
    full-precision run.
    """
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    kept = {key: plain[key] for key in ("eval", "seed", "dtype", "mode")}
    kept |= {"model": config.model.name, "weights": weights, "version": RESULT_VERSION}
    kept["sampler"] = {
        "name": config.sampler.name,
        "microbatch": config.sampler.microbatch,
        **settings,
    }
    if config.sampler.compiled:
        kept["sampler"]["compiled"] = True
    if config.method.quantized:
        defaults = OmegaConf.to_container(OmegaConf.structured(RunConfig))
        kept |= {
            key: changed_settings(plain[key], defaults[key])
            for key in ("method", "quant", "calib", "scope")
        }
    else:
        kept["method"] = "fp"
    return kept


def changed_settings(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not the default, so that a setting that is added later changes no run's
    identity."""
    found = {}
    for key, value in given.items():
        if isinstance(value, dict):
            value = changed_settings(value, defaults[key])
            if value:
                found[key] = value
        elif value != defaults[key]:
            found[key] = value
    return found
