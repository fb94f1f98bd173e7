"""The Inception network of FID (Szegedy et al., 2015; weights of 2015-12-05) by torch-fidelity.

    | layer   | shape   | what                                          | read by               |
    | ------- | ------- | --------------------------------------------- | --------------------- |
    | pool    | (2048,) | pool_3                                        | FID, precision/recall |
    | logits  | (1008,) | pool_3 times the last weights, without bias   | Inception score       |
    | spatial | (2023,) | first 7 channels of mixed_6/conv, 17 x 17 x 7 | sFID                  |

torch-fidelity's network is a conversion of the graph that ADM's evaluator runs, with TensorFlow's
resizing to 299 pixels. `mixed_6/conv` is its `Mixed_6d.branch1x1`. ADM flattens (height, width,
channel), so its reference statistics fit this order alone. On ADM's own samples others found this
network within 0.002 of FID and 0.15 of Inception score of the graph; it was not measured here.

The weights are torch-fidelity's file; give its path. They are never downloaded here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.evaluate.extractors.base import (
    DIGEST_LENGTH,
    SPATIAL_CHANNELS,
    flatten_spatial,
    named_digest,
)
from experiments.evaluate.options import OFFICIAL_INCEPTION
from models.torchvision_shim import ensure_torchvision
from models.weights import checkpoints
from models.weights.checkpoints import CheckpointError

FILE = f"weights-inception-2015-12-05-{OFFICIAL_INCEPTION}.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
LAYERS = {"pool": 2048, "logits": 1008, "spatial": SPATIAL_CHANNELS * 17 * 17}  # name: length
FIDELITY_LAYERS = ["2048", "logits_unbiased"]  # torch-fidelity's names of pool and logits


class InceptionExtractor(nn.Module):
    """The layers `pool`, `logits` and `spatial` of uint8 images (B, 3, S, S)."""

    image_size = None  # images are resized

    def __init__(self, path: Path, digest: str) -> None:
        super().__init__()
        ensure_torchvision()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.digest = digest
        self.net = FeatureExtractorInceptionV3("inception-v3-compat", FIDELITY_LAYERS, str(path))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with capture_output(self.net.Mixed_6d.branch1x1) as outputs:
            pool, logits = self.net(images)  # (B, 2048), (B, 1008)
        (mixed,) = outputs  # (B, 192, 17, 17)
        return {"pool": pool, "logits": logits, "spatial": flatten_spatial(mixed)}


@contextmanager
def capture_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of a module's calls inside the block."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def load_inception(
    path: str | Path | None, device: str | torch.device = "cpu"
) -> InceptionExtractor:
    """The extractor with the weights of a file, by default the one that torch-fidelity downloads.

    Other weights of the same shapes are accepted under a name that carries their own digits:
    results name the digest, and `experiments.evaluate.fp_gate` wants the official one.

    Raises:
        CheckpointError: the file is missing, damaged, or of another network.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE if path is None else Path(path)
    path = path.expanduser()
    if not path.is_file():
        raise CheckpointError(f"weights: {path} is missing; get {URL} and give weights=PATH")
    digest = named_digest(path)
    # holds tensors and plain values only; torch-fidelity's own loading would not look
    checkpoints.read_checkpoint(path)
    try:
        return InceptionExtractor(path, digest[:DIGEST_LENGTH]).to(device)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"weights: {path} does not fit Inception: {reason}") from error
