"""The quantization recipe that a config describes."""

from __future__ import annotations

from dataclasses import replace

from experiments.config.schema import Method, RunConfig, Spec, library_value
from models.registry import find_preset
from ptq.options import TRANSFORMS, Options
from ptq.recipe import Recipe, Scope
from ptq.released.families import RELEASED
from ptq.types import ConfigError, QuantSpec


def _quant_spec(settings: Spec, method: Method, name: str) -> QuantSpec:
    """The spec of an operand, with what the method asks for in place of the settings'."""
    try:
        spec = library_value(QuantSpec, settings)
        return replace(
            spec,
            range=method.range or spec.range,
            symmetric=method.symmetric or spec.symmetric,
        )
    except ConfigError as error:
        raise ConfigError(f"quant.{name}.{error}") from error


def _quantized_scope(config: RunConfig) -> Scope:
    """What is quantized: all that the scope names, or what the released code does of it."""
    family = find_preset(config.model.name).family
    released = RELEASED[family].scope
    scope = Scope(tuple(config.scope.kinds), config.scope.matmuls)
    if config.scope.name == "released":
        scope = scope.within(released)
    if config.method.released and scope != scope.within(released):
        raise ConfigError(
            f"scope: {config.scope.name!r} is more than {config.method.name} quantizes of {family},"
            " allowed is released"
        )
    return scope


def build_recipe(config: RunConfig) -> Recipe:
    """The quantization recipe that a config describes.

    Raises:
        ConfigError: a value is not allowed, or two switches exclude each other.
        CheckpointError: no such model.
    """
    method = config.method
    scope = _quantized_scope(config)
    activations = _quant_spec(config.quant.activations, method, "activations")
    return Recipe(
        weights=_quant_spec(config.quant.weights, method, "weights"),
        activations=activations.at("token_dynamic") if method.dynamic else activations,
        transforms=tuple(name for name in TRANSFORMS if getattr(method, name)),
        sites=tuple(method.sites),
        scope=scope,
        stwq=method.stwq,
        exclude_sinks=method.exclude_sinks,
        alpha=method.alpha,
        gps_form=method.gps_form,
        released=method.released,
        options=library_value(Options, method.options),
        rounder=method.rounder,
        softmax=method.softmax,
        omniquant=method.omniquant,
        sink_shift=method.sink_shift,
        per_position=method.per_position,
        per_head=method.per_head,
        key_weights=method.key_weights,
        bias_correction=method.bias_correction,
        sequential=method.sequential,
    )
