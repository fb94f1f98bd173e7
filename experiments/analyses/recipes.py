"""The settings of a method, as its recipe has them (Table 7 of the paper)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.analyses.data import Measured
from experiments.config.recipe import build_recipe
from experiments.run.preparation import Run
from ptq.pipeline import Track
from ptq.recipe import Recipe
from ptq.types import QuantSpec


def list_settings(run: Run, options: Mapping[str, Any], track: Track, folder: Path) -> Measured:
    """The settings of a method that Table 7 lists, read off its recipe."""
    if not run.config.method.quantized:
        return {}, {"settings": {}}
    recipe = build_recipe(run.config)
    activations = recipe.activations
    if recipe.stwq:
        activations = activations.at("token_static")  # STWQ decides the granularity
    transforms = list(recipe.transforms)
    if recipe.omniquant:
        transforms.append("omniquant")
    scope = list(recipe.scope.kinds)
    if recipe.scope.matmuls:
        scope.append("attention products")
    settings = {
        "transforms": transforms,
        "sites": sorted(transformed_kinds(recipe)),
        "weights": describe_spec(recipe.weights),
        "activations": describe_spec(activations),
        "attention weights": recipe.softmax,
        "rounding": recipe.rounder,
        "calibration": f"{run.config.calib.n} rows, {run.config.calib.selector}",
        "scope": scope,
    }
    return {}, {"settings": settings | method_options(recipe)}


def describe_spec(spec: QuantSpec) -> str:
    """Granularity, range rule and symmetry of a quantizer."""
    if not spec.is_rounded:
        return "not quantized"
    range_rule = "minmax" if spec.is_dynamic else spec.range
    symmetry = "symmetric" if spec.symmetric else "asymmetric"
    size = "" if spec.group_size is None else f" of {spec.group_size}"
    return f"{spec.granularity}{size}, {range_rule}, {symmetry}"


def transformed_kinds(recipe: Recipe) -> set[str]:
    """Kinds of sites that the recipe's transforms act on."""
    kinds: set[str] = set()
    for transform in recipe.transforms:
        kinds |= set(recipe.sites_of(transform))
    if recipe.omniquant:
        kinds |= set(recipe.sites)
    return kinds


def method_options(recipe: Recipe) -> dict[str, Any]:
    """Options of the transforms that the recipe has."""
    options: dict[str, Any] = {}
    if recipe.omniquant:
        options["training"] = dataclasses.asdict(recipe.options.omniquant)
    if "svd" in recipe.transforms:
        options["branch"] = dataclasses.asdict(recipe.options.svd)
    if "hadamard" in recipe.transforms:
        options["rotation"] = dataclasses.asdict(recipe.options.hadamard)
    if "smoothquant" in recipe.transforms:
        options["alpha"] = recipe.alpha
    return options
