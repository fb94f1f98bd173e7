"""References that samples are compared with, read from what there is.

    | file                                         | fid, sfid       | precision, recall |
    | -------------------------------------------- | --------------- | ----------------- |
    | npz with mu, sigma, mu_s, sigma_s and arr_0  | its statistics  | images in arr_0   |
    | npz with mu, sigma, and mu_s, sigma_s or not | its statistics  | refused           |
    | images: npz with arr_0, PNG folder, shards   | of the images   | the images        |
    | safetensors, a `Reference`                   | its statistics  | its features      |

ADM's `VIRTUAL_imagenet256_labeled.npz` is of the first kind: statistics of the whole training set,
and 10,000 images. Statistics in an npz are of Inception's features.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.evaluate.evaluator import Target
from experiments.evaluate.features import Features, FeatureStream
from experiments.evaluate.frechet import Moments, Statistics, feature_statistics
from experiments.images.image_sets import Images, open_images
from models.weights.checkpoints import CheckpointError
from models.weights.file_kinds import describe_foreign
from ptq.files import DamagedFile, describe_damage, read_tensors, write_tensors
from ptq.types import ConfigError

FORMAT = "ar-ptq reference 1"
# reference images for precision and recall, as many as ADM's reference batch has
MANIFOLD_IMAGES = 10_000
TENSORS = ("mu", "sigma", "mu_s", "sigma_s", "pool")
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # arrays of an npz
Streamer = Callable[[Images], FeatureStream]  # features of an image set


# --- statistics and features of a training set, as a file


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of a whole training set, and features of a part of it.

    Attributes:
        mu, sigma: mean (d,) and covariance (d, d) of `pool`, float64.
        mu_s, sigma_s: mean (s,) and covariance (s, s) of `spatial`, float64.
        pool: features (M, d) of at most 10,000 images for precision and recall, kept as float16.
        extractor: digest of the extractor that made them.
        n: images of the statistics.
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
                found = f"{value.dtype} {tuple(value.shape)}"
                raise ConfigError(f"reference: {name} is {found}, expected {dtype} {shape}")
            if not value.isfinite().all():
                raise ConfigError(f"reference: {name} has values that are not finite")
        if len(self.pool) < 2:
            raise ConfigError(f"reference: pool has {len(self.pool)} images, expected at least 2")

    @classmethod
    def from_features(cls, features: Features, extractor: str) -> Reference:
        """The reference made of features; `pool` keeps 10,000, evenly spaced over the set."""
        n = len(features)
        kept = min(n, MANIFOLD_IMAGES)
        rows = torch.arange(kept) * n // kept  # (kept,)
        mu, sigma = feature_statistics(features.pool)
        mu_s, sigma_s = feature_statistics(features.spatial)
        return cls(mu, sigma, mu_s, sigma_s, features.pool[rows].half(), extractor, n)

    def target(self, origin: Mapping[str, object] | None = None) -> Target:
        """The reference as the evaluator compares with it."""
        return Target(
            pool=(self.mu, self.sigma),
            spatial=(self.mu_s, self.sigma_s),
            manifold=self.pool.float(),
            origin=origin or {},
        )

    def save(self, path: Path) -> None:
        """Write the reference as safetensors; `path` appears complete or not at all."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        metadata = {"format": FORMAT, "extractor": self.extractor, "n": str(self.n)}
        write_tensors(tensors, path, metadata)

    @classmethod
    def load(cls, path: Path, extractor: str) -> Reference:
        """Read a reference that the extractor with this digest made.

        Raises:
            CheckpointError: the file is missing or damaged.
            ConfigError: it is not a reference, or it was made with another extractor.
        """
        try:
            tensors, metadata = read_tensors(path, sealed=False)  # older ones have no digest
        except DamagedFile as error:
            raise CheckpointError(f"reference: {error}") from error
        complete = set(tensors) == set(TENSORS) and {"format", "extractor", "n"} <= set(metadata)
        if not complete or metadata["format"] != FORMAT or not metadata["n"].isdigit():
            raise ConfigError(
                f"reference: {path} is not a file of reference statistics ('{FORMAT}')"
            )
        if metadata["extractor"] != extractor:
            raise ConfigError(
                f"reference: {path} was made with the extractor {metadata['extractor']}, not with "
                f"{extractor}; rebuild it with 'python -m experiments.train_zoo model=reference'"
            )
        return cls(**tensors, extractor=metadata["extractor"], n=int(metadata["n"]))


# --- any reference, as the evaluator compares with it


