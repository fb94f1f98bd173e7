"""Runs whose model is an export: its transformer is read from there, and nothing is calibrated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import models
from experiments.config.compose import configure
from experiments.run.preparation import Run, choose_device, choose_held_out, sampler_settings
from models import registry
from models.registry import Generator
from ptq.int8.exports.export_files import ExportError, find_description, read_description
from ptq.types import ConfigError
from ptq.use.saving import find_folder, load

# what an export has decided
DECIDED = ("method", "quant", "calib", "scope", "mode", "dtype")


@dataclasses.dataclass(kw_only=True)
class ExportedRun(Run):
    """A run of the model that an export holds.

    Attributes:
        export: the export's folder or description.
        plain: its description.
    """

    export: Path
    plain: Mapping[str, Any]

    @cached_property
    def generator(self) -> Generator:
        """The exported model in integers, with its tokenizer.

        Raises:
            ExportError: the export is damaged. CheckpointError: the tokenizer's weights are.
        """
        model = self.config.model
        tokenizer = model.tokenizer_weights or True
        outline = models.outline(model.name, tokenizer, str(self.device))
        return load(self.export, outline)

    @property
    def values(self) -> dict[str, object]:
        return super().values | {"mode": "int8", "quantized": self.plain["digest"]}

    @property
    def stem(self) -> str:
        about = self.plain["about"]
        bits = about["bits"]
        parts = [
            self.config.model.name,
            about.get("method") or "recipe",
            about.get("quant") or f"w{bits['weights']}a{bits['activations']}",
            "int8",
            f"s{self.config.seed}",
        ]
        return "-".join(parts)

    def describe_cell(self) -> dict[str, str | None]:
        """The names by which tables know what the model is."""
        about = self.plain["about"]
        return {
            "model": self.config.model.name,
            "method": about.get("method"),
            "quant": about.get("quant"),
            "calib": about.get("calibration", {}).get("selector"),
            "scope": about.get("scope", {}).get("name"),
            "sampler": self.config.sampler.name,
            "eval": self.config.eval.name,
            "mode": "int8",
        }


def prepare_exported(source: str, overrides: Sequence[str]) -> ExportedRun:
    """The run of an export: its model is the export's, other settings those of the overrides.

    Args:
        source: a folder, or a repository of the hub.

    Raises:
        ConfigError, ExportError, CheckpointError: one line.
    """
    export = find_folder(source)
    plain = read_description(find_description(export))
    name = plain["about"].get("model")
    if name not in registry.PRESETS:
        raise ExportError(f"quantized: {source} is of {name}, no model of `python -m models list`")
    for override in overrides:
        key, _, value = override.partition("=")
        group = key.lstrip("+~").split(".")[0]
        if group in DECIDED:
            raise ConfigError(f"{key}: the export in {source} has decided it, leave it out")
        if key == "model" and value != name:
            raise ConfigError(f"model: {value!r} is not {name}, which {source} is of")
        if key == "model.weights":
            raise ConfigError(f"{key}: the export in {source} has its own, leave it out")
    others = [override for override in overrides if override.partition("=")[0] != "model"]
    config = configure([f"model={name}", "method=fp", *others])
    preset = registry.find_preset(name)
    settings = sampler_settings(config, preset)
    digest = registry.part_digest(name, "tokenizer", config.model.tokenizer_weights)
    weights = plain["digest"][: len(digest)] + digest
    return ExportedRun(
        config=config,
        settings=settings,
        weights=weights,
        device=choose_device(config),
        held_out=None if config.heldout is None else choose_held_out(config, preset),
        export=export,
        plain=plain,
    )
