"""With quantizers off, what a recipe does to a model leaves its function alone: every recipe, every
family.

`quantize` itself is run, without its last two steps, the rounding of weights and the calibration of
activation ranges. The released code's sequence calibrates and rounds on its way; there its
full-precision linears stay in the end. What must not be folded or rotated does break:
`tests/ptq/methods/test_quarot.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

import models
from experiments.config.compose import CONF, configure
from experiments.config.recipe import build_recipe
from experiments.config.schema import Model, RunConfig
from experiments.statistics import heldout_rows
from ptq import pipeline
from ptq.methods import os_plus, svdquant
from ptq.released.sequence import ReleasedRun
from ptq.types import Adapter, CalibrationSet, Rows
from tests.families import FAMILIES, calibration, decoded, relative, tiny

# staq rounds while it fits block by block: tests/ptq/staq/test_fitting.py says the same of it
ELSEWHERE = ("fp", "staq", "shift_and_sum")  # the last is of VAR alone
RECIPES = sorted(p.stem for p in (CONF / "method").glob("*.yaml") if p.stem not in ELSEWHERE)
# to name the family
PRESETS = {"var": "var_d16", "rar": "rar_b", "par": "par_xl_4x", "mar": "mar_b"}
# nothing but rounding
PLAIN = ("rtn", "rtn_minmax", "rtn_dynamic", "stwq", "gptq", "gptaq", "qronos", "litevar")
SHORT = (
    "method.options.omniquant.epochs=1",
    "method.options.os_plus.steps=10",
    "method.options.os_plus.rows=4",
    "method.options.svd.iterations=3",
    "method.options.svd.rows=4",
)
# on the twins each transform once: what else a recipe has is rounding or another setting
TRANSFORMING = (
    "smoothquant",
    "os_plus",
    "repq",
    "ptq4arvg",
    "ptq4arvg_released",
    "omniquant",
    "quarot",
)
TWINS = ("var_twin", "rar_twin", "par_twin", "mar_twin")


@cache
def configured(name: str, *settings: str) -> RunConfig:
    scope = ["scope=released"] if name == "ptq4arvg_released" else []  # MAR has no other
    return configure([f"method={name}", "quant=w6a6", *SHORT, *scope, *settings])


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`quantize` up to rounding, with few candidates where it searches."""
    monkeypatch.setattr(svdquant, "STEPS", 4)
    monkeypatch.setattr(os_plus, "SPACING", 10)
    for step in ("round_weights", "calibrate_activations", "fit_model"):
        monkeypatch.setattr(pipeline, step, lambda *args: None)
    monkeypatch.setattr(ReleasedRun, "freeze", ReleasedRun.full_precision)


@torch.no_grad()
def outputs(adapter: Adapter, rows: Rows) -> list[torch.Tensor]:
    """Of the full sequence, and of cached decoding where there is any."""
    return [y for y in (adapter.forward(rows), decoded(adapter, rows)) if y is not None]


@torch.no_grad()
def error(
    adapter: Adapter, chosen: CalibrationSet, name: str, preset: str, *settings: str
) -> float:
    """Of the transformed model, relative; asserts that there is a transform where the recipe has
    one."""
    config = replace(configured(name, *settings), model=Model(preset))
    weights = {
        c: adapter.model.get_submodule(c).weight.clone() for s in adapter.sites for c in s.consumers
    }
    before = outputs(adapter, chosen.rows)
    adapter.layout = config.calib.layout
    pipeline.quantize(adapter, chosen, build_recipe(config), batch=len(chosen) // 2)
    adapter.layout = "inference"
    changes = [
        relative(adapter.model.get_submodule(c).weight, weight) for c, weight in weights.items()
    ]
    assert (max(changes) > 0.01) == (name not in PLAIN)
    return max(
        relative(after, expected) for after, expected in zip(outputs(adapter, chosen.rows), before)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.usefixtures("unrounded")
def test_no_recipe_changes_a_model_in_float64(name: str, family: str) -> None:
    adapter = tiny(family)
    assert error(adapter, calibration(family, adapter), name, PRESETS[family]) < 1e-12


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        *((name, twin) for name in TRANSFORMING for twin in TWINS),
        # it knows AdaLN and norms alone
        ("svdquant", "rar_twin"),
        ("svdquant", "par_twin"),
    ],
)
@pytest.mark.usefixtures("unrounded")
def test_no_recipe_changes_a_shipped_twin_in_float32(name: str, twin: str) -> None:
    generator = models.load(twin)
    generator.adapter.prepare()
    parts = heldout_rows(generator, 2)
    rows = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
    chosen = CalibrationSet(rows, torch.arange(4) < 2)
    # without its search of exponents, which tiny models have above
    settings = ["method.options.svd.grid=false"] if name == "svdquant" else []
    assert error(generator.adapter, chosen, name, twin, *settings) < 1e-4


def test_the_recipes_that_only_round_are_those_without_a_transform() -> None:
    made = {name: build_recipe(configured(name)) for name in RECIPES}
    assert {n for n, r in made.items() if not (r.transforms or r.omniquant or r.released)} == set(
        PLAIN
    )
