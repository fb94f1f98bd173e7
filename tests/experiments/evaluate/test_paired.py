"""Figures of image pairs, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.evaluate.extractors import fashion
from experiments.evaluate.extractors.fashion import ClassifierExtractor, as_input
from experiments.evaluate.paired import compare_images, image_psnr, paired_distance, token_agreement
from models.registry import ZOO
from ptq.types import ConfigError
from tests.reference import made_up, made_up_ints


def images(n: int, salt: str = "") -> Tensor:
    return made_up_ints("images", (n, 3, 32, 32), 256, salt).byte()


def noisy(x: Tensor, deviation: float) -> Tensor:
    return (x + deviation * made_up("noise", tuple(x.shape))).clamp(0, 255).round().byte()


@pytest.fixture(scope="module")
def net() -> ClassifierExtractor:
    return fashion.load_classifier(ZOO / "extractor.safetensors")


def test_psnr() -> None:
    a = images(5)
    b = images(5, "other")
    error = ((a.numpy().astype(float) - b.numpy().astype(float)) ** 2).mean(axis=(1, 2, 3))
    assert image_psnr(a, b).numpy() == pytest.approx(10 * np.log10(255**2 / error), rel=1e-12)
    black = torch.zeros(1, 3, 4, 4).byte()
    white = torch.full((1, 3, 4, 4), 255).byte()
    assert image_psnr(black, white).item() == 0
    assert image_psnr(a, a).tolist() == pytest.approx(5 * [10 * np.log10(255**2 * 12)])


def test_paired_distance(net: ClassifierExtractor) -> None:
    a = images(4)
    b = noisy(images(4), 20)
    expected = np.zeros(4)
    for map_a, map_b in zip(net.net.maps(as_input(a)), net.net.maps(as_input(b))):
        u = map_a.double().numpy()
        v = map_b.double().numpy()
        norm_u = np.linalg.norm(u, axis=1)
        norm_v = np.linalg.norm(v, axis=1)
        cosine = (u * v).sum(1) / np.maximum(norm_u * norm_v, 1e-300)
        # a vector of zeros has no direction: its distance to any other is 1, to another zero 0
        both = (norm_u > 0) & (norm_v > 0)
        one = (norm_u > 0) ^ (norm_v > 0)
        expected += (both * (2 - 2 * cosine) + one).mean((1, 2)) / 4
    assert paired_distance(a, b, net).numpy() == pytest.approx(expected, rel=1e-6)
    assert paired_distance(a, a, net).tolist() == [0, 0, 0, 0]


def test_paired_distance_grows_with_the_noise(net: ClassifierExtractor) -> None:
    a = images(6)
    little = paired_distance(a, noisy(a, 2), net).mean()
    more = paired_distance(a, noisy(a, 8), net).mean()
    most = paired_distance(a, noisy(a, 30), net).mean()
    assert 0 < little < more < most < 2


def test_the_maps_are_those_of_the_features(net: ClassifierExtractor) -> None:
    x = as_input(images(3))
    maps = net.net.maps(x)
    middle, pooled, _ = net.net(x)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (32, 32, 32),
        (32, 16, 16),
        (64, 8, 8),
        (128, 4, 4),
    ]
    assert torch.equal(maps[2], middle)
    assert torch.equal(maps[3].mean((2, 3)), pooled)


def test_token_agreement() -> None:
    a = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert token_agreement(a, a) == 1
    assert token_agreement(a, a + (a > 6)) == 0.75
    assert token_agreement(None, None) is None
    assert token_agreement(a, None) is None  # images of a run before tokens were kept
    with pytest.raises(ConfigError, match=r"tokens: \(2, 4\) against \(2, 3\)"):
        token_agreement(a, a[:, :3])


def test_means_over_all_pairs_however_they_come(net: ClassifierExtractor) -> None:
    a = images(7)
    b = noisy(images(7), 15)
    whole = compare_images([a.numpy()], [b.numpy()], net)
    assert whole["psnr"] == pytest.approx(image_psnr(a, b).mean().item())
    assert whole["paired_distance"] == pytest.approx(
        paired_distance(a, b, net).mean().item(), rel=1e-6
    )
    cut = compare_images(np.split(a.numpy(), [3, 5]), np.split(b.numpy(), [3, 5]), net)
    assert cut == pytest.approx(whole, rel=1e-6)
    assert compare_images([a.numpy()], [b.numpy()])["paired_distance"] is None


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([4, 3], [4]),
        ([4], [4, 3]),
        ([4], [3]),
        ([], []),
    ],
)
def test_unequal_numbers_are_refused(ours: list[int], theirs: list[int]) -> None:
    with pytest.raises(ConfigError, match="^fp: "):
        compare_images([images(n).numpy() for n in ours], [images(n).numpy() for n in theirs])
