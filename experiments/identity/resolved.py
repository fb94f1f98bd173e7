"""Settings that departures leave at their defaults: taken out, and filled in again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

from experiments.config.schema import RunConfig
from experiments.store.files import without_keys
from ptq.recipe import shared_site_transforms
from ptq.registry.entries import registered_entries

QUANTIZATION = ("method", "quant", "calib", "scope")  # groups that departures are said of

# Settings that came later, by name, with the value that leaves numbers as they were without them:
# {"method.options.os_plus.spread": False}. At that value they are no part of an identity.
LATER_SETTINGS: dict[str, Any] = {
    "method.options.gptaq.form": "target",
    "method.options.gptaq.order": False,
    "method.shift_and_sum": False,
    "quant.weights.group_size": None,
    "quant.activations.group_size": None,
    "quant.by_kind": {},
    "quant.by_layer": {},
    "scope.operands": ["q", "k", "p", "v"],
}


def default_settings() -> dict[str, dict[str, Any]]:
    """The defaults of quantization, by group."""
    return _default_settings(registered_entries())


@cache
def _default_settings(registered: tuple) -> dict[str, dict[str, Any]]:
    """The defaults while these entries are registered."""
    defaults = without_label(asdict(RunConfig()))
    return {group: defaults[group] for group in QUANTIZATION}


def without_label(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config without what its method is called in tables."""
    return {**config, "method": without_keys(config["method"], "label")}


def setting_readers() -> dict[str, tuple[str, ...]]:
    """Settings of a method that some of its switches alone read."""
    return {
        "alpha": ("smoothquant",),
        "gps_form": ("gps",),
        "sites": (*shared_site_transforms(), "omniquant"),
    }


def changed_settings(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the default.

    So a setting that is added later changes no run's departures.
    """
    changed = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            nested = changed_settings(value, defaults.get(key, {}))
            if nested:
                changed[key] = nested
        elif key not in defaults or value != defaults[key]:
            changed[key] = value
    return changed


def resolved_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """All values of a run, an analysis or a benchmark, of those that depart from the defaults.

    Defaults that nothing reads are left out: switches that are off, and their settings. So another
    method, and its settings, may be added or changed.
    """
    resolved = dict(values)
    for group, defaults in default_settings().items():
        changed = values.get(group)
        # the method of full precision is a word
        if not isinstance(changed, dict):
            continue
        if group == "method":
            defaults = defaults_in_use(changed, defaults)
        resolved[group] = filled_settings(changed, defaults, group)
    return resolved


def defaults_in_use(changed: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a method that decide something."""
    settings = {**defaults, **changed}
    all_readers = setting_readers()
    used = {}
    for name, default in defaults.items():
        readers = all_readers.get(name, ())
        is_read = not readers or any(settings.get(reader) for reader in readers)
        if default is not False and is_read:
            used[name] = default
    used["options"] = {}
    for group, group_defaults in defaults["options"].items():
        if settings.get(group) is True or settings["rounder"] == group:
            used["options"][group] = group_defaults
    return used


def filled_settings(
    changed: Mapping[str, Any], defaults: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Settings that were changed, and the defaults of all others.

    Args:
        name: of the group, as a config has it.
    """
    settings = dict(changed)
    for key, default in defaults.items():
        field = f"{name}.{key}"
        if isinstance(default, dict):
            settings[key] = filled_settings(changed.get(key, {}), default, field)
        elif key not in changed:
            settings[key] = default
        if field in LATER_SETTINGS and settings[key] == LATER_SETTINGS[field]:
            del settings[key]
    return settings
