"""Configs of many cells: what they share is composed once.

Hydra takes a tenth of a second for a config, and the registry has hundreds of cells, which differ
in a few groups that set nothing outside themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from experiments.config.compose import configure
from experiments.config.recipe import build_recipe
from experiments.config.schema import RunConfig

# groups that set nothing outside themselves, and that no other group sets
APART = ("model", "sampler", "eval")


@cache
def composed_part(*overrides: str) -> RunConfig:
    """The config of some overrides; it is shared, so nobody may change it."""
    return configure(list(overrides))


def composed(overrides: Sequence[str]) -> RunConfig:
    """What `configure` gives, put together from the groups of `APART` and the rest."""
    own: dict[str, list[str]] = {group: [] for group in APART}
    rest: list[str] = []
    seed = 0
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "seed":
            seed = int(value)
        else:
            own.get(key.partition(".")[0], rest).append(override)
    groups = {group: getattr(composed_part(*lines), group) for group, lines in own.items()}
    config = replace(composed_part(*rest), seed=seed, **groups)
    if "calib.seed" not in {override.partition("=")[0] for override in rest}:
        config = replace(config, calib=replace(config.calib, seed=seed))  # calib.seed: ${seed}
    if config.method.quantized:
        build_recipe(config)  # what `validate_config` asks of method and model together
    return config
