"""The range of every field of a run's config: one table, which `validate_config` applies.

A field that is new in the schema needs a line here. Settings of methods have theirs in their own
files, because the library checks them, too; those of samplers depend on the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from functools import cache
from typing import Any

from experiments.config.overrides import describe_unknown
from experiments.config.schema import RunConfig, run_schema
from experiments.options import nearest
from experiments.store.tracking import MODES
from models.preset import Preset
from models.registry import PRESETS
from models.settings import (
    FLAGS,
    RESPACING,
    RESPACING_WORDS,
    WORDS,
    is_respacing,
    number_bounds,
)
from ptq.config.schema import field_types
from ptq.options import GPS_FORMS, KINDS, option_ranges
from ptq.ranges import (
    MISSING,
    FilePath,
    Flag,
    Integer,
    ListOf,
    Name,
    Number,
    Optional,
    Range,
    Text,
    Word,
    check_value,
    show_value,
)
from ptq.recipe import read_changes, softmax_words
from ptq.registry.entries import ROUNDERS, SELECTORS, TRANSFORMS, formats_of, registered_entries
from ptq.spec import (
    ACTIVATION_GRANULARITIES,
    ATTENTION_OPERANDS,
    HIGH_PRECISION,
    OBSERVERS,
    RANGES,
    WEIGHT_GRANULARITIES,
)
from ptq.types import LAYOUTS, ConfigError

SEED = Integer(0, 2**63 - 1)
IMAGES = Integer(1, 10_000_000)
BATCH = Integer(1, 100_000)
SAMPLER_SETTINGS = "sampler.settings"


class Bits:
    """Of an operand: those of its codes, or 16 where it is left as it is."""

    codes = Integer(2, 8)
    words = f"{codes.words}, or {HIGH_PRECISION}"

    def allows(self, value: object) -> bool:
        return self.codes.allows(value) or Integer(HIGH_PRECISION, HIGH_PRECISION).allows(value)


BITS = Bits()
GROUP_SIZE = Optional(Integer(1, 65_536))
SPEC_CHANGES = ("quant.by_kind", "quant.by_layer")

FIXED_RANGES: dict[str, Range] = {
    "model.name": Word(*PRESETS),
    "model.weights": Optional(FilePath()),
    "model.tokenizer_weights": Optional(FilePath()),
    "method.name": Name(),
    "method.label": Optional(Text(64)),
    "method.quantized": Flag(),
    "method.omniquant": Flag(),
    "method.stwq": Flag(),
    "method.exclude_sinks": Flag(),
    "method.dynamic": Flag(),
    "method.released": Flag(),
    "method.range": Optional(Word(*RANGES)),
    "method.symmetric": Flag(),
    "method.alpha": Number(0, 1),
    "method.gps_form": Word(*GPS_FORMS),
    "method.sites": ListOf(Word(*KINDS)),
    "method.sink_shift": Flag(),
    "method.per_position": Flag(),
    "method.per_head": Flag(),
    "method.key_weights": Flag(),
    "method.bias_correction": Flag(),
    "method.shift_and_sum": Flag(),
    "method.sequential": Flag(),
    "quant.name": Name(),
    "quant.weights.bits": BITS,
    "quant.weights.symmetric": Flag(),
    "quant.weights.granularity": Word(*WEIGHT_GRANULARITIES),
    "quant.weights.range": Word(*RANGES),
    "quant.weights.observer": Word(*OBSERVERS),
    "quant.weights.include_zero": Flag(),
    "quant.weights.group_size": GROUP_SIZE,
    "quant.activations.bits": BITS,
    "quant.activations.symmetric": Flag(),
    "quant.activations.granularity": Word(*ACTIVATION_GRANULARITIES),
    "quant.activations.range": Word(*RANGES),
    "quant.activations.observer": Word(*OBSERVERS),
    "quant.activations.include_zero": Flag(),
    "quant.activations.group_size": GROUP_SIZE,
    "calib.n": Integer(1, 100_000),
    "calib.seed": SEED,
    "calib.batch": BATCH,
    "calib.layout": Word(*LAYOUTS),
    "scope.name": Name(),
    "scope.kinds": ListOf(Word(*KINDS)),
    "scope.matmuls": Flag(),
    "scope.operands": ListOf(Word(*ATTENTION_OPERANDS)),
    "sampler.name": Name(),
    "sampler.microbatch": BATCH,
    "sampler.compiled": Flag(),
    "eval.name": Name(),
    "eval.n": IMAGES,
    "eval.sequences": IMAGES,
    "eval.batch": BATCH,
    "tracker.mode": Word(*MODES),
    "tracker.group": Optional(Text(128)),  # W&B takes no more
    "tracker.row": Optional(Text(128)),
    "tracker.project": Text(128),
    "tracker.entity": Optional(Text(128)),
    "seed": SEED,
    "dtype": Word("float32", "float64"),
    "device": Word("auto", "cpu", "cuda"),
    "mode": Word("simulate", "int8"),
    "runs": FilePath(),
    "heldout": Optional(FilePath()),
    "plugins": Optional(FilePath()),
}


def field_ranges() -> dict[str, Range]:
    """The range of every field: those above, and what registered methods bring."""
    return _field_ranges(registered_entries())


@cache
def _field_ranges(registered: tuple) -> dict[str, Range]:
    """The ranges while these entries are registered."""
    ranges = dict(FIXED_RANGES)
    for name in TRANSFORMS:
        ranges[f"method.{name}"] = Flag()
    for name, allowed in option_ranges().items():
        ranges[f"method.options.{name}"] = allowed
    ranges["method.rounder"] = Word(*ROUNDERS)
    ranges["method.softmax"] = Word(*softmax_words())
    for operand in ("weights", "activations"):
        ranges[f"quant.{operand}.format"] = Word(*formats_of(operand))
    ranges["calib.selector"] = Word(*SELECTORS)
    return ranges


class Respacing:
    """Which steps of MAR's diffusion are kept."""

    words = RESPACING_WORDS

    def allows(self, value: object) -> bool:
        return is_respacing(value)


