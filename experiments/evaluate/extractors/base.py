"""What all extractors share: three layers of features, and weights known by their digest.

| layer   | what                                                   | read by               |
| ------- | ------------------------------------------------------ | --------------------- |
| pool    | the features that the last layer classifies            | FID, precision/recall |
| logits  | class scores                                           | Inception score       |
| spatial | first 7 channels of a map inside the network, in the   | sFID                  |
|         | order (height, width, channel) of ADM's evaluator      |                       |
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

from torch import Tensor

from models.weights import digests
from models.weights.checkpoints import CheckpointError

LAYERS = ("pool", "logits", "spatial")
SPATIAL_CHANNELS = 7
DIGEST_LENGTH = 16  # hex digits of a sha256 by which results name an extractor


class Extractor(Protocol):
    """A network that gives the layers of LAYERS.

    Attributes:
        digest: first 16 hex digits of the sha256 of its weights.
        image_size: the only side of images that it takes; None if it takes any.
    """

    digest: str
    image_size: int | None

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features (B, d) by layer, of uint8 images (B, 3, S, S)."""


def flatten_spatial(feature_map: Tensor) -> Tensor:
    """The layer `spatial` (B, H * W * 7) of a map (B, C, H, W)."""
    channels = feature_map[:, :SPATIAL_CHANNELS]  # (B, 7, H, W)
    return channels.permute(0, 2, 3, 1).flatten(1)


def named_digest(path: Path) -> str:
    """sha256 (64 hex digits) of a weights file whose name ends in the first eight of them.

    Raises:
        CheckpointError: the file is missing, or its name and its contents do not agree.
    """
    if not path.is_file():
        raise CheckpointError(f"weights: {path} is missing, expected a file NAME-SHA256.pth")
    digits = re.search(r"-([0-9a-f]{8})\.\w+$", path.name)
    if digits is None:
        raise CheckpointError(
            f"weights: {path.name} does not end in the first 8 hex digits of its sha256, "
            "expected a name such as NAME-0123abcd.pth"
        )
    digest = digests.file_digest(path)
    if not digest.startswith(digits[1]):
        raise CheckpointError(
            f"weights: {path} has sha256 {digest[:8]}..., its name says {digits[1]}; it is damaged"
        )
    return digest
