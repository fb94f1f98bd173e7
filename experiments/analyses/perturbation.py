"""How much worse a model gets whose scales are off those of GPS at random (Figure 5 of the paper)."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.analyses.data import Found, calibration_set, sequences
from experiments.config.recipe import build_recipe
from experiments.evaluate import likelihood
from experiments.run.cell import Run
from experiments.store import files
from models.registry import Generator
from ptq.activations import calibrate_activations
from ptq.pipeline import Track, apply_transforms, round_weights, solve_transforms
from ptq.types import ConfigError, InputTransform


@torch.no_grad()
def perturbation(of: Run, options: Mapping[str, Any], track: Track, folder: Path) -> Found:
    """KL of the model with GPS, and of `trials` models whose every scale is off by a factor of 1 +-
    `spread` at most.

    The transforms are solved once; rounding and activation ranges are found anew in every trial.
    Finished trials are kept in the folder.
    """
    config = of.config
    plan = build_recipe(of.config)
    if "gps" not in plan.transforms:
        raise ConfigError(f"method: {config.method.name} has no GPS scales to perturb")
    rows = calibration_set(of, track)
    batches = rows.batches(config.calib.batch)
    tokens, labels = sequences(of, track)
    of.generator.adapter.prepare()
    solution = solve_transforms(of.generator.adapter, batches, len(rows), plan, track)
    scaled = {s.name for s in of.generator.adapter.sites if s.kind in plan.sites_of("gps")}

    def kl(transforms: dict[str, InputTransform]) -> float:
        generator = duplicate(of.generator)
        trial = dataclasses.replace(solution, transforms=transforms)
        apply_transforms(generator.adapter, plan, trial)
        round_weights(generator.adapter, plan, batches, silent, {})
        calibrate_activations(
            generator.adapter, batches, len(rows), plan, silent, trial.input_params
        )
        return likelihood.score_likelihood(
            generator, tokens, labels, config.eval.batch, of.generator
        )["kl"]

    path = folder / "trials.json"
    # of GPS first, then of the trials
    found: list[float] = json.loads(path.read_text()) if path.is_file() else []
    for number in track(range(len(found), options["trials"] + 1), "trials"):
        noise = torch.Generator().manual_seed(config.seed * 2**32 + number)
        chosen = solution.transforms
        if number > 0:
            chosen = {
                n: off(t, options["spread"], noise) if n in scaled else t for n, t in chosen.items()
            }
        found.append(kl(chosen))
        files.write_json(path, found)
    gps, *trials = found
    ordered = torch.tensor(trials, dtype=torch.float64)
    metrics = {
        "kl": gps,
        "kl_min": ordered.min().item(),
        "kl_median": ordered.median().item(),
        "kl_max": ordered.max().item(),
        "share_worse": (ordered > gps).double().mean().item(),
    }
    return metrics, {"kl": trials, "spread": options["spread"]}


def duplicate(generator: Generator) -> Generator:
    """The same model with a transformer of its own."""
    twin = copy.copy(generator)
    twin.adapter = copy.deepcopy(generator.adapter)
    twin.transformer = twin.adapter.model
    return twin


def off(transform: InputTransform, spread: float, noise: torch.Generator) -> InputTransform:
    """The transform with every scale times a factor between 1 - spread and 1 + spread."""
    factor = 1 + spread * (2 * torch.rand(len(transform.scale), generator=noise) - 1)
    return dataclasses.replace(transform, scale=transform.scale * factor.to(transform.scale))


def silent(items: Sequence, what: str) -> Sequence:
    return items