def sampler_ranges(preset: Preset) -> dict[str, Range]:
    """The ranges of the settings that a model's sampler has (`models/settings.py`)."""
    ranges: dict[str, Range] = {RESPACING: Respacing()}
    for name, (least, most) in number_bounds(preset).items():
        ranges[name] = Integer(least, most) if isinstance(least, int) else Number(least, most)
    for name, words in WORDS.items():
        ranges[name] = Word(*words)
    for name in FLAGS:
        ranges[name] = Flag()
    return {name: ranges[name] for name in preset.samplers["official"]}


def check_fields(values: Mapping[str, Any], unresolved: Mapping[str, Any]) -> None:
    """Refuse a config with a field that is unknown or missing, or whose value is out of its range.

    Args:
        values: a composed config as plain values; fields that it leaves out have their defaults.
        unresolved: the same with its interpolations as text.

    Raises:
        ConfigError: one line: field, value, what is allowed.
    """
    texts = dict(list_leaves(unresolved))
    # `seed` before `calib.seed`, whose text is ${seed}
    given_first = sorted(list_leaves(values), key=lambda leaf: "${" in str(texts[leaf[0]]))
    ranges = field_ranges()
    for path, value in given_first:
        if path == SAMPLER_SETTINGS:
            require_settings(value)
        elif path in SPEC_CHANGES:
            check_changes(path, value)
        else:
            check_value(path, value, ranges[path])


def require_present(unresolved: Mapping[str, Any]) -> None:
    """Refuse a field without a value, before another one refers to it.

    Raises:
        ConfigError: there is one.
    """
    for path, value in list_leaves(unresolved):
        if value == MISSING and path not in (SAMPLER_SETTINGS, *SPEC_CHANGES):
            check_value(path, value, field_ranges()[path])


def require_settings(settings: object) -> None:
    """Refuse what is no group of a sampler's settings, or holds one without a value."""
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{SAMPLER_SETTINGS}: {show_value(settings)} is not a group of settings")
    for key, value in settings.items():
        if value == MISSING:
            raise ConfigError(f"{SAMPLER_SETTINGS}.{key}: its value is missing")


def check_changes(path: str, value: object) -> None:
    """Refuse values out of their ranges in `quant.by_kind` or `quant.by_layer`.

    Raises:
        ConfigError: one line; a group of fields has another value in its place, or a field is not
            one of a spec.
    """
    groups = read_changes({path.removeprefix("quant."): value})
    ranges = field_ranges()
    for change in groups:
        for name, setting in change.settings:
            check_value(f"{change.path}.{name}", setting, ranges[f"quant.{change.operand}.{name}"])


def list_leaves(
    values: object, schema: type | None = None, path: str = ""
) -> Iterator[tuple[str, Any]]:
    """Paths and values of the fields that have no fields of their own.

    Raises:
        ConfigError: a group of fields is not one, or holds a field that its schema has not.
    """
    known = field_types(schema or run_schema())
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{path}: {show_value(values)} is not a group of fields, allowed are {', '.join(known)}"
        )
    for name, value in values.items():
        field_path = f"{path}.{name}" if path else str(name)
        if name not in known:
            raise ConfigError(describe_unknown(field_path, asdict(RunConfig())))
        if is_dataclass(known[name]):
            yield from list_leaves(value, known[name], field_path)
        else:
            yield field_path, value


def check_sampler(name: str, settings: Mapping[str, Any], preset: Preset) -> None:
    """Refuse a sampler or a setting that the model has not, or a setting out of its range.

    Raises:
        ConfigError: one line.
    """
    check_value("sampler.name", name, Word(*preset.samplers))
    ranges = sampler_ranges(preset)
    for key, value in settings.items():
        field_name = f"{SAMPLER_SETTINGS}.{key}"
        if key not in ranges:
            allowed = ", ".join(ranges)
            raise ConfigError(
                f"{field_name}: no such setting, allowed are {allowed}{nearest(str(key), ranges)}"
            )
        check_value(field_name, value, ranges[key])
        if key == "more_smooth" and value:
            raise ConfigError(f"{field_name}: true gives pictures without tokens, allowed is false")
