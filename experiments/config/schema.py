"""The schema of a run's config. What the library has of it, methods, bits and scopes, is in
`ptq/config/schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from ptq.config.schema import Method, Quant, ScopeConfig
from ptq.ranges import MISSING


@dataclass
class Model:
    name: str = "rar_twin"
    weights: str | None = None
    tokenizer_weights: str | None = None


@dataclass
class Calib:
    selector: str = "dgc"
    n: int = 128
    seed: int = 0
    batch: int = 64
    layout: str = "inference"  # of the calibration rows (`ptq.types.Adapter`)


@dataclass
class Sampler:
    name: str = "official"
    microbatch: int = 128
    compiled: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Eval:
    name: str = "quick"
    n: int = 256
    sequences: int = 256
    batch: int = 64


@dataclass
class Tracking:
    mode: str = "none"
    group: str | None = None  # of runs in W&B; a table's name, else the model's


@dataclass
class RunConfig:
    model: Model = field(default_factory=Model)
    method: Method = field(default_factory=Method)
    quant: Quant = field(default_factory=Quant)
    calib: Calib = field(default_factory=Calib)
    scope: ScopeConfig = field(default_factory=ScopeConfig)
    sampler: Sampler = field(default_factory=Sampler)
    eval: Eval = field(default_factory=Eval)
    tracker: Tracking = field(default_factory=Tracking)
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    mode: str = "simulate"
    runs: str = "runs"


# a group's field that each of its files gives: without one of them, the config is not complete
NAMING_FIELDS = {
    "model": "name",
    "method": "name",
    "quant": "name",
    "calib": "selector",
    "scope": "name",
    "sampler": "name",
    "eval": "name",
    "tracker": "mode",
}


@cache
def typed_schema() -> DictConfig:
    """The defaults of a run with the types of their fields; for merging, which copies them."""
    return OmegaConf.structured(RunConfig)


def config_schema() -> DictConfig:
    """The schema as Hydra sees it: every field can be overridden; what `sampler.settings` may hold
    is the model's.

    Hydra gets names and defaults alone. It would convert values to the fields' types, 1 to true;
    `validate_config` sees them as they are given.
    """
    node = OmegaConf.create(OmegaConf.to_container(typed_schema()))
    for group, name in NAMING_FIELDS.items():
        node[group][name] = MISSING
    OmegaConf.set_struct(node, True)
    OmegaConf.set_struct(node.sampler.settings, False)
    return node


# the first of the defaults in conf/config.yaml
ConfigStore.instance().store("schema", config_schema())
