"""Image metrics of features in memory, against NumPy and SciPy on made-up features."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from experiments.evaluate.features import Features
from experiments.evaluate.frechet import feature_statistics
from experiments.evaluate.inception_score import inception_score
from experiments.evaluate.precision_recall import precision_recall
from experiments.evaluate.references import Reference
from experiments.evaluate.small_images import image_metrics, pool_distance
from ptq.types import ConfigError
from tests.experiments.evaluate.evaluations import made_up_features
from tests.experiments.evaluate.numpy_figures import (
    feature_frechet,
    numpy_inception_score,
    share_inside,
    shuffle_logits,
)
from tests.reference import made_up


def test_image_metrics_against_numpy() -> None:
    real = made_up_features("real", 250)
    fake = made_up_features("fake", 203, 0.3)
    found = image_metrics(fake, Reference.from_features(real, "x").target())
    stored = real.pool.half().double().numpy()
    tenths = [part * 203 // 10 for part in range(1, 11)]
    expected = {
        "fid": feature_frechet(fake.pool, real.pool),
        "sfid": feature_frechet(fake.spatial, real.spatial),
        "is": numpy_inception_score(shuffle_logits(fake.logits.numpy()), tenths),
        "precision": share_inside(fake.pool.double().numpy(), stored),
        "recall": share_inside(stored, fake.pool.double().numpy()),
    }
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-6)
    assert 0 < expected["precision"] < 1
    assert 0 < expected["recall"] < 1
    assert expected["precision"] != expected["recall"]
    assert pool_distance(fake, real) == pytest.approx(expected["fid"], rel=1e-6)


def test_identical_sets() -> None:
    real = made_up_features("real", 300)
    found = image_metrics(real, Reference.from_features(real, "x").target())
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
        made_up_features("fake", n),
        Reference.from_features(made_up_features("real", 50), "x").target(),
    )
    assert all(np.isfinite(value) for value in found.values())
    found = image_metrics(
        made_up_features("fake", 50),
        Reference.from_features(made_up_features("real", n), "x").target(),
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
        feature_frechet(fake.pool, real.pool), rel=1e-4
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
        image_metrics(other, Reference.from_features(made_up_features("fake", 5), "x").target())
