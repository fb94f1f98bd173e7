"""The error that a value which is not allowed raises, and the check of a word."""

from __future__ import annotations


class ConfigError(ValueError):
    """A value the user gave is not allowed. One line: field, value, what is allowed."""


def require(field_name: str, value: object, allowed: tuple) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{field_name}: {value!r} is not one of {', '.join(map(str, allowed))}")
