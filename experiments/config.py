"""The schema of a run's config: what the YAML files under `conf/` may say, and how it becomes library values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ptq.recipe import Recipe, Scope
from ptq.types import ConfigError, QuantSpec, require

RESULT_VERSION = 1  # raise when the same config gives other numbers


@dataclass
class Model:
    name: str = "rar_twin"
    weights: str | None = None
    tokenizer_weights: str | None = None


@dataclass
class Method:
    name: str = "fp"
    quantized: bool = True
    smoothquant: bool = False
    shift: bool = False
    gps: bool = False
    stwq: bool = False
    exclude_sinks: bool = False
    dynamic: bool = False
    released: bool = False
    range: str | None = None  # overrides quant.*.range
    alpha: float = 0.5
    gps_form: str = "squares"
    sites: list[str] = field(default_factory=lambda: ["qkv", "fc1", "head"])


@dataclass
class Spec:
    bits: int = 8
    symmetric: bool = False
    granularity: str = "tensor"
    range: str = "percentile_mse"
    observer: str = "exact"
    include_zero: bool = False


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


@dataclass
class ScopeConfig:
    name: str = "paper"
    kinds: list[str] = field(default_factory=list)
    matmuls: bool = True


@dataclass
class Sampler:
    name: str = "official"
    microbatch: int = 128
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Eval:
    name: str = "quick"
    images: int = 256
    sequences: int = 256
    batch: int = 64


@dataclass
class Tracking:
    mode: str = "none"


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


def validate(raw: DictConfig) -> RunConfig:
    """The typed config of a composed one.

    Raises:
        ConfigError: an unknown field, a value of the wrong type, or one that is not allowed; one line.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), raw))
    except OmegaConfBaseException as error:
        lines = str(error).splitlines()
        where = getattr(error, "full_key", None)
        raise ConfigError(f"config: {lines[0]}" + (f" (at {where})" if where else "")) from error
    require("dtype", config.dtype, ("float32", "float64"))
    require("device", config.device, ("auto", "cpu", "cuda"))
    require("mode", config.mode, ("simulate",))
    for name, value in (
        ("eval.images", config.eval.images), ("eval.sequences", config.eval.sequences), ("calib.n", config.calib.n),
        ("sampler.microbatch", config.sampler.microbatch), ("calib.batch", config.calib.batch),
        ("eval.batch", config.eval.batch),
    ):
        if value < 1:
            raise ConfigError(f"{name}: {value} is not a positive integer")
    if config.method.quantized:
        recipe(config)
    return config


def _spec(config: Spec, method: Method, name: str) -> QuantSpec:
    try:
        return QuantSpec(
            config.bits, config.symmetric, config.granularity, method.range or config.range, config.observer,
            config.include_zero,
        )
    except ConfigError as error:
        raise ConfigError(f"quant.{name}.{error}") from error


def recipe(config: RunConfig) -> Recipe:
    """The quantization recipe that a config describes.

    Raises:
        ConfigError: a value is not allowed, or two switches exclude each other.
    """
    method = config.method
    activations = _spec(config.quant.activations, method, "activations")
    transforms = tuple(name for name in ("smoothquant", "shift", "gps") if getattr(method, name))
    return Recipe(
        weights=_spec(config.quant.weights, method, "weights"),
        activations=activations.at("token_dynamic") if method.dynamic else activations,
        transforms=transforms, sites=tuple(method.sites),
        scope=Scope(tuple(config.scope.kinds), config.scope.matmuls), stwq=method.stwq,
        exclude_sinks=method.exclude_sinks, alpha=method.alpha, gps_form=method.gps_form, released=method.released,
    )


def identity(config: RunConfig, weights: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs the same run. `weights`: digest of both modules. `settings`: the sampler's, resolved.

    Tracker, paths, and device are not part of it; quantization settings are not part of a full-precision run.
    """
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    kept = {key: plain[key] for key in ("eval", "seed", "dtype", "mode")}
    kept |= {"model": config.model.name, "weights": weights, "version": RESULT_VERSION}
    kept["sampler"] = {"name": config.sampler.name, "microbatch": config.sampler.microbatch, **settings}
    if config.method.quantized:
        kept |= {key: plain[key] for key in ("method", "quant", "calib", "scope")}
    else:
        kept["method"] = "fp"
    return kept
