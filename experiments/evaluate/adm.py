"""What OpenAI's ADM evaluator computes (Dhariwal and Nichol, 2021), on features that arrive in
chunks.

Means and covariances and the Inception score are running sums, so of 50,000 images only the `pool`
features that precision and recall compare are kept. The definitions are those of
`evaluations/evaluator.py` of openai/guided-diffusion, on features in PyTorch:

- fid, sfid: Frechet distance of `pool` and `spatial` to the reference's statistics, covariances
  over N - 1. ADM adds 1e-6 to the diagonals if the square root of the product fails; an eigenvalue
  decomposition does not.
- is_file_order: exp of the mean KL(p(class given image), p(class)), averaged over splits of 5,000
  images in file order, a smaller last one included. Images sorted by class score far too low.
- is: the same after a seeded shuffle, torch-fidelity's; at 50,000 images also its splits. On the
  shipped classifier the splits are ten, as in `experiments.evaluate.small_images`.
- precision, recall: `experiments.evaluate.precision_recall`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from experiments.evaluate.precision_recall import precision_recall
from experiments.evaluate.small_images import SHUFFLE_SEED, SPLITS, frechet_distance
from ptq.types import ConfigError

SPLIT = 5000  # images per split of the Inception score
# pool (B, d), logits (B, classes), spatial (B, s) of consecutive images
Chunk = Mapping[str, Tensor]
Statistics = tuple[Tensor, Tensor]  # mean (d,) and covariance (d, d), float64


class Moments:
    """Running mean and covariance of rows, in float64 (Chan, Golub and LeVeque, 1979)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros(())
        self.scatter = torch.zeros(())

    def update(self, x: Tensor) -> None:
        """Take in rows x (B, d)."""
        x = x.double()
        mean = x.mean(dim=0)
        centred = x - mean
        apart = mean - self.mean
        total = self.n + len(x)
        self.scatter = (
            self.scatter
            + centred.T @ centred
            + torch.outer(apart, apart) * (self.n * len(x) / total)
        )
        self.mean = self.mean + apart * (len(x) / total)
        self.n = total

    def value(self) -> Statistics:
        """Mean (d,) and covariance (d, d) over n - 1 of the n >= 2 rows so far."""
        return self.mean, self.scatter / (self.n - 1)


class ScoreAccumulator:
    """Running Inception score of images whose splits are known beforehand: `split` (N,) numbers
    them from 0."""

    def __init__(self, split: Tensor) -> None:
        self.split = split
        self.seen = 0
        self.count = split.bincount().double()
        self.mass: Tensor | None = None  # summed probabilities (splits, classes)
        # summed negative entropies
        self.entropy = torch.zeros(len(self.count), dtype=torch.float64)

    def update(self, logits: Tensor) -> None:
        """Take in the logits (B, classes) of the next images."""
        logs = logits.double().log_softmax(dim=1)
        p = logs.exp()
        split = self.split[self.seen : self.seen + len(logits)]
        if self.mass is None:
            self.mass = torch.zeros(len(self.count), p.shape[1], dtype=torch.float64)
        self.mass.index_add_(0, split, p)
        self.entropy.index_add_(0, split, (p * logs).sum(dim=1))
        self.seen += len(logits)

    def value(self) -> float:
        """Mean over the splits of exp(mean KL to the split's mean distribution)."""
        q = self.mass / self.count[:, None]
        return (self.entropy / self.count - torch.xlogy(q, q).sum(dim=1)).exp().mean().item()


def number_splits(n: int, size: int | None) -> Tensor:
    """Split (n,) of each place in the order of scoring: `size` consecutive places each, or ten
    equal parts if None."""
    if size is not None:
        return torch.arange(n) // size
    parts = min(SPLITS, n)
    bounds = torch.tensor([i * n // parts for i in range(1, parts)], dtype=torch.int64)
    return torch.searchsorted(bounds, torch.arange(n), right=True)


def shuffle_splits(split: Tensor) -> Tensor:
    """The split (N,) of every image, where `split` (N,) is that of every place after the seeded
    shuffle."""
    order = torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(len(split)))
    return torch.empty_like(split).scatter_(0, order, split)


@dataclass(frozen=True, eq=False)
class Target:
    """What samples are compared with.

    Attributes:
        pool, spatial: statistics; spatial may be None. manifold: `pool` features (M, d) of
            reference images, or None.
        lacking: why a metric cannot be had, by its name.
        origin: what the statistics are of: file, digest, number of images.
    """

    pool: Statistics
    spatial: Statistics | None
    manifold: Tensor | None
    lacking: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Summary:
    """What a pass over the features of N images leaves: statistics, `pool` (N, d), and both
    Inception scores."""

    n: int
    pool: Statistics
    spatial: Statistics
    kept: Tensor
    scores: Mapping[str, float]
    predicted: Tensor  # most probable class (N,)


def summarize_stream(chunks: Iterable[Chunk], n: int, split: int | None = SPLIT) -> Summary:
    """Go once through the features of n >= 2 images in file order.

    Args:
        split: images per split of `is`, None for ten equal splits.

    Raises:
        ConfigError: fewer than two images, another number than n, or features that are not finite.
    """
    if n < 2:
        raise ConfigError(f"samples: {n} images, expected at least 2")
    pool = Moments()
    spatial = Moments()
    seen = 0
    scores = {
        "is": ScoreAccumulator(shuffle_splits(number_splits(n, split))),
        "is_file_order": ScoreAccumulator(number_splits(n, SPLIT)),
    }
    kept = torch.empty(0)
    predicted = torch.empty(n, dtype=torch.int64)
    for chunk in chunks:
        for name, value in chunk.items():
            if not bool(value.isfinite().all()):
                raise ConfigError(
                    f"features: {name} of image {seen} or one of the next is NaN or infinite"
                )
        rows = len(chunk["pool"])
        if seen + rows > n:
            raise ConfigError(f"samples: more than the {n} images expected")
        if not seen:
            kept = torch.empty(n, chunk["pool"].shape[1])
        kept[seen : seen + rows] = chunk["pool"]
        predicted[seen : seen + rows] = chunk["logits"].argmax(dim=1)
        pool.update(chunk["pool"])
        spatial.update(chunk["spatial"])
        for score in scores.values():
            score.update(chunk["logits"])
        seen += rows
    if seen < n:
        raise ConfigError(f"samples: {seen} images, expected {n}")
    found = {name: score.value() for name, score in scores.items()}
    return Summary(n, pool.value(), spatial.value(), kept, found, predicted)


def score_summary(
    samples: Summary,
    target: Target,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> dict[str, float | None]:
    """fid, sfid, is, is_file_order, precision and recall; None where the target lacks what a metric
    needs.

    Args:
        dtype: format of the distances behind precision and recall
            (`experiments.evaluate.precision_recall`).
    """
    precision = None
    recall = None
    if target.manifold is not None:
        precision, recall = precision_recall(samples.kept, target.manifold, dtype, device)
    return {
        "fid": frechet_distance(samples.pool, target.pool, "fid"),
        "sfid": None
        if target.spatial is None
        else frechet_distance(samples.spatial, target.spatial, "sfid"),
        **samples.scores,
        "precision": precision,
        "recall": recall,
    }
