"""From Hydra overrides to the typed config of a run; what is refused is said in one line."""

from __future__ import annotations

import logging

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from experiments.config.overrides import HYDRA_KEY, RUN, Overrides
from experiments.config.ranges import (
    FIELD_RANGES,
    check_fields,
    check_sampler,
    describe_unknown,
    require_present,
)
from experiments.config.recipe import build_recipe, idle_settings
from experiments.config.schema import RunConfig, typed_schema
from experiments.options import nearest
from models.registry import find_preset
from ptq.config.files import CONF
from ptq.ranges import FilePath, Optional, Text
from ptq.types import ConfigError, require

FULL_PRECISION = "fp"

logger = logging.getLogger(__name__)


def configure(overrides: list[str]) -> RunConfig:
    """The typed config of one cell.

    Raises:
        ConfigError: Hydra or the schema refuse the overrides; one line.
    """
    check_grammar(overrides, RUN)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            raw = compose("config", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_refusal(error)) from error
    return validate_config(raw)


# --- overrides


def check_grammar(arguments: list[str], overrides: Overrides) -> None:
    """Refuse overrides that Hydra cannot read, would read as another value than the text that is
    typed, or would leave a hole in the config with.

    Raises:
        ConfigError: the line names the argument.
    """
    groups = overrides.group_defaults()
    for argument in arguments:
        override = parse_override(argument)
        key = override.key_or_group
        if override.is_delete() and not key.startswith(HYDRA_KEY):
            raise ConfigError(f"{argument}: nothing can be left out of a config, give {key}=VALUE")
        if key in groups:
            require_choice(override, overrides)
        # the training config has no table of ranges
        elif overrides is RUN and key in FIELD_RANGES:
            require_literal_text(override)


def parse_override(argument: str) -> Override:
    """An override as Hydra reads it.

    Raises:
        ConfigError: it cannot; the line says how to quote the value.
    """
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        key, equals, value = argument.partition("=")
        advice = f'; a value with such characters needs quotes: "{key}={quoted(value)}"'
        raise ConfigError(
            f"{argument}: Hydra cannot read it ({reason}){advice if equals else ''}"
        ) from error


def quoted(value: str) -> str:
    """A value in the quotes of Hydra's grammar."""
    bare = value.strip("'\"")
    return "'" + bare.replace("'", "\\'") + "'"


def require_choice(override: Override, overrides: Overrides) -> None:
    """Refuse a group's value that is no name of a file, nor several for -m to go through."""
    if override.is_sweep_override() or override.is_delete():
        return
    value = override.value()
    if not isinstance(value, str):
        group = override.key_or_group
        shown = "null" if value is None else override.get_value_element_as_str()
        raise ConfigError(
            f"{group}: {shown} is not one of {', '.join(overrides.group_choices(group))}"
        )
    # what an interpolation stands for is known once Hydra composes
    if "${" not in value:
        overrides.check_choices(override.key_or_group, [value])


def require_literal_text(override: Override) -> None:
    """Refuse a number in place of text if it is not what was typed: 2024_11_28 is 20241128 to
    Hydra."""
    allowed = FIELD_RANGES[override.key_or_group]
    allowed = allowed.of if isinstance(allowed, Optional) else allowed
    if override.is_sweep_override() or not isinstance(allowed, (FilePath, Text)):
        return
    value = override.value()
    typed = override.input_line.partition("=")[2]
    if isinstance(value, (bool, int, float)) and str(value) != typed:
        raise ConfigError(
            f"{override.key_or_group}: {typed} would be read as {value}, "
            f'quote it: "{override.key_or_group}={quoted(typed)}"'
        )


def explain_refusal(error: Exception) -> str:
    """One line that says what Hydra or OmegaConf refuse: field, value, what is allowed."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, value = error.missing_cfg_file.rpartition("/")
        return (
            f"{group}: {value!r} is not one of {', '.join(error.options)}"
            f"{nearest(value, error.options)}"
        )
    # Hydra wraps errors of OmegaConf, and these know the field
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if not isinstance(cause, OmegaConfBaseException) or not cause.full_key:
        return " ".join(str(error).split())
    if isinstance(cause, (ConfigKeyError, AttributeError)):
        return describe_unknown(cause.full_key)
    return f"{cause.full_key}: {str(cause).splitlines()[0]}"


# --- validation


def validate_config(raw: DictConfig) -> RunConfig:
    """The typed config of a composed one.

    Raises:
        ConfigError: an unknown field, a value of the wrong type, or one that is not allowed; one
            line.
    """
    unresolved = OmegaConf.to_container(raw)  # ${seed} as text
    require_present(unresolved)
    try:
        plain = OmegaConf.to_container(raw, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_refusal(error)) from error
    check_fields(plain, unresolved)
    # typed after the check: merging turns 1 into true without a word
    config = OmegaConf.to_object(OmegaConf.merge(typed_schema(), plain))
    preset = find_preset(config.model.name)
    check_sampler(config.sampler.name, config.sampler.settings, preset)
    require_honest_name(config)
    if not config.method.quantized:
        config.mode = "simulate"  # one full-precision run serves both
        return config
    if config.method.released:
        require("calib.layout", config.calib.layout, ("released",))
    build_recipe(config)  # for what it refuses
    if config.mode == "int8":
        require_integer_path(config)
    for line in idle_settings(config):
        logger.warning(line)
    return config


def require_honest_name(config: RunConfig) -> None:
    """Refuse a quantized model under the name of full precision, and the other way round."""
    method = config.method
    if method.quantized == (method.name == FULL_PRECISION):
        state = "true" if method.quantized else "false"
        raise ConfigError(
            f"method.quantized: {state} does not go with the method {method.name}; "
            f"{FULL_PRECISION} alone is not quantized"
        )


def require_integer_path(config: RunConfig) -> None:
    """Refuse what cannot be run in integers, as far as a config shows it.

    Raises:
        ConfigError: nothing is quantized, or not in float32.
    """
    if not config.method.quantized:
        raise ConfigError(
            f"method: {config.method.name} quantizes nothing that could run in integers"
        )
    require("dtype", config.dtype, ("float32",))
