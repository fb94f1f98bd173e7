"""The quality of a twin: of its samples, its tokenizer and real images, and what rounding costs.

`quality.py` is the command, `natural_quality.py` the same of natural images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.config.compose import configure
from experiments.config.schema import RunConfig
from experiments.data import fashion_mnist
from experiments.evaluate.judges import Judge, find_judge
from experiments.evaluate.small_images import extract_features
from experiments.images.microbatches import to_uint8
from experiments.plotting.grids import image_grid, save_tiles
from experiments.run import cell
from experiments.store.files import read_arrays
from experiments.store.provenance import package_versions
from experiments.train_zoo.tasks.base import as_float
from models.registry import Generator
from models.weights.digests import module_digest

ROUNDED = ("w8a8", "w6a6")
BATCH = 500
OUT = Path("runs/quality")


@torch.no_grad()
def reconstructions(
    generator: Generator, images: Tensor, device: torch.device
) -> tuple[Tensor, float]:
    """uint8 images (N, 3, S, S) through the tokenizer, and the mean absolute error on [-1, 1]."""
    parts = []
    for part in images.split(BATCH):
        tokens = generator.encode(as_float(part.to(device)))
        parts.append(generator.decode(tokens).cpu())  # (B, 3, S, S) in [0, 1]
    decoded = torch.cat(parts)  # (N, 3, S, S) in [0, 1]
    return to_uint8(decoded), 2 * F.l1_loss(decoded, as_float(images)).item()


def measure_images(
    images: Tensor, labels: Tensor, judge: Judge, device: torch.device
) -> dict[str, float]:
    """Figures of uint8 images (N, 3, S, S) of known classes (N,)."""
    return judge.score(extract_features(images, judge.extractor, BATCH, device), labels)


def full_config(model: str, overrides: Sequence[str], *own: str) -> RunConfig:
    """The config of one of the runs: overrides of the command line win."""
    return configure([f"model={model}", "eval=full", *own, *overrides])


def measure_rounding(
    model: str, overrides: Sequence[str], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """By bits, the metrics of these names of a model that is rounded to nearest."""
    rounded = {}
    for bits in ROUNDED:
        config = full_config(model, overrides, "method=rtn", f"quant={bits}", "calib=random")
        metrics = cell.run_cell(config)["metrics"]
        rounded[bits] = {name: metrics.get(name) for name in names}
    return rounded


def measure_twin(model: str, overrides: list[str], folder: str | None = None) -> dict[str, object]:
    """Everything of one twin; the runs' own results are kept and reused like any others.

    Raises:
        ConfigError, CheckpointError, NonFiniteError: one line that says what is wrong.
    """
    config = full_config(model, overrides, "method=fp")
    full_precision = cell.run_cell(config)["metrics"]
    rounded = measure_rounding(model, overrides, ("nll", "kl", "fid"))
    # of the run that is done: its folder, and its model in full precision
    prepared = cell.prepare_run(config)
    generator = prepared.generator
    device = prepared.device
    judge = find_judge(prepared.preset, device)
    images, labels = fashion_mnist.load_split("test", folder)  # (10000, 3, 32, 32), (10000,)
    decoded, l1 = reconstructions(generator, images, device)
    images_file = prepared.folder / "samples.npz"
    pixels = read_arrays(images_file, "arr_0")["arr_0"][:100]  # (100, S, S, 3)
    samples = pixels.transpose(0, 3, 1, 2)  # (100, 3, S, S)
    panels = {
        "samples": samples,
        "test images": images[:100].numpy(),
        "reconstructions": decoded[:100].numpy(),
    }
    image_grid(panels, OUT / model / "pictures.png", rows=10)
    save_tiles(samples, OUT / model / "samples.png")
    return {
        "model": model,
        "weights": module_digest(generator.transformer),
        "full_precision": full_precision,
        "tokenizer": {"l1": l1, **measure_images(decoded, labels, judge, device)},
        "test_images": measure_images(images, labels, judge, device),
        "rtn": rounded,
        "images": prepared.config.eval.n,
        "sequences": prepared.config.eval.sequences,
        "sampler_settings": prepared.settings,
        "versions": package_versions(device),
    }


def judge_twin(result: dict[str, object]) -> dict[str, bool]:
    """Which of the bars for a shipped twin its figures pass."""
    fp = result["full_precision"]
    tokenizer = result["tokenizer"]
    real = result["test_images"]
    return {
        "tokenizer L1 at most 0.06": tokenizer["l1"] <= 0.06,
        "FID at most 1.5 times the tokenizer's plus 0.5": fp["fid"] <= 1.5 * tokenizer["fid"] + 0.5,
        "agreement within a point of real images'": fp["agreement"] >= real["agreement"] - 0.01,
        "recall at least half of real images'": fp["recall"] >= real["recall"] / 2,
    }
