"""Measure a twin: its samples and its tokenizer against real images, and what plain rounding does to it.

    python -m experiments.quality model=var_twin                  # JSON and a sample grid under runs/quality
    python -m experiments.quality model=var_twin record=true      # also models/zoo/records and the model cards

Further overrides (`eval.n=2000`, `sampler.microbatch=500`, ...) go to the runs that it makes: full precision, and
round-to-nearest at W8A8 and W6A6. Image metrics are those of `experiments.metrics` against the training set; beside
them stand the same ones of real test images and of test images through the tokenizer, which needs the data set.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import cards, cell, data, extractor
from experiments.config import RunConfig
from experiments.figures import image_grid
from experiments.metrics import Reference, extract, image_metrics
from experiments.provenance import versions, write_json
from experiments.sampling import to_uint8
from experiments.table import configure
from models.checkpoints import CheckpointError, digest
from models.registry import ZOO, Generator
from ptq.numerics import NonFiniteError
from ptq.types import ConfigError, require

ROUNDED = ("w8a8", "w6a6")
BATCH = 500
OUT = Path("runs/quality")


@torch.no_grad()
def reconstructions(generator: Generator, images: Tensor, device: torch.device) -> tuple[Tensor, float]:
    """uint8 images (N, 3, S, S) through the tokenizer, and the mean absolute error on [-1, 1]."""
    parts = [generator.decode(generator.encode(part.to(device).float() / 255)).cpu() for part in images.split(BATCH)]
    decoded = torch.cat(parts).clamp(0, 1)
    return to_uint8(decoded), 2 * F.l1_loss(decoded, images.float() / 255).item()


def measure_images(images: Tensor, labels: Tensor, device: torch.device) -> dict[str, float]:
    """Image metrics and classifier agreement of uint8 images of known classes."""
    net = extractor.load(ZOO / "extractor.safetensors", device)
    features = extract(images, net, BATCH, device)
    found = image_metrics(features, Reference.load(ZOO / "reference.safetensors", net.digest))
    return found | {"agreement": (features.logits.argmax(dim=1) == labels).double().mean().item()}


def measure(model: str, overrides: list[str], folder: str | None = None) -> dict[str, object]:
    """Everything of one twin; the runs' own results are kept and reused like any others.

    Raises:
        ConfigError, CheckpointError, NonFiniteError: one line that says what is wrong.
    """
    def config(*more: str) -> RunConfig:
        return configure([f"model={model}", "eval=full", *more, *overrides])

    runs = {"fp": cell.run(config("method=fp"))}
    runs |= {bits: cell.run(config("method=rtn", f"quant={bits}", "calib=random")) for bits in ROUNDED}
    prepared = cell.prepare(config("method=fp"))
    generator, device = prepared.generator, prepared.device
    images, labels = data.load("test", folder)
    decoded, l1 = reconstructions(generator, images, device)
    with np.load(prepared.folder / "samples.npz") as stored:
        samples = stored["arr_0"][:100].transpose(0, 3, 1, 2)
    panels = {"samples": samples, "test images": images[:100].numpy(), "reconstructions": decoded[:100].numpy()}
    image_grid(panels, OUT / model / "pictures.png", rows=10)
    return {
        "model": model, "weights": digest(generator.transformer),
        "full_precision": runs["fp"]["metrics"],
        "tokenizer": {"l1": l1, **measure_images(decoded, labels, device)},
        "test_images": measure_images(images, labels, device),
        "rtn": {bits: {k: runs[bits]["metrics"][k] for k in ("nll", "kl", "fid")} for bits in ROUNDED},
        "images": prepared.config.eval.n, "sequences": prepared.config.eval.sequences,
        "sampler_settings": prepared.settings, "versions": versions(device),
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
    arguments = dict(a.partition("=")[::2] for a in sys.argv[1:])
    own = {"model": "rar_twin", "record": "false", "data": None}
    model, record, folder = (arguments.pop(key, default) for key, default in own.items())
    try:
        require("record", record, ("true", "false"))
        result = measure(model, [f"{k}={v}" for k, v in arguments.items()], folder)
    except (CheckpointError, ConfigError, NonFiniteError, data.DataError) as error:
        sys.exit(f"error: {error}")
    result["bars"] = verdicts(result)
    write_json(OUT / model / "quality.json", result)
    print(json.dumps(result, indent=1))
    if record == "true":
        write_json(ZOO / "records" / f"{model}-quality.json", result)
        cards.write()


if __name__ == "__main__":
    main()
