"""The metrics of a twin's run: features of the shipped classifier, all in memory.

FID and Inception score come from torch-fidelity's public functions of features. Around them: one
pass over the images, explicit reference statistics instead of torch-fidelity's cache (which does
not notice other weights), and float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.evaluate.evaluator import Summary, Target, score_summary
from experiments.evaluate.extractors.base import Extractor
from experiments.evaluate.features import Features, extract_layers
from experiments.evaluate.frechet import feature_statistics, frechet_distance
from experiments.evaluate.inception_score import inception_score
from experiments.evaluate.references import Reference
from ptq.types import ConfigError


def extract_features(
    images: Tensor,
    extractor: Extractor,
    batch: int = 256,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Features:
    """Features of uint8 images (N, 3, S, S), `batch` at a time on the extractor's `device`.

    Raises:
        ConfigError: the images have another type or shape, or there are fewer than two.
    """
    # an extractor that resizes takes any
    side = extractor.image_size or images.shape[-1]
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, side, side):
        found = f"{images.dtype} {tuple(images.shape)}"
        raise ConfigError(f"images: {found} is not torch.uint8 (N, 3, {side}, {side})")
    if len(images) < 2:
        raise ConfigError(f"images: {len(images)} images, expected at least 2")
    if batch < 1:
        raise ConfigError(f"batch: {batch} is not a positive number")
    # committed results were measured on a GPU with TF32, cuDNN's default
    layers = extract_layers(images, extractor, batch, device, tf32=True, progress=progress)
    return Features(**layers)


def summarize_features(features: Features) -> Summary:
    """What the evaluator reads of features in memory."""
    return Summary(
        pool=feature_statistics(features.pool),
        spatial=feature_statistics(features.spatial),
        manifold=features.pool,
        scores={"is": inception_score(features.logits)},
        predicted=features.logits.argmax(dim=1),
    )


def image_metrics(features: Features, target: Target) -> dict[str, float | None]:
    """fid, sfid, is, precision and recall of generated images against real ones."""
    return score_summary(summarize_features(features), target, torch.float64)


def pool_distance(one: Features, other: Features) -> float:
    """Frechet distance of the `pool` features of two sets.

    Of quantized against full-precision images it is fid2fp.
    """
    return frechet_distance(feature_statistics(one.pool), feature_statistics(other.pool), "fid")


def make_reference(
    images: Tensor,
    extractor: Extractor,
    batch: int = 256,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Reference:
    """The reference made of uint8 images (N, 3, 32, 32), normally the whole training set."""
    features = extract_features(images, extractor, batch, device, progress)
    return Reference.from_features(features, extractor.digest)
