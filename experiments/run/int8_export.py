"""Exports of quantized models: what is said about them, and a model that is loaded from one.

The format is that of `ptq/int8/export_files.py`. Beside what a model is made of, the description
tells where it comes from: the model and the digest of its weights, method, scope, bits, what was
folded into what, the calibration rows, the config and versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from experiments.config.recipe import build_recipe
from experiments.run.preparation import Run
from experiments.store import provenance
from models import registry
from models.registry import Generator
from ptq.int8.encoding import encode_model, restore_model
from ptq.int8.export_files import Export, ExportError, read_export, save_export
from ptq.int8.modules import to_int8
from ptq.methods.quarot import rotated_offline
from ptq.pipeline import Report
from ptq.recipe import Recipe
from ptq.types import AdaLNFold, Adapter, Fold, NormFold


def describe_export(run: Run, report: Report, calibration: Mapping[str, object]) -> dict[str, Any]:
    """Where the run's quantized model comes from, as plain values.

    Args:
        calibration: what is known of its rows.
    """
    config = run.config
    recipe = build_recipe(config)
    return {
        "model": config.model.name,
        "weights": run.weights,
        "run": run.hash,
        "method": config.method.name,
        "quant": config.quant.name,
        "bits": {"weights": recipe.weights.bits, "activations": recipe.activations.bits},
        "scope": {"name": config.scope.name, **asdict(recipe.scope)},
        "folds": describe_folds(run.generator.adapter, recipe, report),
        "calibration": dict(calibration),
        "fp32_bytes": fp32_bytes(config.model.name),
        "config": OmegaConf.to_container(OmegaConf.structured(config)),
        "revision": provenance.code_revision(),
        "versions": provenance.package_versions(run.device),
    }


def describe_folds(adapter: Adapter, recipe: Recipe, report: Report) -> dict[str, str]:
    """By site, into what its transform was folded, if there was one.

    `offline` stands for a rotation done for good.
    """
    folds: dict[str, str] = {}
    for site in adapter.sites:
        is_scaled = f"{site.name}.transform.scale" in report.tensors
        if is_scaled and site.fold is not None:
            folds[site.name] = _fold_target(site.fold)
    if recipe.rotates:
        rotated = rotated_offline(adapter, recipe.options.hadamard)
        folds |= dict.fromkeys(rotated, "offline")
    return folds


def _fold_target(fold: Fold) -> str:
    """The modules that take up a fold."""
    if isinstance(fold, NormFold):
        return fold.norm
    if isinstance(fold, AdaLNFold):
        return f"{fold.linear} and {fold.kappa}"
    return fold.linear


def fp32_bytes(model: str) -> int:
    """Bytes of a model's transformer in FP32."""
    total = 0
    # an outline has shapes and no memory; buffers of integers keep their size
    for tensor in registry.build_outline(model).transformer.state_dict().values():
        total += tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())
    return total


def write_export(
    run: Run,
    report: Report,
    calibration: Mapping[str, object],
    folder: Path,
    rest: str = "float16",
) -> Export:
    """Export the run's quantized model to `<folder>/<model>.json` and `.safetensors`.

    Raises:
        ConfigError: a layer has no integer path; nothing is written. ExportError: the files cannot
            be.
    """
    export = encode_model(run.generator.transformer, run.config.quant.weights.bits, rest)
    return save_export(
        export,
        export_path(folder, run.config.model.name),
        describe_export(run, report, calibration),
    )


def export_path(folder: Path, model: str) -> Path:
    """Where the description of a model's export lies."""
    return folder / f"{model}.json"


@torch.no_grad()
def load_export(path: Path, generator: Generator, weights: str | None = None) -> Export:
    """Turn a fresh model into the one that was exported, linears running in integers.

    Args:
        path: of the description.
        weights: the digest that the export has to state, if that matters.

    Raises:
        ExportError: files are missing or damaged, or are of another model or other weights; the
            model is not to be used then.
    """
    export = read_export(path)
    about = export.plain["about"]
    if about.get("model") != generator.preset.name:
        raise ExportError(
            f"export: {path} is of {about.get('model')}, allowed is {generator.preset.name}"
        )
    if weights is not None and about.get("weights") != weights:
        raise ExportError(
            f"export: {path} was made of weights {about.get('weights')}, allowed is {weights}"
        )
    to_int8(generator.transformer, restore_model(generator.transformer, export))
    return export


def int8_model(run: Run, folder: Path, fresh: Generator) -> int:
    """Put `fresh`, made into what the export in `folder` holds, in the place of the run's model.

    Returns:
        Bytes of the export's tensor file.

    Raises:
        ExportError: the export is missing, damaged, or of other weights.
    """
    # lets go of the simulated model before the export is read
    run.generator = fresh
    export = load_export(export_path(folder, run.config.model.name), fresh, run.weights)
    return export.plain["bytes"]
