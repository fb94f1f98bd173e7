"""The one evaluator: figures of a set of samples, from what a pass over their features leaves.

    | metric            | of                                          | defined in            |
    | ----------------- | ------------------------------------------- | --------------------- |
    | fid, sfid         | statistics of `pool`, `spatial`; a target's | `frechet.py`          |
    | is, is_file_order | `logits`                                    | `inception_score.py`  |
    | precision, recall | `pool`; a target's images                   | `precision_recall.py` |
    | agreement         | the most probable classes; known ones       | here                  |

Two front ends make the `Summary`; figures are formed from it here alone:

- `adm.py`: features that stream, of `experiments.evaluate`. Of 50,000 images only `pool` is kept.
- `small_images.py`: features in memory, of a twin's run (its metrics.json).

They differ in what the order of floating-point sums leaves in the last digits of statistics and
Inception score (`frechet.py` and `inception_score.py` say how much). Figures of a run have to stay
the same bits, so each front end keeps its own sums. By default precision and recall compare
distances in float32 in the first, float64 in the second.

All but precision depend on the number of images, so compare equal numbers only: with few images
fid and sfid come out too high and is too low. Fewer images than dimensions leave the covariance
singular, which is no error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from experiments.evaluate.frechet import Statistics, frechet_distance
from experiments.evaluate.precision_recall import precision_recall


@dataclass(frozen=True, eq=False)
class Summary:
    """What a pass over the features of N samples leaves.

    Attributes:
        pool, spatial: statistics of the two layers.
        manifold: `pool` features (N, d).
        scores: Inception scores by metric.
        predicted: most probable class (N,).
    """

    pool: Statistics
    spatial: Statistics
    manifold: Tensor
    scores: Mapping[str, float]
    predicted: Tensor


@dataclass(frozen=True, eq=False)
class Target:
    """What samples are compared with.

    Attributes:
        pool, spatial: statistics of the two layers; `spatial` may be None.
        manifold: `pool` features (M, d) of reference images, or None.
        lacking: why a metric cannot be computed, by its name.
        origin: what the statistics are of: file, digest, number of images.
    """

    pool: Statistics
    spatial: Statistics | None
    manifold: Tensor | None
    lacking: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, object] = field(default_factory=dict)


def score_summary(
    samples: Summary,
    target: Target,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> dict[str, float | None]:
    """fid, sfid, Inception scores, precision and recall; None where the target lacks the data.

    Args:
        dtype: format of the distances behind precision and recall (`precision_recall.py`).

    Raises:
        ConfigError: the numbers of features differ.
    """
    precision = None
    recall = None
    if target.manifold is not None:
        precision, recall = precision_recall(samples.manifold, target.manifold, dtype, device)
    sfid = None
    if target.spatial is not None:
        sfid = frechet_distance(samples.spatial, target.spatial, "sfid")
    return {
        "fid": frechet_distance(samples.pool, target.pool, "fid"),
        "sfid": sfid,
        **samples.scores,
        "precision": precision,
        "recall": recall,
    }


def class_agreement(predicted: Tensor, labels: Tensor) -> float:
    """Share of images whose most probable class (N,) is the one asked for (N,)."""
    return (predicted == labels).double().mean().item()
