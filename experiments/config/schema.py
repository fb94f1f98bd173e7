"""The schema of a run's config: what files under `conf/` may say, and its library values."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from functools import cache, partial
from typing import Any, TypeVar, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from ptq.options import Options
from ptq.ranges import MISSING
from ptq.types import QuantSpec

T = TypeVar("T")


@dataclass
class Model:
    name: str = "rar_twin"
    weights: str | None = None
    tokenizer_weights: str | None = None


def editable_schema(library: type) -> type:
    """A dataclass of the library as a schema: the same fields and defaults, but they can be set."""
    hints = get_type_hints(library)
    schema_fields = []
    for entry in fields(library):
        kind = hints[entry.name]
        if is_dataclass(kind):
            kind = editable_schema(kind)
            default = field(default_factory=kind)
        elif isinstance(entry.default, tuple):
            kind = list[str]  # a config has no tuples
            default = field(default_factory=partial(list, entry.default))
        else:
            default = field(default=entry.default)
        schema_fields.append((entry.name, kind, default))
    return make_dataclass(library.__name__, schema_fields)


def library_value(library: type[T], config: object) -> T:
    """The library's value of a schema's.

    Raises:
        ConfigError: a setting is not allowed.
    """
    hints = get_type_hints(library)
    settings = {}
    for entry in fields(library):
        setting = getattr(config, entry.name)
        if is_dataclass(hints[entry.name]):
            setting = library_value(hints[entry.name], setting)
        elif isinstance(setting, list):
            setting = tuple(setting)  # a config has lists in place of tuples
        settings[entry.name] = setting
    return library(**settings)


Spec = editable_schema(QuantSpec)
Settings = editable_schema(Options)


@dataclass
class Method:
    name: str = "fp"
    quantized: bool = True
    smoothquant: bool = False
    os_plus: bool = False
    repq: bool = False
    shift: bool = False
    gps: bool = False
    hadamard: bool = False
    svd: bool = False
    omniquant: bool = False
    geometric: bool = False
    block_hadamard: bool = False
    stwq: bool = False
    exclude_sinks: bool = False
    dynamic: bool = False
    released: bool = False
    range: str | None = None  # overrides quant.*.range
    symmetric: bool = False  # makes both operands so, whatever quant.*.symmetric says
    alpha: float = 0.5
    gps_form: str = "squares"
    sites: list[str] = field(default_factory=lambda: ["qkv", "fc1", "head"])
    rounder: str = "nearest"
    softmax: str = "int"
    sink_shift: bool = False
    per_position: bool = False
    per_head: bool = False
    key_weights: bool = False
    bias_correction: bool = False
    sequential: bool = False
    options: Settings = field(default_factory=Settings)


@dataclass
class Quant:
    name: str = "w8a8"
    weights: Spec = field(default_factory=lambda: Spec(granularity="out_channel"))
    activations: Spec = field(default_factory=Spec)


@dataclass
class Calib:
    selector: str = "dgc"
    n: int = 128
    seed: int = 0
    batch: int = 64
    layout: str = "inference"  # of the calibration rows (`ptq.types.Adapter`)


@dataclass
class ScopeConfig:
    name: str = "paper"
    kinds: list[str] = field(default_factory=list)
    matmuls: bool = True


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
