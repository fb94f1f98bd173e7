"""Pictures: image grids and the activation outliers of a model."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from experiments.outliers import channel_rms, token_peaks, watch
from ptq.types import Adapter, Rows


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


@torch.no_grad()
def outlier_figure(adapter: Adapter, rows: Rows, path: Path, title: str) -> None:
    """Outlier channels and sink tokens at the qkv and fc1 inputs of the middle block, as in Figure 1 of the paper."""
    middle = [s for s in adapter.sites if s.kind in ("qkv", "fc1")]
    middle = middle[len(middle) // 4 * 2:][:2]
    with watch(adapter, middle) as seen:
        adapter.forward(rows)
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.5))
    for row, site in zip(axes, middle):
        x, positions = (t.cpu() for t in seen[site.name])
        rms = channel_rms(x, positions, site.sinks)
        row[0].bar(range(len(rms)), rms.numpy(), width=1.0, color="tab:blue")
        row[0].axhline(rms.median(), color="black", linewidth=0.8, linestyle="--", label="median")
        row[0].set(xlabel="channel", ylabel="RMS", title=f"{site.name}: outlier channels")
        row[0].legend(frameon=False)
        peaks = token_peaks(x)
        colours = ["tab:red" if p < site.sinks else "tab:blue" for p in positions.tolist()]
        row[1].bar(positions.tolist(), peaks.numpy(), width=1.0, color=colours)
        row[1].set(xlabel="token position", ylabel="mean peak |x|", title=f"{site.name}: sink tokens (red)")
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, path)
