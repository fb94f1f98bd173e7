"""FID, sFID, Inception score, precision and recall on features of the shipped classifier, held in
memory.

FID and Inception score come from torch-fidelity's public functions of features, precision and
recall from
`precision_recall.py`. Around them: one pass over the images, explicit reference statistics instead
of torch-fidelity's cache (which does not notice other weights), float64, and the seeded shuffle of
the Inception score, without which images sorted by class score far too low. `adm.py` computes the
same on features that stream.

- fid, sfid: Frechet distance (mu - mu')^2 + tr(S + S' - 2 (S S')^(1/2)) of Gaussians fitted to
  `pool` (Heusel et al., 2017) and to `spatial` (Nash et al., 2021), with covariances over N - 1.
- is: mean over 10 splits of exp(mean KL(p(class given image), p(class))) (Salimans et al., 2016).
- precision: share of generated images inside the reference's manifold; recall: share of reference
  images inside the generated images' manifold (Kynkaanniemi et al., 2019). Balls reach to the 3rd
  other point.

All but precision depend on the number of images, so compare equal numbers only: with few images fid
and sfid come out too high and is too low. Fewer images than dimensions (128; 448) leave the
covariance singular, which is no error.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from experiments.evaluate.extractors.fashion import LAYERS, SIZE, ClassifierExtractor
from experiments.evaluate.precision_recall import precision_recall
from models.torchvision_shim import ensure_torchvision
from models.weights import checkpoints
from ptq.types import ConfigError

ensure_torchvision()
from torch_fidelity.metric_fid import (  # noqa: E402
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric  # noqa: E402

# torch-fidelity's defaults
SPLITS = 10
SHUFFLE_SEED = 2020
# reference images for precision and recall, as many as ADM's reference batch has
MANIFOLD_IMAGES = 10_000
_FORMAT = "ar-ptq reference 1"


@dataclass(frozen=True, eq=False)
class Features:
    """Features of N >= 2 images: pool (N, d), logits (N, classes), spatial (N, s), finite float32
    on the CPU."""

    pool: Tensor
    logits: Tensor
    spatial: Tensor

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value.dtype != torch.float32 or value.ndim != 2 or len(value) != len(self.pool):
                raise ConfigError(
                    f"features: {field.name} is {value.dtype} {tuple(value.shape)}, expected torch.float32 (N, d) with "
                    f"N = {len(self.pool)}"
                )
            if not value.isfinite().all():
                raise ConfigError(f"features: {field.name} has values that are not finite")
        if len(self.pool) < 2:
            raise ConfigError(f"features: {len(self.pool)} images, expected at least 2")

    def __len__(self) -> int:
        return len(self.pool)


@torch.no_grad()
def extract_features(
    images: Tensor,
    extractor: ClassifierExtractor,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Features:
    """Features of uint8 images (N, 3, 32, 32), `batch_size` at a time on `device`.

    Raises:
        ConfigError: the images have another type or shape, or there are fewer than two.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
        raise ConfigError(
            f"images: {images.dtype} {tuple(images.shape)} is not torch.uint8 (N, 3, {SIZE}, {SIZE})"
        )
    if len(images) < 2:
        raise ConfigError(f"images: {len(images)} images, expected at least 2")
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size} is not a positive number")
    if set(extractor.features_list) != set(LAYERS):
        raise ConfigError(
            f"extractor: gives {', '.join(extractor.features_list)}, expected {', '.join(LAYERS)}"
        )
    extractor.to(device).eval()
    layers: dict[str, list[Tensor]] = {}
    with tqdm(
        total=len(images), desc="features", unit="img", disable=not progress, leave=False
    ) as bar:
        for batch in images.split(batch_size):
            for name, value in extractor.convert_features_tuple_to_dict(
                extractor(batch.to(device))
            ).items():
                layers.setdefault(name, []).append(value.float().cpu())
            bar.update(len(batch))
    return Features(**{name: torch.cat(parts) for name, parts in layers.items()})


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of features (N, d), in float64."""
    found = fid_features_to_statistics(features.double())
    return torch.from_numpy(found["mu"]), torch.from_numpy(found["sigma"])


@dataclass(frozen=True, eq=False)
class Reference:
    """What generated images are compared with: statistics of the whole training set, and features
    of a part of it.

    Attributes:
        mu, sigma: mean (128,) and covariance (128, 128) of `pool`, float64.
        mu_s, sigma_s: mean (448,) and covariance (448, 448) of `spatial`, float64.
        pool: features (M, 128) of at most 10,000 images for precision and recall, kept as float16.
        extractor: digest of the extractor that made them (`ClassifierExtractor.digest`). n: images
            of the statistics.
    """

    mu: Tensor
    sigma: Tensor
    mu_s: Tensor
    sigma_s: Tensor
    pool: Tensor
    extractor: str
    n: int

    def __post_init__(self) -> None:
        d = self.mu.numel()
        s = self.mu_s.numel()
        expected = {
            "mu": ((d,), torch.float64),
            "sigma": ((d, d), torch.float64),
            "mu_s": ((s,), torch.float64),
            "sigma_s": ((s, s), torch.float64),
            "pool": ((len(self.pool), d), torch.float16),
        }
        for name, (shape, dtype) in expected.items():
            value = getattr(self, name)
            if tuple(value.shape) != shape or value.dtype != dtype:
                raise ConfigError(
                    f"reference: {name} is {value.dtype} {tuple(value.shape)}, expected {dtype} {shape}"
                )
            if not value.isfinite().all():
                raise ConfigError(f"reference: {name} has values that are not finite")
        if len(self.pool) < 2:
            raise ConfigError(f"reference: pool has {len(self.pool)} images, expected at least 2")

    @classmethod
    def build(
        cls,
        images: Tensor,
        extractor: ClassifierExtractor,
        batch_size: int = 256,
        device: str | torch.device = "cpu",
        progress: bool = False,
    ) -> Reference:
        """The reference made of uint8 images (N, 3, 32, 32), normally the whole training set."""
        return cls.of(
            extract_features(images, extractor, batch_size, device, progress), extractor.digest
        )

    @classmethod
    def of(cls, features: Features, extractor: str) -> Reference:
        """The reference made of features; `pool` keeps 10,000 of them, evenly spaced over the
        set."""
        n = len(features)
        kept = torch.arange(min(n, MANIFOLD_IMAGES)) * n // min(n, MANIFOLD_IMAGES)
        mu, sigma = feature_statistics(features.pool)
        mu_s, sigma_s = feature_statistics(features.spatial)
        return cls(mu, sigma, mu_s, sigma_s, features.pool[kept].half(), extractor, n)

    def save(self, path: str | Path) -> None:
        """Write the reference as safetensors; `path` appears complete or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        metadata = {"format": _FORMAT, "extractor": self.extractor, "n": str(self.n)}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, metadata)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, extractor: str) -> Reference:
        """Read a reference that the extractor with this digest made.

        Raises:
            CheckpointError: the file is missing or damaged.
            ConfigError: it is not a reference, or it was made with another extractor.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise checkpoints.CheckpointError(
                f"reference: {path} cannot be read ({error})"
            ) from error
        complete = set(tensors) == set(_TENSORS) and {"format", "extractor", "n"} <= set(metadata)
        if not complete or metadata["format"] != _FORMAT or not metadata["n"].isdigit():
            raise ConfigError(
                f"reference: {path} is not a file of reference statistics ('{_FORMAT}')"
            )
        if metadata["extractor"] != extractor:
            raise ConfigError(
                f"reference: {path} was made with the extractor {metadata['extractor']}, not with {extractor}; rebuild "
                "it with 'python -m experiments.train_zoo model=reference'"
            )
        return cls(**tensors, extractor=metadata["extractor"], n=int(metadata["n"]))


_TENSORS = ("mu", "sigma", "mu_s", "sigma_s", "pool")


def frechet_distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], name: str) -> float:
    """Frechet distance of two (mean, covariance) pairs; rounding below zero is cut off.

    Raises:
        ConfigError: the numbers of features differ; `name` is the metric's.
    """
    if one[0].shape != other[0].shape:
        raise ConfigError(
            f"{name}: {len(one[0])} features against {len(other[0])}, expected equal numbers"
        )
    first, second = ({"mu": mu.numpy(), "sigma": sigma.numpy()} for mu, sigma in (one, other))
    return max(0.0, fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID])


def pool_distance(a: Features, b: Features) -> float:
    """Frechet distance of the `pool` features of two image sets: fid2fp for quantized against
    full-precision images."""
    return frechet_distance(feature_statistics(a.pool), feature_statistics(b.pool), "fid")


def inception_score(logits: Tensor) -> float:
    """Inception score of logits (N, classes): mean over 10 splits after a seeded shuffle, N splits
    of one if N < 10."""
    found = isc_features_to_metric(
        logits, splits=min(SPLITS, len(logits)), shuffle=True, rng_seed=SHUFFLE_SEED
    )
    return found[KEY_METRIC_ISC_MEAN]


def image_metrics(features: Features, reference: Reference) -> dict[str, float]:
    """fid, sfid, is, precision and recall of generated images against the training set."""
    precision, recall = precision_recall(features.pool, reference.pool)
    return {
        "fid": frechet_distance(
            feature_statistics(features.pool), (reference.mu, reference.sigma), "fid"
        ),
        "sfid": frechet_distance(
            feature_statistics(features.spatial), (reference.mu_s, reference.sigma_s), "sfid"
        ),
        "is": inception_score(features.logits),
        "precision": precision,
        "recall": recall,
    }
