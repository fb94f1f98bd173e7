"""How far images are from the full-precision model's of the same seeds, pair by pair; no reference
set is needed.

- psnr: mean over pairs of 10 log10(255^2 / MSE), in dB. An MSE below 1/12, the noise of rounding to
  uint8, counts as 1/12, so that equal images count 58.9 dB and not infinity.
- paired_distance: like LPIPS (Zhang et al., 2018) on the four stages of the shipped classifier, without learned
  weights: mean over stages and positions of |u/|u| - v/|v||^2, u and v the channels there. 0 for equal images, at
  most 2. 32-pixel images only, and not comparable with LPIPS.
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


def image_psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,), in dB, of uint8 image pairs (B, 3, S, S)."""
    error = (a.double() - b.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(PEAK**2 / error.clamp(min=ROUNDING_NOISE))


@torch.no_grad()
def paired_distance(a: Tensor, b: Tensor, extractor: ClassifierExtractor) -> Tensor:
    """Distance (B,) of uint8 image pairs (B, 3, 32, 32) in the classifier's features."""
    total = torch.zeros(len(a), dtype=torch.float64)
    maps = [[m.double() for m in extractor.net.maps(as_input(x))] for x in (a, b)]
    for u, v in zip(*maps):
        u, v = (x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in (u, v))
        total += (u - v).square().sum(dim=1).mean(dim=(1, 2)).cpu()
    return total / len(maps[0])


def token_agreement(a: np.ndarray | None, b: np.ndarray | None) -> float | None:
    """Share of equal token ids (N, T); None for models whose tokens are vectors.

    Raises:
        ConfigError: the shapes differ.
    """
    if a is None or b is None:
        return None
    if a.shape != b.shape:
        raise ConfigError(f"tokens: {a.shape} against {b.shape}, expected equal shapes")
    return float((a == b).mean())


def compare_images(
    ours: Iterable[np.ndarray],
    theirs: Iterable[np.ndarray],
    extractor: ClassifierExtractor | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, float | None]:
    """psnr and, with an extractor, paired_distance over uint8 images (B, 3, S, S) that come in
    equal chunks.

    Raises:
        ConfigError: the numbers or sizes of images differ, or there are none.
    """
    distances: dict[str, list[Tensor]] = {"psnr": [], "paired_distance": []}
    theirs = iter(theirs)
    for a in ours:
        b = next(theirs, None)
        if b is None or a.shape != b.shape:
            found = "none" if b is None else str(b.shape)
            raise ConfigError(
                f"fp: {found} images against {a.shape}, expected as many of the same size"
            )
        one, other = (torch.from_numpy(x).to(device) for x in (a, b))
        distances["psnr"].append(image_psnr(one, other).cpu())
        if extractor is not None:
            distances["paired_distance"].append(paired_distance(one, other, extractor))
    if next(theirs, None) is not None or not distances["psnr"]:
        raise ConfigError(
            "fp: another number of images, expected as many as samples, and at least one"
        )
    return {
        name: torch.cat(parts).mean().item() if parts else None for name, parts in distances.items()
    }
