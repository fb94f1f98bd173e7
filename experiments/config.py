"""The schema of a run's config: what the YAML files under `conf/` may say, and how it becomes library values."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from functools import partial
from typing import Any, TypeVar, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from experiments.tracking import MODES
from models.registry import preset
from ptq.calibration import SELECTORS
from ptq.options import Options
from ptq.recipe import METHODS, Recipe, Scope
from ptq.released_families import RELEASED
from ptq.types import LAYOUTS, ConfigError, QuantSpec, require

RESULT_VERSION = 2  # raise when the same config gives other numbers; 2: dynamic ranges of attention weights hold zero
T = TypeVar("T")


@dataclass
class Model:
    name: str = "rar_twin"
    weights: str | None = None
    tokenizer_weights: str | None = None


def editable(value: type) -> type:
    """The dataclass `value` of the library as a schema: the same fields and defaults, but they can be set."""
    hints, schema = get_type_hints(value), []
    for f in fields(value):
        kind = hints[f.name]
        if is_dataclass(kind):
            kind = editable(kind)
            default = field(default_factory=kind)
        elif isinstance(f.default, tuple):
            kind, default = list[str], field(default_factory=partial(list, f.default))
        else:
            default = field(default=f.default)
        schema.append((f.name, kind, default))
    return make_dataclass(value.__name__, schema)


def frozen(value: type[T], config: object) -> T:
    """The library's value of a schema's.

    Raises:
        ConfigError: a setting is not allowed.
    """
    hints, found = get_type_hints(value), {}
    for f in fields(value):
        given = getattr(config, f.name)
        found[f.name] = frozen(hints[f.name], given) if is_dataclass(hints[f.name]) else given
        if isinstance(given, list):
            found[f.name] = tuple(given)
    return value(**found)


Spec, Settings = editable(QuantSpec), editable(Options)


@dataclass
class Method:
    name: str = "fp"
    quantized: bool = True
    smoothquant: bool = False
    os_plus: bool = False
    repq: bool = False
    shift: bool = False
    gps: bool = False
    hadamard: bool = False
    svd: bool = False
    omniquant: bool = False
    stwq: bool = False
    exclude_sinks: bool = False
    dynamic: bool = False
    released: bool = False
    range: str | None = None  # overrides quant.*.range
    symmetric: bool = False  # makes both operands so, whatever quant.*.symmetric says
    alpha: float = 0.5
    gps_form: str = "squares"
    sites: list[str] = field(default_factory=lambda: ["qkv", "fc1", "head"])
    rounder: str = "nearest"
    softmax: str = "int"
    options: Settings = field(default_factory=Settings)


@dataclass
class Quant:
    name: str = "w8a8"
    weights: Spec = field(default_factory=lambda: Spec(granularity="out_channel"))
    activations: Spec = field(default_factory=Spec)


@dataclass
class Calib:
    selector: str = "dgc"
    n: int = 128
    seed: int = 0
    batch: int = 64
    layout: str = "inference"  # of the calibration rows (`ptq.types.Adapter`)


@dataclass
class ScopeConfig:
    name: str = "paper"
    kinds: list[str] = field(default_factory=list)
    matmuls: bool = True


@dataclass
class Sampler:
    name: str = "official"
    microbatch: int = 128
    compiled: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Eval:
    name: str = "quick"
    n: int = 256
    sequences: int = 256
    batch: int = 64


@dataclass
class Tracking:
    mode: str = "none"
    group: str | None = None  # of runs in W&B; a table's name, else the model's


@dataclass
class RunConfig:
    model: Model = field(default_factory=Model)
    method: Method = field(default_factory=Method)
    quant: Quant = field(default_factory=Quant)
    calib: Calib = field(default_factory=Calib)
    scope: ScopeConfig = field(default_factory=ScopeConfig)
    sampler: Sampler = field(default_factory=Sampler)
    eval: Eval = field(default_factory=Eval)
    tracker: Tracking = field(default_factory=Tracking)
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    mode: str = "simulate"
    runs: str = "runs"


def schema() -> DictConfig:
    """The schema as Hydra sees it: every field can be overridden; what `sampler.settings` may hold is the model's."""
    node = OmegaConf.structured(RunConfig)
    OmegaConf.set_struct(node.sampler.settings, False)
    return node


ConfigStore.instance().store("schema", schema())  # the first of the defaults in conf/config.yaml


