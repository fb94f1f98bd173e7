"""Pictures: image grids, and the activation statistics of a model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from experiments.outliers import channel_rms, watch
from ptq.calibration import block_features
from ptq.types import Adapter, Rows, Site


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a PNG under its final name in one step, and close the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp{os.getpid()}.png")
    figure.savefig(temporary, dpi=120, bbox_inches="tight")
    plt.close(figure)
    os.replace(temporary, path)


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 images (N, 3, S, S) as one picture (rows * S, columns * S, 3), left to right, N a multiple of columns."""
    n, channels, side, _ = images.shape
    rows = n // columns
    grid = images[:rows * columns].reshape(rows, columns, channels, side, side)
    return grid.transpose(0, 3, 1, 4, 2).reshape(rows * side, columns * side, channels)


def image_grid(panels: dict[str, np.ndarray], path: Path, columns: int = 10, rows: int = 6, across: int = 4) -> None:
    """One panel of images per title, `across` panels side by side; the same place shows the same seed."""
    down = -(-len(panels) // across)
    size = (3.6 * min(across, len(panels)), (3.6 * rows / columns + 0.4) * down)
    figure, axes = plt.subplots(down, min(across, len(panels)), figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, images) in zip(axes.flat, panels.items()):
        axis.imshow(tile(images[:columns * rows], min(columns, len(images))), interpolation="nearest")
        axis.set_title(title, fontsize=10)
    figure.tight_layout()
    save_figure(figure, path)


def middle_site(adapter: Adapter, kinds: tuple[str, ...]) -> Site:
    """The site of one of the kinds that stands just past the middle of the model."""
    found = [s for s in adapter.sites if s.kind in kinds]
    return found[len(found) // 2]


def per_position(x: Tensor, positions: Tensor, measure: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Positions (P,) that occur, and what `measure` makes of the tokens (n, C) at each, (k, P), of inputs (B, T, C)."""
    x, positions = x.flatten(0, 1), positions.repeat(len(x))  # where lengths differ, one row holds all tokens
    places = positions.unique()
    return places, torch.stack([measure(x[positions == p]) for p in places], dim=1)


@torch.no_grad()
def outlier_figure(adapter: Adapter, conditional: Rows, unconditional: Rows, path: Path, title: str) -> None:
    """The four pictures of Figure 1 of the paper, of one block in the middle of the model.

    Outlier channels and sink tokens at the input of a linear layer, how the input of AdaLN (or, without one that varies
    with the position, of qkv) changes from token to token, and where samples with and without a class lie.
    """
    wide = middle_site(adapter, ("qkv", "fc1"))
    modulations = [s for s in adapter.sites if s.kind == "adaln" and len(s.segments) > 1]
    varying = modulations[len(modulations) // 2] if modulations else middle_site(adapter, ("qkv",))
    with watch(adapter, [wide, varying]) as seen:
        adapter.forward(conditional)
    figure, axes = plt.subplots(2, 2, figsize=(10, 6))
    x, positions = (t.cpu().float() for t in seen[wide.name])
    rms = channel_rms(x, positions, wide.sinks)
    places, peaks = per_position(x, positions, lambda tokens: tokens.abs().amax(dim=1).mean()[None])
    axes[0, 0].bar(range(len(rms)), rms.numpy(), width=1.0, color="tab:blue")
    axes[0, 0].axhline(rms.median(), color="black", linewidth=0.8, linestyle="--", label="median")
    axes[0, 0].set(xlabel="channel", ylabel="RMS", title=f"channels: {wide.name}")
    axes[0, 0].legend(frameon=False)
    colours = ["tab:red" if p < wide.sinks else "tab:blue" for p in places.tolist()]
    axes[0, 1].bar(places, peaks[0], width=1.0, color=colours)
    axes[0, 1].set(xlabel="token position", ylabel="mean peak |x|", title=f"tokens: {wide.name} (sinks red)")
    x, positions = (t.cpu().float() for t in seen[varying.name])
    levels = torch.tensor([0.001, 0.5, 0.999])
    places, (low, middle, high) = per_position(x, positions, lambda tokens: tokens.flatten().quantile(levels))
    axes[1, 0].fill_between(places, low, high, color="tab:blue", alpha=0.3, label="0.1 % to 99.9 %", step="mid")
    axes[1, 0].plot(places, middle, color="tab:blue", label="median", drawstyle="steps-mid")
    axes[1, 0].set(xlabel="token position", ylabel="x", title=f"tokens: {varying.name}")
    axes[1, 0].legend(frameon=False)
    features = [block_features(adapter, rows, 256, first_token=False).cpu() for rows in (conditional, unconditional)]
    centred = torch.cat(features) - torch.cat(features).mean(dim=0)
    projected = (centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].t()).split([len(f) for f in features])
    for place, label in zip(projected, ("with a class", "without")):
        axes[1, 1].scatter(*place.t(), s=6, alpha=0.6, label=label)
    axes[1, 1].set(xlabel="first principal axis", ylabel="second", title=f"samples: {adapter.last_block}")
    axes[1, 1].legend(frameon=False)
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, path)
