"""What the analyses are measured on: calibration rows, and sequences, held out or of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.evaluate import likelihood
from experiments.images.microbatches import draw_pool
from experiments.run import calibration
from experiments.run.preparation import Run
from experiments.run.scoring import named_tokens
from ptq import calibration as calib
from ptq.files import value_digest
from ptq.pipeline import Track
from ptq.types import CalibrationSet

Measured = tuple[dict[str, float], dict[str, Any]]  # metrics, and detail for pictures
# an analysis: of a run, by the options of its table; it may keep what it has done in the folder
Analysis = Callable[[Run, Mapping[str, Any], Track, Path], Measured]

GPS_KINDS = ("qkv", "fc1")  # kinds of sites that GPS acts on in the paper
# added to the seed of images: theirs are never those of an evaluation or a calibration
FIRST_SEED = 2**41


def calibration_set(run: Run, track: Track) -> CalibrationSet:
    """The rows that the run's method would be calibrated on."""
    settings = run.config.calib
    adapter = run.generator.adapter
    adapter.layout = settings.layout
    pool = calibration.calibration_pool(run, track)
    return calib.select_rows(
        settings.selector, adapter, pool, settings.n, settings.seed, settings.batch
    )


def scoring_sequences(run: Run, track: Track) -> tuple[Tensor, Tensor]:
    """Tokens (n, L) or (n, L, D) and labels (n,) to score on: held-out ones of a twin, or of images
    that the user has named; else images of a released model's own."""
    count = run.config.eval.sequences
    stored = named_tokens(run, track) or likelihood.load_held_out(run.preset, count)
    if stored is not None:
        return stored["tokens"].to(run.device), stored["labels"].to(run.device)
    labels = torch.arange(count) % run.generator.preset.classes
    return sample_tokens(run, labels, track), labels.to(run.device)


def sample_tokens(run: Run, labels: Tensor, track: Track) -> Tensor:
    """Tokens of images of the full-precision model, used for nothing else."""
    determining = {"identity": run.whole, "labels": labels.tolist(), "for": "analyses"}
    key = value_digest(determining, 16)
    return draw_pool(
        run.generator,
        labels,
        run.config.seed + FIRST_SEED,
        run.config.sampler.microbatch,
        run.settings,
        run.device,
        Path(run.config.runs) / "cache" / f"pool-{key}.safetensors",
        track,
    )