def explain(error: Exception) -> str:
    """One line that says what Hydra or OmegaConf refuse: field, value, what is allowed."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, value = error.missing_cfg_file.rpartition("/")
        return f"{group}: {value!r} is not one of {', '.join(error.options)}"
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if not isinstance(cause, OmegaConfBaseException) or not cause.full_key:
        return " ".join(str(error).split())
    if isinstance(cause, (ConfigKeyError, AttributeError)) and is_dataclass(cause.object_type):
        return f"{cause.full_key}: no such field, allowed are {', '.join(f.name for f in fields(cause.object_type))}"
    return f"{cause.full_key}: {str(cause).splitlines()[0]}"


def own_options(kind: type[T], arguments: list[str]) -> tuple[T, list[str]]:
    """A command's own options, a dataclass, from its key=value arguments, and the arguments that are left.

    Raises:
        ConfigError: an option is of the wrong type.
    """
    names = {f.name for f in fields(kind)}
    own = [a for a in arguments if a.partition("=")[0] in names]
    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.from_dotlist(own)))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    return options, [a for a in arguments if a not in own]


def validate(raw: DictConfig) -> RunConfig:
    """The typed config of a composed one.

    Raises:
        ConfigError: an unknown field, a value of the wrong type, or one that is not allowed; one line.
    """
    try:
        plain = OmegaConf.to_container(raw, resolve=True)  # without types, so that fields added with + are found
        config = OmegaConf.to_object(OmegaConf.merge(schema(), plain))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    require("dtype", config.dtype, ("float32", "float64"))
    require("device", config.device, ("auto", "cpu", "cuda"))
    require("mode", config.mode, ("simulate", "int8"))
    require("tracker.mode", config.tracker.mode, MODES)
    for name, value in (
        ("eval.n", config.eval.n), ("eval.sequences", config.eval.sequences), ("calib.n", config.calib.n),
        ("sampler.microbatch", config.sampler.microbatch), ("calib.batch", config.calib.batch),
        ("eval.batch", config.eval.batch),
    ):
        if value < 1:
            raise ConfigError(f"{name}: {value} is not a positive integer")
    for name, value in (("seed", config.seed), ("calib.seed", config.calib.seed)):
        if not 0 <= value < 2**63:
            raise ConfigError(f"{name}: {value} is not an integer from 0 to 2^63 - 1")
    if config.method.quantized:
        require("calib.selector", config.calib.selector, SELECTORS)
        require("calib.layout", config.calib.layout, ("released",) if config.method.released else LAYOUTS)
        recipe(config)
        if config.mode == "int8":
            integer_only(config)
    else:
        config.mode = "simulate"  # one full-precision run serves both
    return config


def integer_only(config: RunConfig) -> None:
    """Refuse what cannot be run in integers, as far as a config shows it.

    Raises:
        ConfigError: nothing is quantized, or not in float32.
    """
    if not config.method.quantized:
        raise ConfigError(f"method: {config.method.name} quantizes nothing that could run in integers")
    require("dtype", config.dtype, ("float32",))


def _spec(config: Spec, method: Method, name: str) -> QuantSpec:
    try:
        spec = frozen(QuantSpec, config)
        return replace(spec, range=method.range or spec.range, symmetric=method.symmetric or spec.symmetric)
    except ConfigError as error:
        raise ConfigError(f"quant.{name}.{error}") from error


def recipe(config: RunConfig) -> Recipe:
    """The quantization recipe that a config describes.

    Raises:
        ConfigError: a value is not allowed, or two switches exclude each other. CheckpointError: no such model.
    """
    method, family = config.method, preset(config.model.name).family
    scope, released = Scope(tuple(config.scope.kinds), config.scope.matmuls), RELEASED[family].scope
    if config.scope.name == "released":
        scope = scope.within(released)
    if method.released and scope != scope.within(released):
        raise ConfigError(
            f"scope: {config.scope.name!r} is more than {method.name} quantizes of {family}, allowed is released"
        )
    activations = _spec(config.quant.activations, method, "activations")
    transforms = tuple(name for name in METHODS if getattr(method, name))
    return Recipe(
        weights=_spec(config.quant.weights, method, "weights"),
        activations=activations.at("token_dynamic") if method.dynamic else activations,
        transforms=transforms, sites=tuple(method.sites),
        scope=scope, stwq=method.stwq,
        exclude_sinks=method.exclude_sinks, alpha=method.alpha, gps_form=method.gps_form, released=method.released,
        options=frozen(Options, method.options), rounder=method.rounder, softmax=method.softmax,
        omniquant=method.omniquant,
    )


def identity(config: RunConfig, weights: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs the same run. `weights`: digest of both modules. `settings`: the sampler's, resolved.

    Tracker, paths, and device are not part of it; quantization settings are not part of a full-precision run.
    """
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    kept = {key: plain[key] for key in ("eval", "seed", "dtype", "mode")}
    kept |= {"model": config.model.name, "weights": weights, "version": RESULT_VERSION}
    kept["sampler"] = {"name": config.sampler.name, "microbatch": config.sampler.microbatch, **settings}
    if config.sampler.compiled:
        kept["sampler"]["compiled"] = True
    if config.method.quantized:
        defaults = OmegaConf.to_container(OmegaConf.structured(RunConfig))
        kept |= {key: departures(plain[key], defaults[key]) for key in ("method", "quant", "calib", "scope")}
    else:
        kept["method"] = "fp"
    return kept


def departures(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not the default, so that a setting that is added later changes no run's identity."""
    found = {}
    for key, value in given.items():
        if isinstance(value, dict):
            value = departures(value, defaults[key])
            if value:
                found[key] = value
        elif value != defaults[key]:
            found[key] = value
    return found
