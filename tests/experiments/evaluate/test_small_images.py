"""Image metrics of features in memory, against NumPy and SciPy on made-up features."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from experiments.evaluate.features import Features
from experiments.evaluate.frechet import feature_statistics
from experiments.evaluate.inception_score import inception_score
from experiments.evaluate.precision_recall import precision_recall
from experiments.evaluate.references import Reference
from experiments.evaluate.small_images import (
    image_metrics,
    pool_distance,
)
from ptq.types import ConfigError
from tests.experiments.evaluate.evaluations import (
    made_up_features,
)
from tests.reference import made_up

# --- the definitions, once more and independently


def numpy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    a = a.astype(np.float64)
    b = b.astype(np.float64)
    s = np.cov(a.T)
    t = np.cov(b.T)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real))


def numpy_inception_score(logits: np.ndarray, splits: int) -> float:
    logits = logits.astype(np.float64)[np.random.RandomState(2020).permutation(len(logits))]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    bounds = [i * len(p) // splits for i in range(splits + 1)]
    chunks = [p[a:b] for a, b in zip(bounds, bounds[1:])]
    return float(np.mean([np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in chunks]))


def inside(points: np.ndarray, manifold: np.ndarray, k: int = 3) -> float:
    """Share of the points in a ball around some point of the manifold that reaches to its k-th
    other point."""
    distance = np.linalg.norm(manifold[:, None] - manifold[None], axis=2)
    radius = np.sort(distance, axis=1)[:, k]
    return float((np.linalg.norm(points[:, None] - manifold[None], axis=2) <= radius).any(1).mean())


def test_image_metrics_against_numpy() -> None:
    real = made_up_features("real", 250)
    fake = made_up_features("fake", 203, 0.3)
    found = image_metrics(fake, Reference.from_features(real, "x"))
    stored = real.pool.half().double().numpy()
    expected = {
        "fid": numpy_frechet(fake.pool.numpy(), real.pool.numpy()),
        "sfid": numpy_frechet(fake.spatial.numpy(), real.spatial.numpy()),
        "is": numpy_inception_score(fake.logits.numpy(), 10),
        "precision": inside(fake.pool.double().numpy(), stored),
        "recall": inside(stored, fake.pool.double().numpy()),
    }
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-6)
    assert 0 < expected["precision"] < 1
    assert 0 < expected["recall"] < 1
    assert expected["precision"] != expected["recall"]
    assert pool_distance(fake, real) == pytest.approx(expected["fid"], rel=1e-6)


def test_identical_sets() -> None:
    real = made_up_features("real", 300)
    found = image_metrics(real, Reference.from_features(real, "x"))
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert found["sfid"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"]) == (1, 1)
    assert pool_distance(real, real) == pytest.approx(0, abs=1e-6)


def test_direction_of_precision_and_recall() -> None:
    """One of two real modes generated: precise, but not everything recalled. The converse for a
    surplus mode."""
    near = made_up("near", (200, 12))
    far = made_up("far", (200, 12)) + 100
    both = torch.cat((near, far))
    assert precision_recall(near, both) == (1.0, 0.5)
    assert precision_recall(both, near) == (0.5, 1.0)


def test_inception_score_does_not_depend_on_classes_coming_in_order() -> None:
    classes = torch.arange(1000) * 10 // 1000
    score = inception_score(40.0 * torch.nn.functional.one_hot(classes, 10))
    assert 9 < score <= 10  # unshuffled, every split would hold one class and the score would be 1


@pytest.mark.parametrize("n", [2, 3, 4, 9, 11])
def test_few_images(n: int) -> None:
    found = image_metrics(
        made_up_features("fake", n), Reference.from_features(made_up_features("real", 50), "x")
    )
    assert all(np.isfinite(value) for value in found.values())
    found = image_metrics(
        made_up_features("fake", 50), Reference.from_features(made_up_features("real", n), "x")
    )
    assert all(np.isfinite(value) for value in found.values())
    if n < 10:
        # one image per split
        assert inception_score(made_up_features("fake", n).logits) == pytest.approx(1)


def test_fewer_images_than_dimensions() -> None:
    real = made_up_features("real", 8)
    fake = made_up_features("fake", 9, 0.5)
    mu, sigma = feature_statistics(real.pool)
    assert torch.linalg.matrix_rank(sigma) < len(mu)
    assert pool_distance(fake, real) == pytest.approx(
        numpy_frechet(fake.pool.numpy(), real.pool.numpy()), rel=1e-4
    )


BAD = {
    "float64": (
        lambda f: {"pool": f.pool.double()},
        "pool is torch.float64 (9, 12), expected torch.float32",
    ),
    "three dimensions": (
        lambda f: {"spatial": f.spatial[None]},
        "spatial is torch.float32 (1, 9, 20)",
    ),
    "unequal numbers": (
        lambda f: {"logits": f.logits[1:]},
        "logits is torch.float32 (8, 10), expected",
    ),
    "nan": (lambda f: {"logits": f.logits * float("nan")}, "logits has values that are not finite"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_features_are_refused(kind: str) -> None:
    good = made_up_features("fake", 9)
    change, words = BAD[kind]
    with pytest.raises(ConfigError, match=re.escape(words)):
        Features(**(vars(good) | change(good)))


def test_one_image_and_unequal_dimensions_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 images, expected at least 2"):
        made_up_features("fake", 1)
    other = Features(*(torch.zeros(5, 3) for _ in range(3)))
    with pytest.raises(ConfigError, match="fid: 3 features against 12"):
        pool_distance(other, made_up_features("fake", 5))
    with pytest.raises(ConfigError, match="pool: 3 features against 12"):
        image_metrics(other, Reference.from_features(made_up_features("fake", 5), "x"))
