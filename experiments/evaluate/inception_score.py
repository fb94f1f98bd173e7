"""Inception score: exp of the mean KL(p(class given image), p(class)) (Salimans et al., 2016).

It is averaged over splits of the images. Images sorted by class score far too low, so they are
shuffled first, with torch-fidelity's seed. Splits hold 5,000 images each, as ADM's evaluator has
them, or are ten of equal size, torch-fidelity's default; at 50,000 images the two are the same.

The score of logits in memory and that of a stream differ by rounding alone: on 256 images of a
twin in the last digit of float64.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.torchvision_shim import ensure_torchvision

# torch-fidelity's defaults
SPLITS = 10
SHUFFLE_SEED = 2020


def inception_score(logits: Tensor) -> float:
    """Score of logits (N, classes), all at once: ten splits, N of one image if N < 10."""
    ensure_torchvision()
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    splits = min(SPLITS, len(logits))
    score = isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=SHUFFLE_SEED)
    return score[KEY_METRIC_ISC_MEAN]


def number_splits(n: int, size: int | None) -> Tensor:
    """Split (n,) of each place in the order of scoring.

    Args:
        size: consecutive places of a split; None for ten equal parts.
    """
    if size is not None:
        return torch.arange(n) // size
    parts = min(SPLITS, n)
    # (parts - 1,), the places where torch-fidelity cuts
    bounds = torch.tensor([part * n // parts for part in range(1, parts)], dtype=torch.int64)
    return torch.searchsorted(bounds, torch.arange(n), right=True)


def shuffle_splits(split: Tensor) -> Tensor:
    """Split (N,) of every image, from that of every place (N,) after the seeded shuffle."""
    # (N,): place i of the shuffled set has image order[i], as in torch-fidelity
    order = torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(len(split)))
    return torch.empty_like(split).scatter_(0, order, split)


class ScoreAccumulator:
    """Running score of images whose splits are known beforehand.

    Args:
        split: number (N,) of each image's split, from 0.
    """

    def __init__(self, split: Tensor) -> None:
        self.split = split
        self.seen = 0
        self.count = split.bincount().double()  # images (splits,)
        self.mass: Tensor | None = None  # summed probabilities (splits, classes)
        # summed negative entropies (splits,)
        self.entropy = torch.zeros(len(self.count), dtype=torch.float64)

    def update(self, logits: Tensor) -> None:
        """Take in the logits (B, classes) of the next images."""
        log_p = logits.double().log_softmax(dim=1)  # (B, classes)
        p = log_p.exp()
        split = self.split[self.seen : self.seen + len(logits)]  # (B,)
        if self.mass is None:
            self.mass = torch.zeros(len(self.count), p.shape[1], dtype=torch.float64)
        self.mass.index_add_(0, split, p)
        self.entropy.index_add_(0, split, (p * log_p).sum(dim=1))
        self.seen += len(logits)

    def value(self) -> float:
        """Mean over the splits of exp(mean KL to the split's mean distribution)."""
        q = self.mass / self.count[:, None]  # p(class) of each split
        kl = self.entropy / self.count - torch.xlogy(q, q).sum(dim=1)  # (splits,); 0 log 0 is 0
        return kl.exp().mean().item()
