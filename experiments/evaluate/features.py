"""Features of image sets: extracted, in memory, or as a stream of chunks that are kept on disk.

A chunk of 250 images is named by the hash of its pixels, below a folder named by the extractor's
weights and the evaluator's version (`identity.parts`). So the same images are found again whatever
file they came from, a killed extraction continues, and other weights or images never meet old
features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from experiments.evaluate.extractors.base import LAYERS, Extractor
from experiments.identity.parts import version_of
from experiments.images.image_sets import Images
from experiments.images.shards import StorageError
from experiments.store.progress import CountedImages
from ptq.errors import say
from ptq.files import OWNER, DamagedFile, read_tensors, write_tensors
from ptq.pipeline import Track
from ptq.types import ConfigError

CHUNK = 250  # images hashed, and kept as one file, together


@dataclass(frozen=True, eq=False)
class Features:
    """Features of N >= 2 images in memory, finite float32 on the CPU.

    Attributes:
        pool, logits, spatial: (N, d), (N, classes) and (N, s).

    Raises:
        ConfigError: they are not so.
    """

    pool: Tensor
    logits: Tensor
    spatial: Tensor

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value.dtype != torch.float32 or value.ndim != 2 or len(value) != len(self.pool):
                raise ConfigError(
                    f"features: {field.name} is {value.dtype} {tuple(value.shape)}, "
                    f"expected torch.float32 (N, d) with N = {len(self.pool)}"
                )
            if not value.isfinite().all():
                raise ConfigError(f"features: {field.name} has values that are not finite")
        if len(self.pool) < 2:
            raise ConfigError(f"features: {len(self.pool)} images, expected at least 2")

    def __len__(self) -> int:
        return len(self.pool)


@torch.no_grad()
def extract_layers(
    images: Tensor,
    extractor: Extractor,
    batch: int,
    device: str | torch.device,
    tf32: bool = False,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Features (B, d) by layer, float32 on the CPU, of uint8 images (B, 3, S, S).

    Args:
        batch: images of a forward pass on the extractor's `device`.
        tf32: leave it to cuDNN's settings whether a GPU's convolutions use TF32.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    # TF32 would round a convolution's factors to 10 bits of mantissa
    full_precision = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    bar = tqdm(total=len(images), desc="features", unit="img", disable=not progress, leave=False)
    with nullcontext() if tf32 else full_precision, bar:
        for rows in images.split(batch):
            for name, value in extractor(rows.to(device)).items():
                parts[name].append(value.float().cpu())  # (B, d)
            bar.update(len(rows))
    return {name: torch.cat(values) for name, values in parts.items()}


class FeatureStream:
    """Features of an image set, chunk by chunk; iterate once, then `digest` identifies the images.

    Args:
        kind: short name of the extractor, for the cache's folders.
        cache: folder of kept features, None to keep none.
        batch: images per forward pass.
        track: shows how far it is.

    Raises:
        ConfigError: the extractor does not take images of this size.
        StorageError: the cache cannot be written.
    """

    def __init__(
        self,
        images: Images,
        extractor: Extractor,
        kind: str,
        cache: Path | None,
        batch: int = 50,
        device: str | torch.device = "cpu",
        track: Track = lambda items, what: items,
    ) -> None:
        if extractor.image_size not in (None, images.size):
            raise ConfigError(
                f"{images.field}: {images.path} holds {images.size}-pixel images, "
                f"the {kind} extractor takes {extractor.image_size}"
            )
        if batch < 1:
            raise ConfigError(f"batch: {batch} is not a positive integer")
        self.images = images
        self.extractor = extractor
        self.batch = batch
        self.device = device
        self.folder: Path | None = None
        if cache is not None:
            version = version_of("evaluator.features")
            self.folder = cache / f"{kind}-{extractor.digest}-v{version}"
        self.track = track
        self.images_done = 0
        self._sha = hashlib.sha256()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        chunks = self.images.chunks(CHUNK)
        counted = CountedImages(chunks, self.images.n, lambda: self.images_done)
        for chunk in self.track(counted, f"features of {self.images.path.name}"):  # (B, 3, S, S)
            # with the shape: the same bytes may be images of another size
            pixels = f"{chunk.shape}".encode() + chunk.tobytes()
            name = hashlib.sha256(pixels).hexdigest()
            self._sha.update(name.encode())
            yield self._chunk_features(chunk, name[:32])
            self.images_done += len(chunk)

    @property
    def digest(self) -> str:
        """sha256 (16 hex digits) over the images gone through."""
        return self._sha.hexdigest()[:16]

    def _chunk_features(self, images: np.ndarray, name: str) -> dict[str, Tensor]:
        """Features of a chunk, from the cache if they are there."""
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        if path is not None and path.is_file():
            try:
                return read_tensors(path, of=name)[0]
            except DamagedFile as error:
                say(f"made anew: {error}")
        pixels = torch.from_numpy(images)
        layers = extract_layers(pixels, self.extractor, self.batch, self.device)
        if path is not None:
            store_features(layers, path, name)
        return layers


def store_features(layers: dict[str, Tensor], path: Path, name: str) -> None:
    """Write features of the images called `name` to a file, which appears complete.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        write_tensors(layers, path, {OWNER: name})
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cache: {path} cannot be written ({error})") from error
