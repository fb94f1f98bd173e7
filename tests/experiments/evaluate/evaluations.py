"""What the tests of `experiments.evaluate` share: a quick extractor, samples, and the command."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from experiments.evaluate import __main__ as evaluate
from experiments.evaluate.command import evaluate_samples
from experiments.evaluate.extractors.fashion import Classifier
from experiments.evaluate.features import Features
from experiments.evaluate.options import Options
from tests.experiments.evaluate.numpy_figures import numpy_statistics
from tests.reference import fill, made_up, made_up_ints

LAYERS = {"pool": 12, "logits": 10, "spatial": 20}


class Linear:
    """An extractor whose layers are linear in the pixels: as quick as it gets.

    Counts the images it has seen.
    """

    image_size: int | None = None

    def __init__(self, digest: str = "6726825d00000000") -> None:
        self.digest = digest
        self.seen = 0

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.seen += len(images)
        x = images.float().flatten(1) / 127.5 - 1  # (B, 3 * S * S)
        pixels = x.shape[1]
        layers = {}
        for name, length in LAYERS.items():
            layers[name] = x @ made_up(name, (pixels, length)) / pixels**0.5
        return layers


def pictures(n: int, salt: str = "", size: int = 8) -> np.ndarray:
    return made_up_ints("pictures", (n, 3, size, size), 256, salt).byte().numpy()


def save_npz(path: Path, images: np.ndarray, **more: np.ndarray) -> Path:
    np.savez(path, arr_0=images.transpose(0, 2, 3, 1), **more)
    return path


def made_up_layers(name: str, n: int, shift: float = 0.0) -> dict[str, Tensor]:
    """Features of n images by layer, of correlated dimensions as many as in LAYERS."""
    layers = {}
    for layer, length in LAYERS.items():
        mix = made_up(f"{layer}:mix", (length, length)) / length**0.5
        scale = 4.0 if layer == "logits" else 1.0
        layers[layer] = made_up(f"{name}:{layer}", (n, length)) @ mix * scale + shift
    return layers


def made_up_features(name: str, n: int, shift: float = 0.0) -> Features:
    """The same, in memory."""
    return Features(**made_up_layers(name, n, shift))


def made_up_images(n: int, salt: str = "") -> Tensor:
    """uint8 images (n, 3, 32, 32), as the shipped classifier takes them."""
    return made_up_ints("images", (n, 3, 32, 32), 256, salt).byte()


def save_classifier(path: Path, salt: str = "") -> Path:
    """Made-up weights of the shipped classifier, in FP16 as they ship."""
    state = fill(Classifier(), salt).state_dict()
    half = {}
    for name, value in state.items():
        half[name] = value.half() if value.is_floating_point() else value
    save_file(half, path)
    return path


class Case:
    """Samples and an ADM reference batch: statistics of a training set, and ten of its images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.net = Linear()
        self.images = pictures(40)
        self.training = pictures(60, "training")
        self.of_images = self.features(self.images)
        self.of_training = self.features(self.training)
        self.mu, self.sigma = numpy_statistics(self.of_training["pool"])
        self.mu_s, self.sigma_s = numpy_statistics(self.of_training["spatial"])
        self.samples = save_npz(folder / "samples.npz", self.images)

    def features(self, images: np.ndarray) -> dict[str, Tensor]:
        return self.net(torch.from_numpy(images))

    def reference(self, *names: str, **changed: np.ndarray) -> Path:
        """An npz of the named statistics, or of all of them and ten images."""
        statistics = {
            "mu": self.mu,
            "sigma": self.sigma,
            "mu_s": self.mu_s,
            "sigma_s": self.sigma_s,
        }
        statistics |= changed
        path = self.folder / "reference.npz"
        if names:
            np.savez(path, **{name: statistics[name] for name in names})
            return path
        return save_npz(path, self.training[:10], **statistics)

    def run(self, **options: object) -> dict:
        """The result of an evaluation of these samples, unless others are named."""
        values: dict[str, object] = {
            "samples": self.samples,
            "cache": self.folder / "cache",
            "device": "cpu",
        }
        values |= options
        for name, value in values.items():
            if isinstance(value, Path):
                values[name] = str(value)
        return evaluate_samples(Options(**values))


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    evaluate.main()
