"""How far images are from the full-precision model's of the same seeds, pair by pair.

No reference set is needed.

- psnr: mean over pairs of 10 log10(255^2 / MSE), in dB. An MSE below 1/12, the noise of rounding
  to uint8, counts as 1/12, so that equal images count 58.9 dB and not infinity.
- paired_distance: like LPIPS (Zhang et al., 2018) on the four stages of the shipped classifier,
  without learned weights: mean over stages and positions of |u/|u| - v/|v||^2, u and v the
  channels there. 0 for equal images, at most 2. For 32 pixels, and not comparable with LPIPS.
- token_agreement: share of equal token ids. One flipped token changes all that is sampled after it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from experiments.evaluate.extractors.fashion import ClassifierExtractor, as_input
from ptq.types import ConfigError

PEAK = 255.0
ROUNDING_NOISE = 1 / 12
NORM_FLOOR = 1e-10  # added to norms, so that zero vectors stay zero


def image_psnr(ours: Tensor, theirs: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,), in dB, of uint8 image pairs (B, 3, S, S)."""
    squared_error = (ours.double() - theirs.double()).square().flatten(1).mean(dim=1)  # (B,)
    return 10 * torch.log10(PEAK**2 / squared_error.clamp(min=ROUNDING_NOISE))


@torch.no_grad()
def paired_distance(ours: Tensor, theirs: Tensor, extractor: ClassifierExtractor) -> Tensor:
    """Distance (B,) of uint8 image pairs (B, 3, 32, 32) in the classifier's features."""
    our_maps = extractor.net.maps(as_input(ours))
    their_maps = extractor.net.maps(as_input(theirs))
    total = torch.zeros(len(ours), dtype=torch.float64)
    for our_map, their_map in zip(our_maps, their_maps):  # (B, C, H, W)
        difference = _unit_channels(our_map) - _unit_channels(their_map)  # (B, C, H, W)
        total += difference.square().sum(dim=1).mean(dim=(1, 2)).cpu()  # (B,)
    return total / len(our_maps)


def _unit_channels(feature_map: Tensor) -> Tensor:
    """A map (B, C, H, W) in float64, with channels of length one at every position."""
    feature_map = feature_map.double()
    return feature_map / (feature_map.norm(dim=1, keepdim=True) + NORM_FLOOR)


def token_agreement(ours: np.ndarray | None, theirs: np.ndarray | None) -> float | None:
    """Share of equal token ids (N, T); None for models whose tokens are vectors.

    Raises:
        ConfigError: the shapes differ.
    """
    if ours is None or theirs is None:
        return None
    if ours.shape != theirs.shape:
        raise ConfigError(f"tokens: {ours.shape} against {theirs.shape}, expected equal shapes")
    return float((ours == theirs).mean())


def compare_images(
    ours: Iterable[np.ndarray],
    theirs: Iterable[np.ndarray],
    extractor: ClassifierExtractor | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, float | None]:
    """psnr and, with an extractor, paired_distance of image pairs.

    Args:
        ours, theirs: uint8 images (B, 3, S, S) in equal chunks.

    Raises:
        ConfigError: the numbers or sizes of images differ, or there are none.
    """
    psnr_parts: list[Tensor] = []
    distance_parts: list[Tensor] = []
    their_chunks = iter(theirs)
    for our_chunk in ours:
        their_chunk = next(their_chunks, None)
        if their_chunk is None or our_chunk.shape != their_chunk.shape:
            found = "none" if their_chunk is None else str(their_chunk.shape)
            raise ConfigError(
                f"fp: {found} images against {our_chunk.shape}, expected as many of the same size"
            )
        our_images = torch.from_numpy(our_chunk).to(device)  # (B, 3, S, S)
        their_images = torch.from_numpy(their_chunk).to(device)
        psnr_parts.append(image_psnr(our_images, their_images).cpu())
        if extractor is not None:
            distance_parts.append(paired_distance(our_images, their_images, extractor))
    if next(their_chunks, None) is not None or not psnr_parts:
        raise ConfigError(
            "fp: another number of images, expected as many as samples, and at least one"
        )
    return {"psnr": _mean_of(psnr_parts), "paired_distance": _mean_of(distance_parts)}


def _mean_of(parts: list[Tensor]) -> float | None:
    """Mean over all pairs of a figure that comes in parts; None if there are no parts."""
    return torch.cat(parts).mean().item() if parts else None
