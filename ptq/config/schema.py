"""What the files of a method, of bits and of a scope may say: the library's values as dataclasses
whose fields can be set one by one."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from functools import cache, partial
from typing import Any, TypeVar, get_type_hints

from ptq.options import Options
from ptq.registry.entries import SETTINGS, TRANSFORMS, registered_entries
from ptq.spec import ATTENTION_OPERANDS, ConfigError, QuantSpec

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


@dataclass
class Method:
    """What all methods have; `method_schema` adds the switches and settings of those that are
    registered."""

    name: str = "fp"
    quantized: bool = True
    omniquant: bool = False
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
    shift_and_sum: bool = False
    label: str | None = None  # in tables; no part of what makes a run
    options: Any = None


def method_schema() -> type[Method]:
    """The schema of a method: a switch for every registered transform, and all settings.

    Raises:
        ConfigError: a transform has the name of another field.
    """
    return _method_schema(registered_entries())


@cache
def _method_schema(registered: tuple) -> type[Method]:
    """The schema while these entries are registered."""
    common = [entry.name for entry in fields(Method)]
    schema_fields: list[tuple[str, Any, Any]] = []
    for name in TRANSFORMS:
        if name in common:
            raise ConfigError(
                f"method: {name} is a field of all methods, "
                f"what {TRANSFORMS.homes[name]} registers needs another name"
            )
        schema_fields.append((name, bool, field(default=False)))
    settings = settings_schema()
    schema_fields.append(("options", settings, field(default_factory=settings)))
    return make_dataclass("Method", schema_fields, bases=(Method,))


def settings_schema() -> type:
    """The settings of all methods, by switch."""
    schema_fields = []
    for switch, kind in SETTINGS.items():
        schema = editable_schema(kind)
        schema_fields.append((switch, schema, field(default_factory=schema)))
    return make_dataclass("Settings", schema_fields)


def library_options(settings: object) -> Options:
    """The library's value of the settings of all methods.

    Raises:
        ConfigError: a setting is not allowed.
    """
    given = {}
    for switch, kind in SETTINGS.items():
        # a config may be older than a plugin
        if hasattr(settings, switch):
            given[switch] = library_value(kind, getattr(settings, switch))
    return Options(**given)


@dataclass
class Quant:
    name: str = "w8a8"
    weights: Spec = field(default_factory=lambda: Spec(granularity="out_channel"))
    activations: Spec = field(default_factory=Spec)
    # fields of either by kind of site, `fc2: {weights: {bits: 8}}`, and by number of the block
    by_kind: dict[str, Any] = field(default_factory=dict)
    by_layer: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScopeConfig:
    name: str = "paper"
    kinds: list[str] = field(default_factory=list)
    matmuls: bool = True
    operands: list[str] = field(default_factory=lambda: list(ATTENTION_OPERANDS))
