"""How much worse a model gets whose scales are off those of GPS at random (Figure 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.analyses.data import Measured, calibration_set, scoring_sequences
from experiments.config.recipe import build_recipe
from experiments.evaluate import likelihood
from experiments.run.preparation import Run, duplicate_generator
from experiments.store import files
from ptq.activations import calibrate_activations
from ptq.errors import say
from ptq.files import DamagedFile, read_sealed
from ptq.pipeline import Track, apply_transforms, round_weights, solve_transforms
from ptq.types import ConfigError, InputTransform

Transforms = dict[str, InputTransform]  # by site


class PerturbedModels:
    """Quantizes copies of a model with transforms that are off those of its recipe.

    The transforms are solved once; rounding and activation ranges are found anew in every copy.

    Raises:
        ConfigError: the method has no GPS scales.
    """

    def __init__(self, run: Run, track: Track) -> None:
        self.run = run
        self.recipe = build_recipe(run.config)
        if "gps" not in self.recipe.transforms:
            raise ConfigError(f"method: {run.config.method.name} has no GPS scales to perturb")
        self.rows = calibration_set(run, track)
        self.batches = self.rows.batches(run.config.calib.batch)
        self.tokens, self.labels = scoring_sequences(run, track)
        adapter = run.generator.adapter
        adapter.prepare()
        self.solution = solve_transforms(adapter, self.batches, len(self.rows), self.recipe, track)
        kinds = self.recipe.sites_of("gps")
        self.scaled_sites = {site.name for site in adapter.sites if site.kind in kinds}

    def perturbed_transforms(self, number: int, spread: float) -> Transforms:
        """The transforms of a trial; number 0 is GPS itself."""
        transforms = dict(self.solution.transforms)
        if number == 0:
            return transforms
        # a stream of its own per trial: an analysis that is resumed draws the same
        noise = torch.Generator().manual_seed(self.run.config.seed * 2**32 + number)
        for name, transform in transforms.items():
            if name in self.scaled_sites:
                transforms[name] = perturb_scale(transform, spread, noise)
        return transforms

    def kl_divergence(self, transforms: Transforms) -> float:
        """KL to full precision of a copy that is quantized with these transforms."""
        generator = duplicate_generator(self.run.generator)
        adapter = generator.adapter
        trial = dataclasses.replace(self.solution, transforms=transforms)
        apply_transforms(adapter, self.recipe, trial)
        round_weights(adapter, self.recipe, self.batches, no_progress, {})
        calibrate_activations(
            adapter,
            self.batches,
            len(self.rows),
            self.recipe,
            no_progress,
            trial.input_params,
        )
        batch = self.run.config.eval.batch
        scores = likelihood.score_likelihood(
            generator, self.tokens, self.labels, batch, self.run.generator
        )
        return scores["kl"]


@torch.no_grad()
def perturb_scales(run: Run, options: Mapping[str, Any], track: Track, folder: Path) -> Measured:
    """KL of the model with GPS, and of `trials` models whose every scale is off by a random factor.

    The factors lie between 1 - `spread` and 1 + `spread`. Finished trials are kept in the folder.
    """
    models = PerturbedModels(run, track)
    path = folder / "trials.json"
    divergences = read_trials(path)  # of GPS first, then of the trials
    for number in track(range(len(divergences), options["trials"] + 1), "trials"):
        transforms = models.perturbed_transforms(number, options["spread"])
        divergences.append(models.kl_divergence(transforms))
        files.write_sealed(path, {"of": folder.name, "kl": divergences})
    gps, *trials = divergences
    perturbed = torch.tensor(trials, dtype=torch.float64)  # (trials,)
    metrics = {
        "kl": gps,
        "kl_min": perturbed.min().item(),
        "kl_median": perturbed.median().item(),
        "kl_max": perturbed.max().item(),
        "share_worse": (perturbed > gps).double().mean().item(),
    }
    return metrics, {"kl": trials, "spread": options["spread"]}


def read_trials(path: Path) -> list[float]:
    """The KLs of the trials that are finished; a file that is damaged is named, and they are made
    anew."""
    if not path.is_file():
        return []
    try:
        written = read_sealed(path)
        if written["of"] != path.parent.name:
            raise DamagedFile(f"{path}: is of {written['of']}, expected {path.parent.name}")
    except DamagedFile as error:
        say(f"made anew: {error}")
        return []
    return written["kl"]


def perturb_scale(
    transform: InputTransform, spread: float, noise: torch.Generator
) -> InputTransform:
    """The transform with every scale times a factor between 1 - spread and 1 + spread."""
    factor = 1 + spread * (2 * torch.rand(len(transform.scale), generator=noise) - 1)  # (C,)
    return dataclasses.replace(transform, scale=transform.scale * factor.to(transform.scale))


def no_progress(items: Sequence, what: str) -> Sequence:
    """A `Track` that shows nothing."""
    return items
