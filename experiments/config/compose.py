"""From Hydra overrides to the typed config of a run; what is refused is said in one line."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from experiments.config.overrides import (
    HYDRA_KEY,
    PLUGINS,
    RUN,
    Overrides,
    add_plugins,
    describe_unknown,
)
from experiments.config.ranges import check_fields, check_sampler, field_ranges, require_present
from experiments.config.recipe import build_recipe, idle_settings
from experiments.config.schema import NAMING_FIELDS, RunConfig, run_schema, typed_value
from experiments.options import nearest
from models.registry import find_preset
from ptq.config.files import CONF, conf_folders, read_choice
from ptq.ranges import MISSING, FilePath, Optional, Text
from ptq.registry.entries import registered_entries
from ptq.types import ConfigError, require

FULL_PRECISION = "fp"

logger = logging.getLogger(__name__)


def configure(overrides: list[str]) -> RunConfig:
    """The typed config of one cell.

    Raises:
        ConfigError: Hydra or the schema refuse the overrides; one line.
    """
    use_plugins(overrides)
    parsed = check_grammar(overrides, RUN)
    try:
        raw = compose_plain(parsed) if are_plain(parsed) else compose_with_hydra(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_refusal(error)) from error
    return validate_config(raw)


# --- composing


def config_schema() -> DictConfig:
    """The schema as Hydra sees it: every field can be overridden; what `sampler.settings` may hold
    is the model's. It is shared, so nobody may change it.

    Hydra gets names and defaults alone. It would convert values to the fields' types, 1 to true;
    `validate_config` sees them as they are given.
    """
    return _config_schema(registered_entries())


@cache
def _config_schema(registered: tuple) -> DictConfig:
    """The schema while these entries are registered."""
    node = OmegaConf.create(asdict(RunConfig()))
    for group, name in NAMING_FIELDS.items():
        node[group][name] = MISSING
    OmegaConf.set_struct(node, True)
    for free in (node.sampler.settings, node.quant.by_kind, node.quant.by_layer):
        OmegaConf.set_struct(free, False)
    return node


def use_plugins(overrides: Sequence[str]) -> None:
    """Import the plugins that overrides name, and let Hydra know what they add to the schema.

    Raises:
        ConfigError: they cannot be imported.
    """
    add_plugins(overrides)
    # the first of the defaults in conf/config.yaml
    ConfigStore.instance().store("schema", config_schema())


use_plugins([])


class PluginConfigs(SearchPathPlugin):
    """Lets Hydra find the configs of plugins."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in conf_folders()[1:]:
            search_path.append("ar-ptq-plugins", f"file://{folder}")


Plugins.instance().register(PluginConfigs)


def compose_with_hydra(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides)


def are_plain(overrides: list[Override]) -> bool:
    """Whether overrides do no more than choose a file of each group, which sets nothing outside of
    its group, and set fields."""
    known = asdict(RunConfig())
    for override in overrides:
        is_change = override.type == OverrideType.CHANGE and override.package is None
        if not is_change or override.is_sweep_override():
            return False
        if override.key_or_group.split(".")[0] not in known:
            return False
    choices = chosen_files(overrides)
    return all(RUN.stands_alone(group, choice) for group, choice in choices.items())


def chosen_files(overrides: list[Override]) -> dict[str, str]:
    """The choice for each group."""
    choices = RUN.group_defaults()
    for override in overrides:
        if override.key_or_group in choices:
            choices[override.key_or_group] = override.value()
    return choices


def compose_plain(overrides: list[Override]) -> DictConfig:
    """What Hydra makes of plain overrides. It takes a tenth of a second for it, to compose settings
    of its own beside ours, and tables have hundreds of cells."""
    choices = chosen_files(overrides)
    registered = registered_entries()
    config = copy.deepcopy(compose_choices(tuple(choices.items()), registered))
    for override in overrides:
        if override.key_or_group not in choices:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
    return config


@cache
def compose_choices(choices: tuple[tuple[str, str], ...], registered: tuple) -> DictConfig:
    """The config of a choice for each group, while these entries are registered; shared, so nobody
    may change it."""
    config = copy.deepcopy(config_schema())
    for group, choice in choices:
        config[group].merge_with(read_choice(group, choice))
    config.merge_with(RUN.plain_settings())
    return config


# --- overrides


def check_grammar(arguments: list[str], overrides: Overrides) -> list[Override]:
    """The overrides as Hydra reads them.

    Raises:
        ConfigError: Hydra cannot read one, would read it as another value than the text that is
            typed, or would leave a hole in the config with it; the line names the argument.
    """
    groups = overrides.group_defaults()
    parsed = []
    for argument in arguments:
        override = parse_override(argument)
        key = override.key_or_group
        if override.is_delete() and not key.startswith(HYDRA_KEY):
            raise ConfigError(f"{argument}: nothing can be left out of a config, give {key}=VALUE")
        if key in groups:
            require_choice(override, overrides)
        # the training config has no table of ranges
        elif overrides is RUN and key in field_ranges():
            require_literal_text(override)
        parsed.append(override)
    return parsed


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
    allowed = field_ranges()[override.key_or_group]
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
    # Hydra wraps errors of OmegaConf, as cause or as context, and these know the field
    wrapped = error.__cause__ or error.__context__
    cause = error if isinstance(error, OmegaConfBaseException) else wrapped
    if not isinstance(cause, OmegaConfBaseException) or not cause.full_key:
        return " ".join(str(error).split())
    if isinstance(cause, (ConfigKeyError, AttributeError)):
        return describe_unknown(cause.full_key, asdict(RunConfig()))
    return f"{cause.full_key}: {str(cause).splitlines()[0]}"


# --- validation


def validate_config(raw: DictConfig) -> RunConfig:
    """The typed config of a composed one.

    Raises:
        ConfigError: an unknown field, a value of the wrong type, or one that is not allowed; one
            line.
    """
    unresolved = OmegaConf.to_container(raw)  # ${seed} as text
    if isinstance(unresolved.get(PLUGINS), str):
        use_plugins([f"{PLUGINS}={unresolved[PLUGINS]}"])  # the process may be a new one
    require_present(unresolved)
    try:
        plain = OmegaConf.to_container(raw, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_refusal(error)) from error
    check_fields(plain, unresolved)
    config = typed_value(run_schema(), plain)
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
