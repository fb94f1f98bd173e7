"""Quantized generators on disk: a folder in the form of a Hub repository.

    model.safetensors   the whole transformer: codes, scales, and all that is not quantized
    config.json         what the tensors are, and where the model comes from
    README.md           a model card

The first two are those of `ptq/int8/exports/export_files.py`. `load` reads folders of before, too,
whose files are called `<model>.safetensors` and `<model>.json`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ptq.files import replacing
from ptq.int8.blocks.layers import run_by_kernels
from ptq.int8.exports.encoding import encode_model, restore_model
from ptq.int8.exports.export_files import (
    CONFIG,
    Export,
    ExportError,
    find_description,
    read_export,
    save_export,
)
from ptq.int8.exports.structure import Plain
from ptq.int8.modules import to_int8
from ptq.spec import ConfigError
from ptq.use import hub
from ptq.use.card import CARD, describe_model
from ptq.use.generators import Generator
from ptq.use.quantizing import Quantization

# packages whose versions decide what a model computes
VERSIONED = ("torch", "safetensors", "numpy")

G = TypeVar("G", bound=Generator)


def save(
    model: Generator,
    folder: str | Path,
    *,
    rest: str = "float16",
    figures: Mapping[str, float] | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Path:
    """Write a generator that `quantize` has quantized; returns the folder.

    Args:
        rest: number format of what is not quantized, `float16` or `float32`.
        figures: measured ones by name, for the model card.
        push_to_hub: "organisation/repository", where the folder is uploaded to.
        private: whether a repository that is made for it is private.

    Raises:
        ConfigError: the model is not quantized, or a layer has no integer path; nothing is written.
        ExportError: the files cannot be written, or the hub refuses them.
    """
    quantization = model.quantization
    if not isinstance(quantization, Quantization):
        raise ConfigError(
            f"model: {model.preset.name} was not quantized by ptq.quantize, only such can be saved"
        )
    folder = Path(folder).expanduser()
    if push_to_hub is not None:
        hub.require_repository_name(push_to_hub)  # refused now, not after the files are written
    bits = quantization.recipe.weights.bits
    measured = {"output error": quantization.output_error, **(figures or {})}
    write_folder(
        model.transformer, bits, folder, describe_origin(model, quantization), rest, measured
    )
    if push_to_hub is not None:
        hub.push_folder(folder, push_to_hub, private)
    return folder


def describe_origin(model: Generator, quantization: Quantization) -> Plain:
    """Where a quantized model comes from, as plain values."""
    recipe = quantization.recipe
    return {
        "model": model.preset.name,
        "licence": model.preset.licence,
        "method": quantization.names.get("method"),
        "quant": quantization.names.get("quant"),
        "bits": {"weights": recipe.weights.bits, "activations": recipe.activations.bits},
        "scope": {"name": quantization.names.get("scope"), **asdict(recipe.scope)},
        "calibration": dict(quantization.calibration),
        "recipe": asdict(recipe) | {"options": recipe.options.as_plain()},
        "fp32_bytes": quantization.fp32_bytes,
        "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
    }


def write_folder(
    transformer: nn.Module,
    bits: int,
    folder: Path,
    about: Plain,
    rest: str = "float16",
    figures: Mapping[str, float | None] | None = None,
) -> Export:
    """Write a quantized transformer with its description and card; returns the export.

    Args:
        bits: of the weights.
        about: where the model comes from: at least `model`, `bits` and `fp32_bytes`.
        figures: measured ones, for the card; those that are None are left out.

    Raises:
        ConfigError: a layer has no integer path; nothing is written.
        ExportError: the files cannot be written.
    """
    export = encode_model(transformer, bits, rest)
    export = save_export(export, folder / CONFIG, about)
    known = {name: value for name, value in (figures or {}).items() if value is not None}
    try:
        with replacing(folder / CARD) as temporary:
            temporary.write_text(describe_model(export, known))
    except OSError as error:
        raise ExportError(f"export: {folder / CARD} cannot be written ({error})") from error
    return export


@torch.no_grad()
def load(
    source: str | Path, outline: G, *, device: str | None = None, revision: str | None = None
) -> G:
    """The generator that was saved, its linear layers running in integers.

    Args:
        source: a folder; or "organisation/repository" of the hub, if there is no such folder.
        outline: the model whose transformer is to be filled, `models.outline(name,
            tokenizer=True)`; it is changed in place. Weights that it has are not used.
        device: where the transformer is to be; left out, where the outline's tokenizer is.
        revision: branch, tag or commit of the repository.

    Raises:
        ExportError: files are missing or damaged, or are of another model; the outline is not to be
            used then.
    """
    export = read_export(find_description(find_folder(source, revision)))
    place = torch.device(device) if device is not None else _device_of(outline)
    fill_generator(outline, export, place)
    outline.quantization = export.plain["about"]
    return outline


def _device_of(outline: Generator) -> torch.device:
    """Where a model computes whose transformer is not there yet: the CPU, unless it says."""
    device = getattr(outline, "device", None)
    return torch.device("cpu") if device is None or device.type == "meta" else device


def find_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder or file `source`; or, if there is none, what the repository of that name holds.

    Raises:
        ExportError: the hub does not give it.
    """
    folder = Path(source).expanduser()
    if not folder.exists() and hub.is_repository_name(str(source)):
        return hub.fetch_export(str(source), revision)
    return folder


def fill_generator(generator: Generator, export: Export, device: torch.device) -> None:
    """Turn the transformer of a generator into the one that was exported; on a GPU its blocks are
    run by kernels of their own, if they can be.

    Raises:
        ExportError: the export is of another model.
    """
    found = export.plain["about"].get("model")
    name = generator.preset.name
    if found != name:
        raise ExportError(f"export: it is of {found}, allowed is {name}")
    transformer = generator.transformer
    to_int8(transformer, restore_model(transformer, export, device))
    transformer.eval().requires_grad_(False)
    if device.type == "cuda":
        run_by_kernels(generator.adapter)
