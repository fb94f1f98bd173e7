"""What the files of a method, of bits and of a scope may say: the library's values as dataclasses
whose fields can be set one by one."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from functools import cache, partial
from typing import Any, TypeVar, get_type_hints

from ptq.options import Options
from ptq.spec import QuantSpec

T = TypeVar("T")


@cache
def field_types(schema: type) -> dict[str, Any]:
    """The types of a dataclass's fields; shared, since they take a while to work out."""
    return get_type_hints(schema)


def editable_schema(library: type) -> type:
    """A dataclass of the library as a schema: the same fields and defaults, but they can be set."""
    hints = field_types(library)
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
    hints = field_types(library)
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
class ScopeConfig:
    name: str = "paper"
    kinds: list[str] = field(default_factory=list)
    matmuls: bool = True
