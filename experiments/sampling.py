"""Sampling images in fixed, padded micro-batches: resumable, and the same however the work is split.

Image i has the class i mod N and random numbers of (seed, i). Floating-point sums depend on the shape of a batch, so
every batch has exactly `microbatch` rows (the last one is padded with images that are thrown away) and shards and
resumption cut at its boundaries.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.registry import Generator
from ptq.pipeline import Track

POOL_OFFSET = 2**40  # calibration images have indices from here on: never those of an evaluation


@dataclass(frozen=True)
class Plan:
    """What to sample: `images` images, image i of class i mod `classes`, with the sampler's `settings`."""

    images: int
    classes: int
    seed: int
    microbatch: int
    settings: dict[str, object]

    def batches(self) -> Iterator[Tensor]:
        """Image indices (microbatch,) of every micro-batch, running past the last image in the last one."""
        for start in range(0, self.images, self.microbatch):
            yield torch.arange(start, start + self.microbatch)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] to uint8, rounded to nearest."""
    return (images * 255).round_().clamp_(0, 255).byte()


def sample_images(generator: Generator, plan: Plan, folder: Path, device: torch.device, track: Track) -> np.ndarray:
    """uint8 images (N, 3, S, S), one file per micro-batch below `folder`; files that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    size = generator.preset.eval_size
    resize = {} if size is None else {"size": size}  # PAR: 384 pixels, measured at 256
    shards: list[np.ndarray] = []
    for number, index in enumerate(track(list(plan.batches()), "sampling")):
        path = folder / f"{number:05d}.npy"
        if not path.is_file():
            labels = (index % plan.classes).to(device)
            tokens = generator.sample(labels, plan.seed, index, plan.settings)
            temporary = path.with_suffix(f".tmp{os.getpid()}")
            with temporary.open("wb") as file:
                np.save(file, to_uint8(generator.decode(tokens, **resize)).cpu().numpy())
            os.replace(temporary, path)
        shards.append(np.load(path))
    return np.concatenate(shards)[:plan.images]


def discard_shards(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def draw_pool(
    generator: Generator, labels: Tensor, seed: int, microbatch: int, settings: dict[str, object], device: torch.device,
    cache: Path, track: Track,
) -> Tensor:
    """Tokens of generated images with the given labels (N,), from the cache file if it is there."""
    if cache.is_file():
        try:
            return load_file(cache)["tokens"].to(device)
        except (SafetensorError, KeyError):
            cache.unlink()  # damaged: draw again
    drawn: list[Tensor] = []
    for start in track(list(range(0, len(labels), microbatch)), "calibration images"):
        index = torch.arange(start, start + microbatch)
        batch = labels[index % len(labels)].to(device)
        drawn.append(generator.sample(batch, seed, POOL_OFFSET + index, settings))
    tokens = torch.cat(drawn)[:len(labels)]
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_suffix(f".tmp{os.getpid()}")
    save_file({"tokens": tokens.cpu()}, temporary)
    os.replace(temporary, cache)
    return tokens
