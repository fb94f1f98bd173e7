"""The key=value arguments of a benchmark that are not overrides of a run's config."""

from __future__ import annotations

from typing import Any

import yaml

from ptq.types import ConfigError


def settings(arguments: list[str], defaults: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values (YAML) of the benchmark's own keys, and all other arguments.

    Raises:
        ConfigError: a value is not YAML.
    """
    own = dict(defaults)
    rest = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in defaults:
            rest.append(argument)
            continue
        try:
            own[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error
    return own, rest


def positive(name: str, value: Any) -> None:
    """Raise `ConfigError` unless the value is a positive integer."""
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"{name}: {'null' if value is None else str(value).lower()} is not a positive integer"
        )
