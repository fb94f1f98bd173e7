"""Features of image sets as a stream of chunks, kept on disk by content.

A chunk of 250 images is named by the hash of its pixels, below a folder named by the extractor's
weights and RESULT_VERSION. So the same images are found again whatever file they came from, a
killed extraction continues, and other weights or images never meet old features.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from experiments.images.image_sets import Images
from experiments.images.shards import StorageError
from experiments.store.results import RESULT_VERSION
from ptq.types import ConfigError

CHUNK = 250  # images hashed, and kept as one file, together
LAYERS = ("pool", "logits", "spatial")


class Extractor(Protocol):
    """A network that gives the layers of LAYERS for uint8 images, in torch-fidelity's form.

    `digest` identifies its weights; `image_size` is the only side it knows, None if it takes any.
    """

    digest: str
    image_size: int | None

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features of uint8 images (B, 3, S, S), one tensor (B, d) per layer."""

    def convert_features_tuple_to_dict(self, features: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The layers by name."""


class Stream:
    """Features of an image set, chunk by chunk; iterate once, then `digest` identifies the images.

    Args:
        kind: short name of the extractor, for the cache's folders. cache: folder of kept features,
            None to keep none.
        batch: images per forward pass.

    Raises:
        ConfigError: the extractor does not take images of this size. StorageError: the cache cannot
            be written.
    """

    def __init__(
        self,
        images: Images,
        extractor: Extractor,
        kind: str,
        cache: Path | None,
        batch: int = 50,
        device: str | torch.device = "cpu",
        progress: bool = False,
    ) -> None:
        if extractor.image_size not in (None, images.size):
            raise ConfigError(
                f"{images.field}: {images.path} holds {images.size}-pixel images, the {kind} extractor takes "
                f"{extractor.image_size}"
            )
        if batch < 1:
            raise ConfigError(f"batch: {batch} is not a positive integer")
        self.images = images
        self.extractor = extractor
        self.batch = batch
        self.device = device
        self.folder = (
            None if cache is None else cache / f"{kind}-{extractor.digest}-v{RESULT_VERSION}"
        )
        self.progress = progress
        self._sha = hashlib.sha256()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        with tqdm(
            total=self.images.n,
            desc=f"features of {self.images.path.name}",
            unit="img",
            disable=not self.progress,
            leave=False,
            dynamic_ncols=True,
        ) as bar:
            for part in self.images.chunks(CHUNK):
                name = hashlib.sha256(f"{part.shape}".encode() + part.tobytes()).hexdigest()
                self._sha.update(name.encode())
                yield self._features(part, name[:32])
                bar.update(len(part))

    @property
    def digest(self) -> str:
        """sha256 (16 hex digits) over the images gone through."""
        return self._sha.hexdigest()[:16]

    def _features(self, images: np.ndarray, name: str) -> dict[str, Tensor]:
        """Features of a chunk, from the cache if they are there."""
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        if path is not None and path.is_file():
            try:
                stored = load_file(path)
                if set(stored) == set(LAYERS) and all(
                    len(v) == len(images) for v in stored.values()
                ):
                    return stored
            except SafetensorError:
                pass  # damaged: extract again
        found = extract_layers(torch.from_numpy(images), self.extractor, self.batch, self.device)
        if path is not None:
            _store_features(found, path)
        return found


@torch.no_grad()
def extract_layers(
    images: Tensor, extractor: Extractor, batch: int, device: str | torch.device
) -> dict[str, Tensor]:
    """Features on the CPU, float32, of uint8 images (B, 3, S, S), `batch` at a time; without TF32
    on a GPU."""
    parts: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for rows in images.split(batch):
            for name, value in extractor.convert_features_tuple_to_dict(
                extractor(rows.to(device))
            ).items():
                parts[name].append(value.float().cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def _store_features(features: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in features.items()}, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise StorageError(f"cache: {path} cannot be written ({error})") from error
