"""The quality of a model of natural images: of its samples, its tokenizer, real images, and what
rounding costs.

Lite0 judges (`evaluate.judges`): FID against the 10,000 validation images, and top-1 as class
fidelity. Beside the samples stand the validation images through the tokenizer, the best that a
model of these tokens can reach, and as many training images, the best that there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.data import tiny_imagenet
from experiments.data.sets import find_set
from experiments.evaluate.judges import find_judge
from experiments.plotting.grids import image_grid, tile_images
from experiments.run import cell
from experiments.store.files import read_arrays
from experiments.store.provenance import package_versions
from experiments.train_zoo.twin_quality import (
    OUT,
    full_config,
    measure_images,
    measure_rounding,
    reconstructions,
)
from models.weights.digests import module_digest
from ptq.files import replacing

# in the grid of samples, a row each; other classes are as good
SHOWN_CLASSES = (
    *("goldfish", "jellyfish", "king penguin", "golden retriever", "monarch"),
    *("school bus", "triumphal arch", "pizza", "alp", "seashore"),
)
SHOWN = 10  # images of each
QUALITY = 90  # of the JPEG


def measure_natural(model: str, overrides: list[str], folder: str | None = None) -> dict[str, Any]:
    """Everything of one model; the runs' own results are kept and reused like any others.

    Raises:
        ConfigError, CheckpointError, NonFiniteError: one line that says what is wrong.
    """
    config = full_config(model, overrides, "method=fp")
    full_precision = cell.run_cell(config)["metrics"]
    rounded = measure_rounding(model, overrides, ("nll", "kl", "lite0_fid"))
    prepared = cell.prepare_run(config)
    device = prepared.device
    judge = find_judge(prepared.preset, device)
    dataset = find_set(prepared.preset.dataset)
    images, labels = dataset.load_split("test", folder)  # (N, 3, S, S), (N,)
    decoded, l1 = reconstructions(prepared.generator, images, device)
    samples = read_arrays(prepared.folder / "samples.npz", "arr_0")["arr_0"]  # (N, S, S, 3)
    shown = pick_samples(samples, prepared.preset.classes)
    write_pictures(model, shown, images.numpy(), decoded.numpy())
    training_images, training_labels = spread_images(
        *dataset.load_split("train", folder), number=len(images)
    )
    return {
        "model": model,
        "weights": module_digest(prepared.generator.transformer),
        "full_precision": full_precision,
        "tokenizer": {"l1": l1, **measure_images(decoded, labels, judge, device)},
        "validation_images": measure_images(images, labels, judge, device),
        "training_images": measure_images(training_images, training_labels, judge, device),
        "rtn": rounded,
        "images": prepared.config.eval.n,
        "sequences": prepared.config.eval.sequences,
        "sampler_settings": prepared.settings,
        "versions": package_versions(device),
    }


def spread_images(images: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """At most `number` of N images, evenly spaced, so that all classes are among them."""
    kept = min(number, len(images))
    rows = torch.arange(kept) * len(images) // kept  # (kept,)
    return images[rows], labels[rows]


def pick_samples(samples: np.ndarray, classes: int) -> np.ndarray:
    """Samples (n, 3, S, S) of the classes that are shown, out of all (N, S, S, 3), image i of class
    i mod `classes`."""
    names = tiny_imagenet.class_names()
    rows = []
    for name in SHOWN_CLASSES:
        rows.append(samples[names.index(name) :: classes][:SHOWN])  # (at most SHOWN, S, S, 3)
    return np.concatenate(rows).transpose(0, 3, 1, 2)


def write_pictures(
    model: str, samples: np.ndarray, images: np.ndarray, decoded: np.ndarray
) -> None:
    """Samples (n, 3, S, S), and beside them real images and what the tokenizer makes of these."""
    count = len(samples)
    panels = {
        "samples": samples,
        "validation images": images[:count],
        "reconstructions": decoded[:count],
    }
    image_grid(panels, OUT / model / "pictures.png", rows=len(SHOWN_CLASSES))
    whole_rows = samples[: max(count // SHOWN, 1) * SHOWN]
    picture = Image.fromarray(tile_images(whole_rows, min(SHOWN, count)))
    with replacing(samples_picture(model)) as temporary:
        picture.save(temporary, format="jpeg", quality=QUALITY)


def judge_natural(result: Mapping[str, Any]) -> dict[str, bool]:
    """Which of the bars for a model of natural images its figures pass."""
    samples = result["full_precision"]
    real = result["validation_images"]
    return {
        "tokenizer L1 at most 0.08": result["tokenizer"]["l1"] <= 0.08,
        "top-1 at least a third of real images'": samples["lite0_top1"] >= real["lite0_top1"] / 3,
    }


def samples_picture(model: str) -> Path:
    """Where the grid of samples is."""
    return OUT / model / "samples.jpg"
