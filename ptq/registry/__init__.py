"""Registering methods, rounders, number formats, selectors and settings (`ADDING.md`)."""

from ptq.registry.entries import (
    load_plugins,
    register_format,
    register_rounder,
    register_selector,
    register_settings,
    register_transform,
)

__all__ = [
    "load_plugins",
    "register_format",
    "register_rounder",
    "register_selector",
    "register_settings",
    "register_transform",
]
