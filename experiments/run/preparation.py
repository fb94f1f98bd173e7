"""What a cell is before it runs: its config, loaded model, device, identity, and the folder that
this names."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

import models
from experiments.config.identity import run_identity
from experiments.config.schema import RunConfig
from experiments.evaluate import likelihood
from experiments.store import files
from models.preset import Preset
from models.registry import Generator
from models.weights.checkpoints import CheckpointError
from models.weights.digests import module_digest
from ptq.types import ConfigError


@dataclasses.dataclass
class Run:
    """A run about to happen (or done): its config, folder, loaded model and device."""

    config: RunConfig
    generator: Generator
    settings: dict[str, object]
    folder: Path
    hash: str
    device: torch.device
    weights: str  # digest of both modules as loaded

    @property
    def identity(self) -> dict[str, object]:
        return run_identity(self.config, self.weights, self.settings)

    @property
    def reference(self) -> Path:
        """Folder of the full-precision run that a quantized one is compared with."""
        return run_folder(full_precision_config(self.config), self.weights, self.settings)[0]


def load_model(config: RunConfig, device: torch.device) -> Generator:
    generator = models.load(
        config.model.name, config.model.weights, config.model.tokenizer_weights, str(device)
    )
    for module in (generator.transformer, generator.tokenizer):
        for name, value in module.named_parameters():  # a buffer may hold -inf: an attention mask
            if not bool(value.isfinite().all()):
                raise CheckpointError(
                    f"weights: {name} contains NaN or infinity, only finite numbers are allowed"
                )
    if config.dtype == "float64":
        generator.transformer.double()
    return generator


def sampler_settings(config: RunConfig, preset: Preset) -> dict[str, object]:
    """The sampler's settings with the user's overrides, each of its default's type.

    Raises:
        ConfigError: the preset has no such sampler or setting, or a value is not allowed.
    """
    defaults = preset.samplers.get(config.sampler.name)
    if defaults is None:
        raise ConfigError(
            f"sampler: {config.sampler.name!r} is not one of {', '.join(preset.samplers)}"
        )
    for name, value in config.sampler.settings.items():
        if name not in defaults:
            raise ConfigError(
                f"sampler.settings.{name}: no such setting, allowed are {', '.join(defaults)}"
            )
        kind = type(defaults[name])
        numbers = (int, float) if kind is float else kind
        if not isinstance(value, numbers) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"sampler.settings.{name}: {value!r} is not of type {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"sampler.settings.{name}: {value} is not finite")
        if name == "more_smooth" and value:
            raise ConfigError(
                "sampler.settings.more_smooth: true gives pictures without tokens, allowed is false"
            )
        if name == "temperature" and value <= 0:
            raise ConfigError(f"sampler.settings.temperature: {value} is not positive")
    return {**defaults, **config.sampler.settings}


def choose_device(config: RunConfig) -> torch.device:
    """Where a run computes; `auto` is a GPU if there is one.

    Raises:
        ConfigError: there is none but it is asked for.
    """
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(best if config.device == "auto" else config.device)
    if device.type == "cuda" and best == "cpu":
        raise ConfigError("device: cuda is not available here, allowed are auto and cpu")
    return device


def prepare_run(config: RunConfig) -> Run:
    """Load the model and work out the identity of the run.

    Raises:
        CheckpointError: weights missing or wrong. ConfigError: the device, a sampler setting or the
            number of held-out sequences is not to be had.
    """
    device = choose_device(config)
    generator = load_model(config, device)
    settings = sampler_settings(config, generator.preset)
    likelihood.load_held_out(generator.preset, config.eval.sequences)
    weights = module_digest(generator.transformer) + module_digest(generator.tokenizer)
    folder, key = run_folder(config, weights, settings)
    return Run(config, generator, settings, folder, key, device, weights)


def run_folder(config: RunConfig, weights: str, settings: dict[str, object]) -> tuple[Path, str]:
    """The folder of a run, and the hash of its identity. The arguments are those of
    `config.identity`."""
    key = files.value_digest(run_identity(config, weights, settings))
    parts = [config.model.name, config.method.name]
    if config.method.quantized:
        parts += [config.quant.name, config.calib.selector]
    return Path(config.runs) / f"{'-'.join(parts)}-s{config.seed}-{key}", key


def full_precision_config(config: RunConfig) -> RunConfig:
    """The config of the full-precision run that a quantized one is compared with."""
    method = dataclasses.replace(config.method, name="fp", quantized=False)
    return dataclasses.replace(config, method=method, mode="simulate")
