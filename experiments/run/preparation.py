"""What a run is before it happens: its config, device, identity, and the folder that this names."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch

import models
from experiments.config.ranges import check_sampler
from experiments.config.schema import RunConfig
from experiments.evaluate import likelihood
from experiments.evaluate.held_out import HeldOut, choose_images
from experiments.identity.departures import add_versions, describe_run
from experiments.identity.places import choose_place
from experiments.identity.whole import whole_identity
from models import registry
from models.preset import Preset
from models.registry import Generator
from models.weights.checkpoints import CheckpointError, holds_numbers
from ptq.errors import say
from ptq.files import value_digest
from ptq.types import ConfigError


@dataclasses.dataclass
class Run:
    """A run about to happen (or done): its config, what identifies it, its folder and device.

    The model is loaded when it is first asked for: a finished run is found without it.
    """

    config: RunConfig
    settings: dict[str, object]  # the sampler's, resolved
    weights: str  # digests of transformer and tokenizer, 16 hex digits each
    device: torch.device
    held_out: HeldOut | None = None  # images that the user has named

    @property
    def preset(self) -> Preset:
        return registry.find_preset(self.config.model.name)

    @cached_property
    def generator(self) -> Generator:
        """The run's model: loaded in full precision, then quantized in place.

        Raises:
            CheckpointError: weights are missing, of another model, or not finite.
        """
        return load_model(self.config, self.device)

    @property
    def transformer_digest(self) -> str:
        """Of the transformer as loaded."""
        return self.weights[: len(self.weights) // 2]

    @property
    def tokenizer_digest(self) -> str:
        """Of the tokenizer as loaded."""
        return self.weights[len(self.weights) // 2 :]

    @property
    def is_loaded(self) -> bool:
        return "generator" in vars(self)  # where a cached property keeps its value

    @property
    def values(self) -> dict[str, object]:
        """What makes it this run, without the versions of the parts that it uses."""
        digest = None if self.held_out is None else self.held_out.digest
        return describe_run(self.config, self.weights, self.settings, digest)

    @cached_property
    def departures(self) -> dict[str, object]:
        """What names it: its departures from the defaults."""
        return add_versions(self.values)

    @cached_property
    def whole(self) -> dict[str, object]:
        """Its whole identity."""
        return whole_identity(self.departures, self.device.type)

    @property
    def hash(self) -> str:
        return value_digest(self.departures)

    @property
    def stem(self) -> str:
        """The name of its folder without the hash."""
        config = self.config
        parts = [config.model.name, config.method.name]
        if config.method.quantized:
            parts += [config.quant.name, config.calib.selector]
        return f"{'-'.join(parts)}-s{config.seed}"

    @cached_property
    def folder(self) -> Path:
        """Where it belongs.

        Raises:
            ConfigError: what lies there does not say what it is of.
        """
        return choose_place(Path(self.config.runs) / f"{self.stem}-{self.hash}", self.whole)

    @property
    def reference(self) -> Path:
        """Folder of the full-precision run that a quantized one is compared with."""
        return dataclasses.replace(self, config=full_precision_config(self.config)).folder


def load_model(config: RunConfig, device: torch.device) -> Generator:
    """The config's model in its dtype, in full precision.

    Raises:
        CheckpointError: weights are missing, of another model, or not finite.
    """
    generator = models.load(
        config.model.name, config.model.weights, config.model.tokenizer_weights, str(device)
    )
    for module in (generator.transformer, generator.tokenizer):
        for name, value in module.named_parameters():  # a buffer may hold -inf: an attention mask
            if not holds_numbers(value):
                raise CheckpointError(
                    f"weights: {name} contains NaN or infinity, only finite numbers are allowed"
                )
    if config.dtype == "float64":
        generator.transformer.double()  # the tokenizer stays in float32
    return generator


def duplicate_generator(generator: Generator) -> Generator:
    """The same model with a transformer of its own; the tokenizer, never changed, is shared."""
    # the memo of `deepcopy`: what stands in it is taken, not copied
    shared = {id(generator.tokenizer): generator.tokenizer, id(generator.preset): generator.preset}
    return copy.deepcopy(generator, shared)


def sampler_settings(config: RunConfig, preset: Preset) -> dict[str, object]:
    """The sampler's settings with the user's overrides.

    Raises:
        ConfigError: the preset has no such sampler or setting, or a value is not allowed.
    """
    check_sampler(config.sampler.name, config.sampler.settings, preset)
    return {**preset.samplers[config.sampler.name], **config.sampler.settings}


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
    """Work out the identity of a run; its weights are hashed, but no model is loaded.

    Raises:
        CheckpointError: weights missing or wrong.
        ConfigError: the device is not there, a sampler setting is not allowed, or there are fewer
            held-out sequences or images than asked for.
    """
    device = choose_device(config)
    preset = registry.find_preset(config.model.name)
    settings = sampler_settings(config, preset)
    held_out = choose_held_out(config, preset)
    digests = registry.weights_digests(
        config.model.name,
        config.model.weights,
        config.model.tokenizer_weights,
        dtype=getattr(torch, config.dtype),
    )
    weights = digests["transformer"] + digests["tokenizer"]
    return Run(config, settings, weights, device, held_out)


def choose_held_out(config: RunConfig, preset: Preset) -> HeldOut | None:
    """The held-out images that the user has named; None for twins, whose tokens ship.

    Raises:
        ConfigError: there are fewer than asked for, or the folder is none of images.
    """
    if config.heldout is None:
        likelihood.load_held_out(preset, config.eval.sequences)  # refuses more than ship
        return None
    if preset.weights.shipped:
        raise ConfigError(
            f"heldout: {preset.name} ships its held-out tokens, allowed is null alone"
        )
    folder = Path(config.heldout).expanduser().resolve()
    return choose_images(folder, preset.classes, config.eval.sequences)


def check_held_out(configs: Iterable[RunConfig]) -> None:
    """Refuse folders of held-out images that are none, and say which models go without.

    Raises:
        ConfigError: as `choose_held_out` says.
    """
    without = []
    for config in configs:
        preset = registry.find_preset(config.model.name)
        if config.heldout is not None:
            choose_held_out(config, preset)
        elif not preset.weights.shipped:
            without.append(preset.name)
    if without:
        names = ", ".join(dict.fromkeys(without))
        say(f"heldout: no validation images are named, so KL and NLL of {names} are null")


def full_precision_config(config: RunConfig) -> RunConfig:
    """The config of the full-precision run that a quantized one is compared with."""
    method = dataclasses.replace(config.method, name="fp", quantized=False)
    # of both modes: full precision has no integers
    return dataclasses.replace(config, method=method, mode="simulate")
