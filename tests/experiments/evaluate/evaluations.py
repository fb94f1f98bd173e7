"""What the tests of `experiments.evaluate` share: a quick extractor, samples with a reference, and
the command."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.evaluate import __main__ as evaluate
from experiments.evaluate.__main__ import Options
from tests.reference import made_up, made_up_ints

LAYERS = {"pool": 12, "logits": 10, "spatial": 20}


class Linear:
    """An extractor whose layers are linear in the pixels: as quick as it gets. Counts the images it
    has seen."""

    image_size: int | None = None

    def __init__(self, digest: str = "6726825d00000000") -> None:
        self.digest = digest
        self.seen = 0

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        self.seen += len(images)
        x = images.float().flatten(1) / 127.5 - 1
        return tuple(
            x @ made_up(name, (x.shape[1], d)) / x.shape[1] ** 0.5 for name, d in LAYERS.items()
        )

    def convert_features_tuple_to_dict(self, found: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(LAYERS, found))


def pictures(n: int, salt: str = "", size: int = 8) -> np.ndarray:
    return made_up_ints("pictures", (n, 3, size, size), 256, salt).byte().numpy()


def save(path: Path, images: np.ndarray, **more: np.ndarray) -> Path:
    np.savez(path, arr_0=images.transpose(0, 2, 3, 1), **more)
    return path


def moments(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return x.double().numpy().mean(0), np.cov(x.double().numpy().T)


class Case:
    """Samples and an ADM reference batch: statistics of a training set, and ten of its images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.net = Linear()
        self.images = pictures(40)
        self.training = pictures(60, "training")
        self.of_images, self.of_training = self.features(self.images), self.features(self.training)
        self.mu, self.sigma = moments(self.of_training["pool"])
        self.mu_s, self.sigma_s = moments(self.of_training["spatial"])
        self.samples = save(folder / "samples.npz", self.images)

    def features(self, images: np.ndarray) -> dict[str, Tensor]:
        return self.net.convert_features_tuple_to_dict(self.net(torch.from_numpy(images)))

    def reference(self, *names: str, **changed: np.ndarray) -> Path:
        """An npz of the named statistics, or of all of them and ten images."""
        whole = {
            "mu": self.mu,
            "sigma": self.sigma,
            "mu_s": self.mu_s,
            "sigma_s": self.sigma_s,
        } | changed
        path = self.folder / "reference.npz"
        if names:
            np.savez(path, **{name: whole[name] for name in names})
            return path
        return save(path, self.training[:10], **whole)

    def run(self, **options: object) -> dict:
        defaults = {
            "samples": str(self.samples),
            "cache": str(self.folder / "cache"),
            "device": "cpu",
        }
        return evaluate.evaluate_samples(
            Options(
                **(
                    defaults
                    | {
                        k: v if v is None else str(v) if isinstance(v, Path) else v
                        for k, v in options.items()
                    }
                )
            )
        )


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    evaluate.main()
