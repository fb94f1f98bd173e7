"""The schema of a run's config. What the library has of it, methods, bits and scopes, is in
`ptq/config/schema.py`.

Neither needs PyTorch, so that a misspelt field is refused at once. Methods, which are registered in
their own files, do: `listed_fields` reads their names only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, make_dataclass
from functools import cache
from typing import Any, TypeVar

from ptq.config.schema import Method, Quant, ScopeConfig, field_types, method_schema
from ptq.registry.entries import registered_entries
from ptq.registry.plugins import declared_switches, plugin_folders

T = TypeVar("T")
TEXTS = (str, str | None)


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
    row: str | None = None  # of that table, whose figures in the paper W&B shows beside the run's
    project: str = "ar-ptq"
    entity: str | None = None  # user or team of W&B, left out the one that is logged in


@dataclass
class RunConfig:
    model: Model = field(default_factory=Model)
    method: Method = field(default_factory=lambda: method_schema()())
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
    heldout: str | None = None  # a folder of validation images (`evaluate/held_out.py`)
    plugins: str | None = None  # a folder of methods that are not in this repository


def listed_fields() -> dict[str, Any]:
    """All fields of a run with their defaults, but for the settings of methods. What plugins add to
    a method is known once they are imported: with plugins it has no fields here, and may have any.
    """
    listed = {}
    for entry in fields(RunConfig):
        if entry.name == "method" and plugin_folders():
            listed["method"] = {}
        elif entry.name == "method":
            listed["method"] = asdict(Method(options={}))
            listed["method"] |= dict.fromkeys(declared_switches(), False)
        elif entry.default_factory is not MISSING:
            listed[entry.name] = asdict(entry.default_factory())
        else:
            listed[entry.name] = entry.default
    return listed


def run_schema() -> type[RunConfig]:
    """The schema of a run with the switches and settings of all registered methods."""
    return _run_schema(registered_entries())


@cache
def _run_schema(registered: tuple) -> type[RunConfig]:
    """The schema while these entries are registered."""
    schema = method_schema()
    method = ("method", schema, field(default_factory=schema))
    return make_dataclass("RunConfig", [method], bases=(RunConfig,))


def typed_value(schema: type[T], values: Mapping[str, Any]) -> T:
    """A schema's value of plain values in their ranges: where a field is a number or text, `1` is
    1.0 or "1". Fields that are left out have their defaults."""
    types = field_types(schema)
    typed = {}
    for name, value in values.items():
        kind = types[name]
        if is_dataclass(kind):
            value = typed_value(kind, value)
        elif isinstance(value, dict):
            value = {str(key): entry for key, entry in value.items()}  # numbers of blocks, too
        elif value is not None and kind in (float, *TEXTS):
            value = float(value) if kind is float else str(value)
        typed[name] = value
    return schema(**typed)


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
