"""Measure a twin: its samples and its tokenizer against real images, and what plain rounding does
to it.

    python -m experiments.train_zoo.quality model=var_twin                  # JSON and a sample grid under runs/quality
    python -m experiments.train_zoo.quality model=var_twin record=true   # also models/zoo/records and the cards

Further overrides (`eval.n=2000`, `sampler.microbatch=500`, ...) go to the runs that it makes: full
precision, and round-to-nearest at W8A8 and W6A6. Image metrics are those of
`experiments.evaluate.small_images` against the training set; beside them stand the same ones of
real test images and of test images through the tokenizer, which needs the data set.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import data
from experiments.config.compose import configure
from experiments.config.schema import RunConfig
from experiments.evaluate.extractors import fashion
from experiments.evaluate.small_images import Reference, extract_features, image_metrics
from experiments.images.microbatches import to_uint8
from experiments.options import own_options
from experiments.plotting.grids import image_grid, save_tiles
from experiments.run import cell
from experiments.store.files import write_json
from experiments.store.provenance import package_versions
from experiments.train_zoo import cards
from experiments.train_zoo.tasks.base import as_float
from models.registry import ZOO, Generator
from models.weights.checkpoints import CheckpointError
from models.weights.digests import module_digest
from ptq.numbers.numerics import NonFiniteError
from ptq.types import ConfigError

ROUNDED = ("w8a8", "w6a6")
BATCH = 500
OUT = Path("runs/quality")


@dataclass
class Options:
    model: str = "rar_twin"
    record: bool = False
    data: str | None = None  # folder with the idx files


@torch.no_grad()
def reconstructions(
    generator: Generator, images: Tensor, device: torch.device
) -> tuple[Tensor, float]:
    """uint8 images (N, 3, S, S) through the tokenizer, and the mean absolute error on [-1, 1]."""
    parts = [
        generator.decode(generator.encode(as_float(part.to(device)))).cpu()
        for part in images.split(BATCH)
    ]
    decoded = torch.cat(parts)
    return to_uint8(decoded), 2 * F.l1_loss(decoded, as_float(images)).item()


def measure_images(images: Tensor, labels: Tensor, device: torch.device) -> dict[str, float]:
    """Image metrics and classifier agreement of uint8 images of known classes."""
    net = fashion.load_classifier(ZOO / "extractor.safetensors", device)
    features = extract_features(images, net, BATCH, device)
    found = image_metrics(features, Reference.load(ZOO / "reference.safetensors", net.digest))
    return found | {"agreement": (features.logits.argmax(dim=1) == labels).double().mean().item()}


def measure(model: str, overrides: list[str], folder: str | None = None) -> dict[str, object]:
    """Everything of one twin; the runs' own results are kept and reused like any others.

    Raises:
        ConfigError, CheckpointError, NonFiniteError: one line that says what is wrong.
    """

    def config(*more: str) -> RunConfig:
        return configure([f"model={model}", "eval=full", *more, *overrides])

    runs = {"fp": cell.run_cell(config("method=fp"))}
    runs |= {
        bits: cell.run_cell(config("method=rtn", f"quant={bits}", "calib=random"))
        for bits in ROUNDED
    }
    prepared = cell.prepare_run(config("method=fp"))
    generator = prepared.generator
    device = prepared.device
    images, labels = data.load_split("test", folder)
    decoded, l1 = reconstructions(generator, images, device)
    with np.load(prepared.folder / "samples.npz") as stored:
        samples = stored["arr_0"][:100].transpose(0, 3, 1, 2)
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
        "full_precision": runs["fp"]["metrics"],
        "tokenizer": {"l1": l1, **measure_images(decoded, labels, device)},
        "test_images": measure_images(images, labels, device),
        "rtn": {
            bits: {k: runs[bits]["metrics"][k] for k in ("nll", "kl", "fid")} for bits in ROUNDED
        },
        "images": prepared.config.eval.n,
        "sequences": prepared.config.eval.sequences,
        "sampler_settings": prepared.settings,
        "versions": package_versions(device),
    }


def verdicts(result: dict[str, object]) -> dict[str, bool]:
    """Which of the bars for a shipped twin its figures pass."""
    fp, tokenizer, real = (result[k] for k in ("full_precision", "tokenizer", "test_images"))
    return {
        "tokenizer L1 at most 0.06": tokenizer["l1"] <= 0.06,
        "FID at most 1.5 times the tokenizer's plus 0.5": fp["fid"] <= 1.5 * tokenizer["fid"] + 0.5,
        "agreement within a point of real images'": fp["agreement"] >= real["agreement"] - 0.01,
        "recall at least half of real images'": fp["recall"] >= real["recall"] / 2,
    }


def main() -> None:
    try:
        options, overrides = own_options(Options, sys.argv[1:])
        result = measure(options.model, overrides, options.data)
    except (CheckpointError, ConfigError, NonFiniteError, data.DataError) as error:
        sys.exit(f"error: {error}")
    result["bars"] = verdicts(result)
    write_json(OUT / options.model / "quality.json", result)
    print(json.dumps(result, indent=1))
    if options.record:
        write_json(ZOO / "records" / f"{options.model}-quality.json", result)
        shutil.copy(
            OUT / options.model / "samples.png", ZOO / "records" / f"{options.model}-samples.png"
        )
        cards.write()


if __name__ == "__main__":
    main()
