"""The extractor of the small-image metrics: a classifier of Fashion-MNIST.

Inception features say little about grey images of 32 pixels, and their weights cannot ship here.
A residual network of 0.3M parameters takes Inception's place. `fashion_training.py` trains it, and
it ships as `models/zoo/extractor.safetensors`:

    | layer   | shape  | what                                            | read by               |
    | ------- | ------ | ----------------------------------------------- | --------------------- |
    | pool    | (128,) | spatial mean of the last stage                  | FID, precision/recall |
    | logits  | (10,)  | class scores                                    | Inception score       |
    | spatial | (448,) | first 7 channels of the middle stage, 8 x 8 x 7 | sFID                  |

`spatial` stands for the 17 x 17 x 7 of Inception's `mixed_6` (Nash et al., 2021). Figures compare
only with figures of the same extractor, never with those of Inception.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.evaluate.extractors.base import DIGEST_LENGTH, SPATIAL_CHANNELS, flatten_spatial
from models.weights import checkpoints, digests
from ptq.types import ConfigError

SIZE = 32
CLASSES = 10
LAYERS = {"pool": 128, "logits": CLASSES, "spatial": SPATIAL_CHANNELS * 8 * 8}  # name: length


class ResidualBlock(nn.Module):
    """relu(skip(x) + norm(conv(relu(norm(conv(x)))))) (He et al., 2016).

    Shapes: (B, channels, H, W) to (B, out, H / stride, W / stride).
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.skip = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False),
                nn.BatchNorm2d(out),
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))  # (B, out, H / stride, W / stride)
        hidden = self.norm2(self.conv2(hidden))
        return F.relu(self.skip(x) + hidden)


class Classifier(nn.Module):
    """Residual network for images (B, 3, 32, 32) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, 1, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.stage1 = nn.Sequential(ResidualBlock(32, 32, 2), ResidualBlock(32, 32, 1))
        self.stage2 = ResidualBlock(32, 64, 2)
        self.stage3 = ResidualBlock(64, LAYERS["pool"], 2)
        self.head = nn.Linear(LAYERS["pool"], CLASSES)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The maps after the stem and after each of the three stages."""
        stem = self.stem(x)  # (B, 32, 32, 32)
        first = self.stage1(stem)  # (B, 32, 16, 16)
        middle = self.stage2(first)  # (B, 64, 8, 8)
        last = self.stage3(middle)  # (B, 128, 4, 4)
        return [stem, first, middle, last]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The middle stage's map (B, 64, 8, 8), pooled features (B, 128) and logits (B, 10)."""
        _, _, middle, last = self.maps(x)
        pooled = last.mean(dim=(2, 3))  # (B, 128)
        return middle, pooled, self.head(pooled)


def as_input(images: Tensor) -> Tensor:
    """uint8 images to the classifier's range: 0 .. 255 to -1 .. 1."""
    return images.float() / 127.5 - 1


class ClassifierExtractor(nn.Module):
    """The layers `pool`, `logits` and `spatial` of uint8 images (B, 3, 32, 32).

    Raises:
        CheckpointError: the weights file is missing, damaged or of another model.
        ConfigError: the images have another type or shape.
    """

    image_size = SIZE

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.net = Classifier()
        checkpoints.load_into(self.net, checkpoints.read_checkpoint(path), str(path))
        self.digest = digests.file_digest(path)[:DIGEST_LENGTH]
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if images.dtype != torch.uint8 or images.shape[1:] != (3, SIZE, SIZE):
            found = f"{images.dtype} {tuple(images.shape)}"
            raise ConfigError(f"images: {found} is not torch.uint8 (B, 3, {SIZE}, {SIZE})")
        middle, pooled, logits = self.net(as_input(images))
        return {"pool": pooled, "logits": logits, "spatial": flatten_spatial(middle)}


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> ClassifierExtractor:
    """The extractor with the weights of a file.

    Raises:
        CheckpointError: the file is missing, damaged or of another model.
    """
    return ClassifierExtractor(Path(path)).to(device)
