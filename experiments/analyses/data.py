"""What the analyses are measured on: calibration rows, and sequences, held out or drawn from the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.evaluate import likelihood
from experiments.images.microbatches import draw_pool
from experiments.run import cell
from experiments.run.cell import Run
from experiments.store import files
from ptq import calibration as calib
from ptq.pipeline import Track
from ptq.types import CalibrationSet

Found = tuple[dict[str, float], dict[str, Any]]  # metrics and detail

Measure = Callable[[Run, Mapping[str, Any], Track, Path], Found]

LAYERS = ("qkv", "fc1")  # kinds that GPS acts on in the paper

# number of the first of these images: never that of an evaluation or a calibration
ELSEWHERE = 2**41


def calibration_set(of: Run, track: Track) -> CalibrationSet:
    """The rows that the cell's method would be calibrated on."""
    c = of.config.calib
    adapter = of.generator.adapter
    adapter.layout = c.layout
    return calib.select_rows(
        c.selector, adapter, cell.calibration_pool(of, track), c.n, c.seed, c.batch
    )


def sequences(of: Run, track: Track) -> tuple[Tensor, Tensor]:
    """Tokens and labels to score on: held-out ones of a twin, images of a released model's own."""
    stored = likelihood.load_held_out(of.generator.preset, of.config.eval.sequences)
    if stored is not None:
        return stored["tokens"].to(of.device), stored["labels"].to(of.device)
    labels = torch.arange(of.config.eval.sequences) % of.generator.preset.classes
    return drawn(of, labels, track), labels.to(of.device)


def drawn(of: Run, labels: Tensor, track: Track) -> Tensor:
    """Tokens of images of the full-precision model, used for nothing else."""
    key = files.value_digest(
        {"identity": of.identity, "labels": labels.tolist(), "for": "analyses"}, 16
    )
    cache = Path(of.config.runs) / "cache" / f"pool-{key}.safetensors"
    seed = of.config.seed + ELSEWHERE
    return draw_pool(
        of.generator,
        labels,
        seed,
        of.config.sampler.microbatch,
        of.settings,
        of.device,
        cache,
        track,
    )
