"""Exports of quantized models: what is said about them, and a model that is loaded from one.

The format is that of `ptq/use/saving.py`. Beside what a model is made of, the description
tells where it comes from: the model and the digest of its weights, method, scope, bits, what was
folded into what, the calibration rows, the config and versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from experiments.config.recipe import build_recipe
from experiments.identity.results import state_identity
from experiments.run.preparation import Run
from experiments.store import provenance
from models import registry
from models.registry import Generator
from ptq.int8.exports.export_files import Export, ExportError, find_description, read_export
from ptq.methods.quarot import rotated_offline
from ptq.pipeline import Report
from ptq.recipe import Recipe
from ptq.types import AdaLNFold, Adapter, Fold, NormFold
from ptq.use.quantizing import full_precision_bytes
from ptq.use.saving import fill_generator, write_folder


def describe_export(run: Run, report: Report, calibration: Mapping[str, object]) -> dict[str, Any]:
    """Where the run's quantized model comes from, as plain values.

    Args:
        calibration: what is known of its rows.
    """
    config = run.config
    recipe = build_recipe(config)
    return {
        "model": config.model.name,
        "licence": run.preset.licence,
        "weights": run.weights,
        "run": run.hash,
        **state_identity(run.whole),
        "method": config.method.name,
        "quant": config.quant.name,
        "bits": {"weights": recipe.weights.bits, "activations": recipe.activations.bits},
        "scope": {"name": config.scope.name, **asdict(recipe.scope)},
        "folds": describe_folds(run.generator.adapter, recipe, report),
        "calibration": dict(calibration),
        "fp32_bytes": fp32_bytes(config.model.name),
        "config": asdict(config),
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
    # an outline has shapes and no memory
    return full_precision_bytes(registry.build_outline(model).transformer)


def write_export(
    run: Run,
    report: Report,
    calibration: Mapping[str, object],
    folder: Path,
    rest: str = "float16",
    figures: Mapping[str, float | None] | None = None,
) -> Export:
    """Export the run's quantized model to a folder, as `ptq.save` does.

    Args:
        figures: measured ones, for the model card.

    Raises:
        ConfigError: a layer has no integer path; nothing is written. ExportError: the files cannot
            be.
    """
    about = describe_export(run, report, calibration)
    bits = run.config.quant.weights.bits
    return write_folder(run.generator.transformer, bits, folder, about, rest, figures)


@torch.no_grad()
def load_export(path: Path, generator: Generator, weights: str | None = None) -> Export:
    """Turn a fresh model into the one that was exported, linears running in integers.

    Args:
        path: of the export's folder, or of its description.
        weights: the digest that the export has to state, if that matters.

    Raises:
        ExportError: files are missing or damaged, or are of another model or other weights; the
            model is not to be used then.
    """
    export = read_export(find_description(path))
    found = export.plain["about"].get("weights")
    device = next(generator.transformer.parameters()).device
    if weights is not None and found != weights:
        raise ExportError(f"export: {path} was made of weights {found}, allowed is {weights}")
    fill_generator(generator, export, device)
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
    return load_export(folder, fresh, run.weights).plain["bytes"]
