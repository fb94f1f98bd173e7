"""References that samples are compared with, read from what there is.

    | file                                                  | fid, sfid                  | precision, recall |
    | npz with mu, sigma, mu_s, sigma_s, arr_0 (ADM's)      | its statistics (Inception) | images in arr_0   |
    | npz with mu, sigma and maybe mu_s, sigma_s alone      | its statistics (Inception) | refused           |
    | images: npz with arr_0 alone, PNG folder, shards      | statistics of the images   | the images        |
    | safetensors of `small_images.Reference`        | its statistics             | its features      |

`VIRTUAL_imagenet256_labeled.npz` is of the first kind: statistics of the whole training set, 10,000
images.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.evaluate.adm import Moments, Statistics, Target
from experiments.evaluate.features import Stream
from experiments.evaluate.small_images import Reference
from experiments.images.image_sets import Images, open_images
from models.weights.checkpoints import CheckpointError
from ptq.types import ConfigError

STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
Streamer = Callable[[Images], Stream]


def load_target(
    path: Path, kind: str, digest: str, dimensions: dict[str, int], size: int, stream: Streamer
) -> Target:
    """The target at a path.

    Args:
        kind, digest: the extractor's short name and weights. dimensions: length of its `pool` and
            `spatial`.
        size: side of the samples in pixels. stream: features of an image set by this extractor.

    Raises:
        ConfigError, CheckpointError: it is missing, damaged, of another extractor or resolution.
    """
    if path.suffix == ".safetensors":
        found = Reference.load(path, digest)
        origin = {
            "file": path.name,
            "images": found.n,
            "statistics": _statistics_digest(found.mu, found.sigma),
        }
        return Target(
            (found.mu, found.sigma), (found.mu_s, found.sigma_s), found.pool.float(), origin=origin
        )
    names = _array_names(path) if path.is_file() else []
    if "mu" in names and kind == "inception":
        return target_of_statistics(path, names, dimensions, size, stream)
    if "mu" in names and "arr_0" not in names:
        raise ConfigError(
            f"reference: {path} holds statistics of Inception and no images, {kind} needs images"
        )
    return target_of_images(_same_size(open_images("reference", path), size), stream)


def target_of_images(images: Images, stream: Streamer) -> Target:
    """Statistics and `pool` features of n >= 2 images."""
    if images.n < 2:
        raise ConfigError(f"reference: {images.path} holds {images.n} images, expected at least 2")
    pool = Moments()
    spatial = Moments()
    kept = []
    source = stream(images)
    for chunk in source:
        pool.update(chunk["pool"])
        spatial.update(chunk["spatial"])
        kept.append(chunk["pool"])
    origin = {"file": images.path.name, "images": images.n, "digest": source.digest}
    return Target(pool.value(), spatial.value(), torch.cat(kept), origin=origin)


def target_of_statistics(
    path: Path, names: list[str], dimensions: dict[str, int], size: int, stream: Streamer
) -> Target:
    """The statistics in an npz, and `pool` features of its images if it has any."""
    found: dict[str, Statistics] = {}
    for layer, (mean, covariance) in STATISTICS.items():
        if mean in names:
            found[layer] = _read_statistics(path, mean, covariance, dimensions[layer])
    lacking = {}
    manifold = None
    if "spatial" not in found:
        lacking["sfid"] = f"{path.name} holds no mu_s and sigma_s"
    if "arr_0" in names:
        images = _same_size(open_images("reference", path), size)
        manifold = torch.cat([chunk["pool"] for chunk in stream(images)])
    else:
        lacking |= dict.fromkeys(
            ("precision", "recall"), f"{path.name} holds statistics only, no images"
        )
    origin = {
        "file": path.name,
        "statistics": _statistics_digest(*(t for pair in found.values() for t in pair)),
    }
    return Target(found["pool"], found.get("spatial"), manifold, lacking, origin)


def _array_names(path: Path) -> list[str]:
    """Names of the arrays in an npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise ConfigError(f"reference: {path} cannot be read as npz ({error})") from error


def _same_size(images: Images, size: int) -> Images:
    if images.size != size:
        raise ConfigError(
            f"reference: {images.path} holds {images.size}-pixel images, the samples have {size} pixels"
        )
    return images


def _read_statistics(path: Path, mean: str, covariance: str, length: int) -> Statistics:
    """Mean (d,) and covariance (d, d) in float64, looked over."""
    try:
        with np.load(path) as stored:
            mu, sigma = (
                torch.from_numpy(np.asarray(stored[name], np.float64))
                for name in (mean, covariance)
            )
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, OSError) as error:
        raise CheckpointError(
            f"reference: {path} cannot be read ({' '.join(str(error).split())})"
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
