"""From Hydra overrides to the typed config of a run; what is refused is said in one line."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from experiments.config.overrides import CONF
from experiments.config.recipe import build_recipe
from experiments.config.schema import RunConfig, config_schema
from experiments.options import nearest
from experiments.store.tracking import MODES
from ptq.calibration import SELECTORS
from ptq.types import LAYOUTS, ConfigError, require


def configure(overrides: list[str]) -> RunConfig:
    """The typed config of one cell.

    Raises:
        ConfigError: Hydra or the schema refuse the overrides; one line.
    """
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            raw = compose("config", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_refusal(error)) from error
    return validate_config(raw)


def explain_refusal(error: Exception) -> str:
    """One line that says what Hydra or OmegaConf refuse: field, value, what is allowed."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, value = error.missing_cfg_file.rpartition("/")
        return (
            f"{group}: {value!r} is not one of {', '.join(error.options)}"
            f"{nearest(value, error.options)}"
        )
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if not isinstance(cause, OmegaConfBaseException) or not cause.full_key:
        return " ".join(str(error).split())
    if isinstance(cause, (ConfigKeyError, AttributeError)) and is_dataclass(cause.object_type):
        known = [field.name for field in fields(cause.object_type)]
        word = cause.full_key.rpartition(".")[2]
        return (
            f"{cause.full_key}: no such field, allowed are {', '.join(known)}{nearest(word, known)}"
        )
    return f"{cause.full_key}: {str(cause).splitlines()[0]}"


def validate_config(raw: DictConfig) -> RunConfig:
    """The typed config of a composed one.

    Raises:
        ConfigError: an unknown field, a value of the wrong type, or one that is not allowed; one
            line.
    """
    try:
        # without types, so that fields added with + are found
        plain = OmegaConf.to_container(raw, resolve=True)
        config = OmegaConf.to_object(OmegaConf.merge(config_schema(), plain))
    except OmegaConfBaseException as error:
        raise ConfigError(explain_refusal(error)) from error
    _require_names(config)
    _require_numbers(config)
    if not config.method.quantized:
        config.mode = "simulate"  # one full-precision run serves both
        return config
    _require_calibration(config)
    build_recipe(config)
    if config.mode == "int8":
        require_integer_path(config)
    return config


def _require_names(config: RunConfig) -> None:
    require("dtype", config.dtype, ("float32", "float64"))
    require("device", config.device, ("auto", "cpu", "cuda"))
    require("mode", config.mode, ("simulate", "int8"))
    require("tracker.mode", config.tracker.mode, MODES)


def _require_numbers(config: RunConfig) -> None:
    counts = {
        "eval.n": config.eval.n,
        "eval.sequences": config.eval.sequences,
        "calib.n": config.calib.n,
        "sampler.microbatch": config.sampler.microbatch,
        "calib.batch": config.calib.batch,
        "eval.batch": config.eval.batch,
    }
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name}: {value} is not a positive integer")
    for name, value in (("seed", config.seed), ("calib.seed", config.calib.seed)):
        if not 0 <= value < 2**63:
            raise ConfigError(f"{name}: {value} is not an integer from 0 to 2^63 - 1")


def _require_calibration(config: RunConfig) -> None:
    layouts = ("released",) if config.method.released else LAYOUTS
    require("calib.selector", config.calib.selector, SELECTORS)
    require("calib.layout", config.calib.layout, layouts)


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
