"""What OpenAI's ADM evaluator computes (Dhariwal and Nichol, 2021), on features that stream.

Statistics and Inception scores are running sums, so of 50,000 images only the `pool` features
that precision and recall compare are kept. The definitions are those of
`evaluations/evaluator.py` of openai/guided-diffusion, on features in PyTorch:

- fid, sfid: `frechet.py`.
- is_file_order: the Inception score of splits of 5,000 images in file order, a smaller last one
  included. Images sorted by class score far too low.
- is: the same after a seeded shuffle. On the shipped classifier the splits are ten.
- precision, recall: `precision_recall.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from experiments.evaluate.evaluator import Summary
from experiments.evaluate.frechet import Moments
from experiments.evaluate.inception_score import ScoreAccumulator, number_splits, shuffle_splits
from ptq.types import ConfigError

SPLIT = 5000  # images per split of the Inception score
# pool (B, d), logits (B, classes), spatial (B, s) of consecutive images
Chunk = Mapping[str, Tensor]


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
    scores = {
        "is": ScoreAccumulator(shuffle_splits(number_splits(n, split))),
        "is_file_order": ScoreAccumulator(number_splits(n, SPLIT)),
    }
    manifold = torch.empty(0)  # (n, d) from the first chunk on
    predicted = torch.empty(n, dtype=torch.int64)  # (n,)
    seen = 0
    for chunk in chunks:
        check_finite(chunk, seen)
        rows = slice(seen, seen + len(chunk["pool"]))
        if rows.stop > n:
            raise ConfigError(f"samples: more than the {n} images expected")
        if not seen:
            manifold = torch.empty(n, chunk["pool"].shape[1])
        manifold[rows] = chunk["pool"]
        predicted[rows] = chunk["logits"].argmax(dim=1)
        pool.update(chunk["pool"])
        spatial.update(chunk["spatial"])
        for score in scores.values():
            score.update(chunk["logits"])
        seen = rows.stop
    if seen < n:
        raise ConfigError(f"samples: {seen} images, expected {n}")
    values = {name: score.value() for name, score in scores.items()}
    return Summary(pool.value(), spatial.value(), manifold, values, predicted)


def check_finite(chunk: Chunk, first: int) -> None:
    """Refuse features of NaN or infinity; `first` is the number of the chunk's first image.

    Raises:
        ConfigError: a layer holds one.
    """
    for name, value in chunk.items():
        if not bool(value.isfinite().all()):
            raise ConfigError(
                f"features: {name} of image {first} or one of the next is NaN or infinite"
            )
