"""The evaluator's definitions once more and independently, in NumPy and SciPy."""

from __future__ import annotations

import numpy as np
from scipy.linalg import sqrtm
from torch import Tensor

NumpyStatistics = tuple[np.ndarray, np.ndarray]  # mean (d,) and covariance (d, d)


def numpy_statistics(features: Tensor) -> NumpyStatistics:
    rows = features.double().numpy()
    return rows.mean(0), np.cov(rows.T)


def numpy_frechet(one: NumpyStatistics, other: NumpyStatistics) -> float:
    mean_one, covariance_one = one
    mean_other, covariance_other = other
    root = sqrtm(covariance_one @ covariance_other).real
    distance = ((mean_one - mean_other) ** 2).sum()
    return float(distance + np.trace(covariance_one + covariance_other - 2 * root))


def feature_frechet(one: Tensor, other: Tensor) -> float:
    """Frechet distance of two sets of features (N, d)."""
    return numpy_frechet(numpy_statistics(one), numpy_statistics(other))


def numpy_inception_score(logits: np.ndarray, bounds: list[int]) -> float:
    """Inception score of logits (N, classes), with splits that end at `bounds`."""
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    scores = []
    start = 0
    for end in bounds:
        split = p[start:end]
        divergence = (split * np.log(split / split.mean(0))).sum(1)
        scores.append(np.exp(divergence.mean()))
        start = end
    return float(np.mean(scores))


def shuffle_logits(logits: np.ndarray) -> np.ndarray:
    """The order in which torch-fidelity scores."""
    return logits[np.random.RandomState(2020).permutation(len(logits))]


def share_inside(points: np.ndarray, manifold: np.ndarray, k: int = 3) -> float:
    """Share of points in a ball around a point of the manifold, reaching to its k-th other one."""
    between = np.linalg.norm(manifold[:, None] - manifold[None], axis=2)
    radius = np.sort(between, axis=1)[:, k]
    distance = np.linalg.norm(points[:, None] - manifold[None], axis=2)
    return float((distance <= radius).any(1).mean())
