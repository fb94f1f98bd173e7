"""The Inception network of FID (Szegedy et al., 2015, weights of 2015-12-05), through
torch-fidelity.

    | layer   | shape   | what                                                   | read by               |
    | pool    | (2048,) | pool_3                                                 | FID, precision/recall |
    | logits  | (1008,) | pool_3 times the last weight matrix, without bias      | Inception score       |
    | spatial | (2023,) | first 7 channels of mixed_6/conv, 17 x 17 x 7          | sFID                  |

torch-fidelity's network is a conversion of the graph that ADM's evaluator runs, with TensorFlow's
resizing to 299 pixels. `mixed_6/conv` is its `Mixed_6d.branch1x1`. ADM flattens (height, width,
channel), so the reference's statistics fit this order alone. On ADM's own samples others found this
network within 0.002 of FID and 0.15 of Inception score of the graph; it was not measured here.

The weights are torch-fidelity's file; give its path. They are never downloaded here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.evaluate.extractors.fashion import Extractor
from models.torchvision_shim import ensure_torchvision
from models.weights import checkpoints, digests
from models.weights.checkpoints import CheckpointError

ensure_torchvision()
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402

FILE = "weights-inception-2015-12-05-6726825d.pth"
OFFICIAL = "6726825d"  # first digits of the file's sha256
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
LAYERS = {"pool": 2048, "logits": 1008, "spatial": 7 * 17 * 17}  # name: length
_THEIRS = ["2048", "logits_unbiased"]


class InceptionExtractor(Extractor):
    """uint8 (B, 3, S, S) in, a tuple of the requested layers out."""

    def __init__(self, path: Path, digest: str) -> None:
        super().__init__("inception", tuple(LAYERS))
        self.digest = digest
        self.net = FeatureExtractorInceptionV3("inception-v3-compat", _THEIRS, str(path))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        with output_of(self.net.Mixed_6d.branch1x1) as caught:
            pool, logits = self.net(images)
        # (B, 7, 17, 17) -> (B, 17 * 17 * 7)
        spatial = caught[0][:, :7].permute(0, 2, 3, 1).flatten(1)
        return self.chosen(pool, logits, spatial)


@contextmanager
def output_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of a module's calls inside the block."""
    caught: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: caught.append(output))
    try:
        yield caught
    finally:
        handle.remove()


def named_digest(path: Path) -> str:
    """sha256 (64 hex digits) of a weights file whose name ends in its first eight.

    Raises:
        CheckpointError: the file is missing, its name carries no digits, or others than its
            contents have.
    """
    if not path.is_file():
        raise CheckpointError(f"weights: {path} is missing, expected a file such as {FILE}")
    named = re.search(r"-([0-9a-f]{8})\.\w+$", path.name)
    if named is None:
        raise CheckpointError(
            f"weights: {path.name} does not end in the first 8 hex digits of its sha256, as {FILE}"
        )
    found = digests.file_digest(path)
    if not found.startswith(named[1]):
        raise CheckpointError(
            f"weights: {path} has sha256 {found[:8]}..., its name says {named[1]}; it is damaged"
        )
    return found


def load_inception(
    path: str | Path | None, device: str | torch.device = "cpu"
) -> InceptionExtractor:
    """The extractor with the weights of a file, by default the one that torch-fidelity keeps where
    it downloads to.

    Other weights of the same shapes are accepted under a name that carries their own digits:
    results name the digest, and `experiments.evaluate.fp_gate` wants the official one.

    Raises:
        CheckpointError: the file is missing, damaged, or of another network.
    """
    path = (
        Path(torch.hub.get_dir()) / "checkpoints" / FILE
        if path is None
        else Path(path).expanduser()
    )
    if not path.is_file():
        raise CheckpointError(f"weights: {path} is missing; get {URL} and give weights=PATH")
    digest = named_digest(path)
    # holds tensors and plain values only; torch-fidelity's own loading would not look
    checkpoints.read_checkpoint(path)
    try:
        return InceptionExtractor(path, digest[:16]).to(device)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"weights: {path} does not fit Inception: {reason}") from error
