"""The quantization recipe that a config describes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields
from functools import cache
from typing import get_type_hints

from experiments.config.schema import RunConfig
from models.registry import PRESETS, build_outline, find_preset
from ptq.config.schema import Method, method_schema
from ptq.recipe import Recipe, make_recipe, read_changes, require_places, shared_site_transforms
from ptq.staq.block_hadamard import is_gated
from ptq.types import ConfigError

ROUNDING_ALONE = ("rtn", "rtn_minmax", "rtn_dynamic")  # methods that no switch belongs to


def boolean_fields(kind: type) -> list[str]:
    hints = get_type_hints(kind)
    return [entry.name for entry in fields(kind) if hints[entry.name] is bool]


def build_recipe(config: RunConfig) -> Recipe:
    """The quantization recipe that a config describes.

    Raises:
        ConfigError: a value is not allowed, or two switches exclude each other.
        CheckpointError: no such model.
    """
    family = find_preset(config.model.name).family
    recipe = make_recipe(config.method, config.quant, config.scope, family)
    _require_effect(recipe, config.model.name)
    return recipe


# --- switches and settings that change nothing


def representative(family: str) -> str:
    """A small model of a family, whose sites are like those of the others: its twin if there is
    one, or else the first preset."""
    names = [name for name, preset in PRESETS.items() if preset.family == family]
    return f"{family}_twin" if f"{family}_twin" in names else names[0]


@cache
def site_kinds(family: str) -> tuple[str, ...]:
    """The kinds of sites that models of a family have."""
    adapter = build_outline(representative(family)).adapter  # takes no memory
    return tuple(dict.fromkeys(site.kind for site in adapter.sites))


@cache
def has_gated_inputs(family: str) -> bool:
    """Whether a family's models have MLPs with a gate."""
    return any(is_gated(site) for site in build_outline(representative(family)).adapter.sites)


def _require_effect(recipe: Recipe, model: str) -> None:
    """Refuse a method with no site to act at: it would be another one under its name."""
    if any(change.block is not None for change in recipe.changes):
        require_places(build_outline(model).adapter, recipe)
    scope = recipe.scope.kinds
    present = [kind for kind in site_kinds(find_preset(model).family) if kind in scope]
    for name in recipe.transforms:
        if name == "hadamard" and recipe.options.hadamard.offline:
            continue  # it rotates weights wherever that alone is exact
        _require_sites(name, recipe.sites_of(name), present)
    if recipe.sink_shift:
        _require_sites("sink_shift", recipe.options.sink_shift.sites, present)
    training = recipe.options.omniquant
    if recipe.omniquant and not (training.clip or training.transform or training.values):
        raise ConfigError(
            "method.options.omniquant: clip, transform and values are false, so nothing is trained"
        )


def _require_sites(name: str, sites: Collection[str], present: Collection[str]) -> None:
    if not set(sites) & set(present):
        shared = name in shared_site_transforms()
        field_name = "method.sites" if shared else f"method.options.{name}.sites"
        raise ConfigError(
            f"{field_name}: [{', '.join(sites)}] gives {name} nothing to change, "
            f"quantized of this model are {', '.join(present) or 'no linear layers'}"
        )


def idle_settings(config: RunConfig) -> Iterator[str]:
    """Lines on switches and settings that were changed and change nothing."""
    method = config.method
    defaults = method_schema()()
    scalings = shared_site_transforms()
    scales = [name for name in scalings if getattr(method, name)]
    needs = {
        "alpha": (method.smoothquant, "method.smoothquant=true"),
        "gps_form": (method.gps, "method.gps=true"),
        "sites": (
            scales or method.omniquant,
            f"one of {', '.join(scalings)} and omniquant",
        ),
    }
    for name, (in_use, need) in needs.items():
        if not in_use and getattr(method, name) != getattr(defaults, name):
            yield f"method.{name}: its value changes nothing without {need}"
    family = find_preset(config.model.name).family
    for change in read_changes(
        {"by_kind": config.quant.by_kind, "by_layer": config.quant.by_layer}
    ):
        if change.kind not in quantized_places(config, family):
            yield f"{change.path}: it changes nothing, no {change.kind} is quantized of this model"
    if method.block_hadamard and not has_gated_inputs(family):
        yield (
            f"method.block_hadamard: it changes nothing in {family} models, whose MLPs have no gate"
        )
    for entry in fields(method.options):
        group = entry.name
        in_use = getattr(method, group) if hasattr(method, group) else method.rounder == group
        if not in_use and getattr(method.options, group) != getattr(defaults.options, group):
            yield f"method.options.{group}: its settings change nothing without the method {group}"
    if method.name not in ROUNDING_ALONE and is_plain_rounding(method):
        yield f"method: {method.name} has no switch on, it is rounding to nearest (rtn)"


def quantized_places(config: RunConfig, family: str) -> list[str]:
    """The kinds of sites, and operands of attention, that a config quantizes of a family."""
    kinds = [kind for kind in site_kinds(family) if kind in config.scope.kinds]
    return kinds + (config.scope.operands if config.scope.matmuls else [])


def is_plain_rounding(method: Method) -> bool:
    """Whether a method does no more than round to nearest."""
    apart = ("quantized", "exclude_sinks", "dynamic", "symmetric")
    switches = [name for name in boolean_fields(method_schema()) if name not in apart]
    chosen = [name for name in switches if getattr(method, name)]
    return not chosen and (method.rounder, method.softmax, method.range) == ("nearest", "int", None)