def load_target(
    path: Path, kind: str, digest: str, dimensions: dict[str, int], size: int, stream: Streamer
) -> Target:
    """The target at a path.

    Args:
        kind: the extractor's short name.
        digest: of the extractor's weights.
        dimensions: length of its `pool` and `spatial`.
        size: side of the samples in pixels.
        stream: features of an image set by this extractor.

    Raises:
        ConfigError, CheckpointError: it is missing, damaged, of another extractor or resolution.
    """
    if path.suffix == ".safetensors":
        reference = Reference.load(path, digest)
        statistics = _statistics_digest(reference.mu, reference.sigma)
        return reference.target(
            {"file": path.name, "images": reference.n, "statistics": statistics}
        )
    arrays = array_names(path) if path.is_file() else []
    if "mu" in arrays and kind == "inception":
        return target_of_statistics(path, arrays, dimensions, size, stream)
    if "mu" in arrays and "arr_0" not in arrays:
        raise ConfigError(
            f"reference: {path} holds statistics of Inception and no images, {kind} needs images"
        )
    return target_of_images(_open_sized(path, size), stream)


def target_of_images(images: Images, stream: Streamer) -> Target:
    """Statistics and `pool` features of n >= 2 images."""
    if images.n < 2:
        raise ConfigError(f"reference: {images.path} holds {images.n} images, expected at least 2")
    pool = Moments()
    spatial = Moments()
    manifold = []  # pool features (B, d) of every chunk
    source = stream(images)
    for chunk in source:
        pool.update(chunk["pool"])
        spatial.update(chunk["spatial"])
        manifold.append(chunk["pool"])
    origin = {"file": images.path.name, "images": images.n, "digest": source.digest}
    return Target(pool.value(), spatial.value(), torch.cat(manifold), origin=origin)


def target_of_statistics(
    path: Path, arrays: list[str], dimensions: dict[str, int], size: int, stream: Streamer
) -> Target:
    """The statistics in an npz, and `pool` features of its images if it has any."""
    statistics: dict[str, Statistics] = {}
    for layer, (mean, covariance) in STATISTICS.items():
        if mean in arrays:
            statistics[layer] = _read_statistics(path, mean, covariance, dimensions[layer])
    lacking = {}
    if "spatial" not in statistics:
        lacking["sfid"] = f"{path.name} holds no mu_s and sigma_s"
    manifold = None
    if "arr_0" in arrays:
        images = _open_sized(path, size)
        manifold = torch.cat([chunk["pool"] for chunk in stream(images)])  # (M, d)
    else:
        reason = f"{path.name} holds statistics only, no images"
        lacking |= {"precision": reason, "recall": reason}
    tensors = [tensor for pair in statistics.values() for tensor in pair]
    origin = {"file": path.name, "statistics": _statistics_digest(*tensors)}
    return Target(statistics["pool"], statistics.get("spatial"), manifold, lacking, origin)


def array_names(path: Path) -> list[str]:
    """Names of the arrays in an npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except Exception as error:  # as above
        reason = describe_foreign(path, "zip") or describe_damage(error)
        raise ConfigError(f"reference: {path} cannot be read as npz ({reason})") from error


def _open_sized(path: Path, size: int) -> Images:
    """The images at a path, which have to be as large as the samples."""
    images = open_images("reference", path)
    if images.size != size:
        raise ConfigError(
            f"reference: {images.path} holds {images.size}-pixel images, "
            f"the samples have {size} pixels"
        )
    return images


def _read_statistics(path: Path, mean: str, covariance: str, length: int) -> Statistics:
    """Mean (d,) and covariance (d, d) in float64, looked over."""
    try:
        with np.load(path) as stored:
            mu = torch.from_numpy(np.asarray(stored[mean], np.float64))
            sigma = torch.from_numpy(np.asarray(stored[covariance], np.float64))
    except Exception as error:  # damaged bytes make the reader fail in any way
        raise CheckpointError(
            f"reference: {path} cannot be read ({describe_damage(error)})"
        ) from error
    for name, value, shape in ((mean, mu, (length,)), (covariance, sigma, (length, length))):
        if tuple(value.shape) != shape:
            raise ConfigError(
                f"reference: {name} of {path} is {tuple(value.shape)}, expected {shape}"
            )
        if not bool(value.isfinite().all()):
            raise ConfigError(f"reference: {name} of {path} has values that are not finite")
    if not torch.allclose(sigma, sigma.T, rtol=1e-5, atol=1e-8):
        raise ConfigError(f"reference: {covariance} of {path} is not symmetric, as a covariance is")
    return mu, sigma


def _statistics_digest(*tensors: Tensor) -> str:
    """sha256 (16 hex digits) over the values of statistics."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
