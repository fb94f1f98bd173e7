"""The settings of a method, as its recipe has them (Table 7 of the paper)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.analyses.data import Found
from experiments.config.recipe import build_recipe
from experiments.run.cell import Run
from ptq.pipeline import Track
from ptq.types import QuantSpec


def recipes(of: Run, options: Mapping[str, Any], track: Track, folder: Path) -> Found:
    """The settings of a method that Table 7 lists, read off its recipe."""
    if not of.config.method.quantized:
        return {}, {"settings": {}}

    def said(spec: QuantSpec) -> str:
        found = "minmax" if spec.granularity == "token_dynamic" else spec.range
        return f"{spec.granularity}, {found}, {'symmetric' if spec.symmetric else 'asymmetric'}"

    plan = build_recipe(of.config)
    c = of.config.calib
    acted = {kind for t in plan.transforms for kind in plan.sites_of(t)} | set(
        plan.sites if plan.omniquant else ()
    )
    settings = {
        "transforms": list(plan.transforms) + (["omniquant"] if plan.omniquant else []),
        "sites": sorted(acted),
        "weights": said(plan.weights),
        "activations": said(plan.activations.at("token_static") if plan.stwq else plan.activations),
        "attention weights": plan.softmax,
        "rounding": plan.rounder,
        "calibration": f"{c.n} rows, {c.selector}",
        "scope": list(plan.scope.kinds) + (["attention products"] if plan.scope.matmuls else []),
    }
    if plan.omniquant:
        settings["training"] = dataclasses.asdict(plan.options.omniquant)
    if "svd" in plan.transforms:
        settings["branch"] = dataclasses.asdict(plan.options.svd)
    if "hadamard" in plan.transforms:
        settings["rotation"] = dataclasses.asdict(plan.options.hadamard)
    if "smoothquant" in plan.transforms:
        settings["alpha"] = plan.alpha
    return {}, {"settings": settings}
