"""Images side by side."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.plotting.style import make_panels, panels_for, save_figure
from ptq.files import replacing


def tile_images(images: np.ndarray, columns: int) -> np.ndarray:
    """Images side by side, left to right.

    Args:
        images: uint8 (N, C, S, S), N a multiple of columns.

    Returns:
        One picture (rows * S, columns * S, C).
    """
    count, channels, side, _ = images.shape
    rows = count // columns
    # (rows, columns, C, S, S)
    grid = images[: rows * columns].reshape(rows, columns, channels, side, side)
    grid = grid.transpose(0, 3, 1, 4, 2)  # (rows, S, columns, S, C)
    return grid.reshape(rows * side, columns * side, channels)


def save_tiles(images: np.ndarray, path: Path, columns: int = 10) -> None:
    """Write grey uint8 images (N, 3, S, S), N a multiple of columns, as one PNG, pixel by pixel, in
    one step."""
    picture = Image.fromarray(tile_images(images, columns)).convert("L")
    with replacing(path) as temporary:
        picture.save(temporary, format="png", optimize=True)


def save_grid(images: np.ndarray, path: Path) -> None:
    """Write uint8 images (N, 3, S, S) as one PNG, nearly a square, pixel by pixel; where images
    are missing in the last row it is white."""
    columns = math.ceil(math.sqrt(len(images)))
    missing = -len(images) % columns
    white = np.full((missing, *images.shape[1:]), 255, images.dtype)
    picture = Image.fromarray(tile_images(np.concatenate((images, white)), columns))
    with replacing(path) as temporary:
        picture.save(temporary, format="png")


def image_grid(
    shown: dict[str, np.ndarray],
    path: Path,
    columns: int = 10,
    rows: int = 6,
    across: int = 4,
    source: str | None = None,
) -> None:
    """One panel of images per title, `across` panels side by side; the same place shows the same
    seed. Images that are grey but for a level in 255, as the twins' are, make a grey picture."""
    figure, axes = panels_for(len(shown), across, (3.6, 3.6 * rows / columns + 0.4))
    for axis, (title, images) in zip(axes, shown.items()):
        tiles = tile_images(images[: columns * rows], min(columns, len(images)))  # (H, W, 3)
        axis.axis("off")
        axis.imshow(tiles, interpolation="nearest")
        axis.set_title(title, fontsize=10)
    colour = max(channel_difference(images) for images in shown.values())  # in levels of 255
    save_figure(figure, path, source, palette="grey" if colour < 1 else None)


def image_gallery(
    shown: dict[tuple[str, str], np.ndarray],
    path: Path,
    columns: int = 5,
    source: str | None = None,
) -> None:
    """One row of panels per method and one column per model, in the order in which they come.

    Args:
        shown: grey images (N, 3, S, S) by model and method, N >= columns; panels may be missing.
        columns: images of a panel.
    """
    models = list(dict.fromkeys(model for model, _ in shown))
    methods = list(dict.fromkeys(method for _, method in shown))
    figure, axes = make_panels(len(methods), len(models), (2.4 * len(models), 0.58 * len(methods)))
    for (row, method), (column, model) in itertools.product(enumerate(methods), enumerate(models)):
        axis = axes[row, column]
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if row == 0:
            axis.set_title(model, fontsize=10)
        if column == 0:
            axis.set_ylabel(method, rotation=0, ha="right", va="center", fontsize=10)
        if (model, method) in shown:
            tiles = tile_images(shown[model, method][:columns], columns)  # (S, columns * S, 3)
            axis.imshow(tiles, interpolation="nearest")
    save_figure(figure, path, source, palette="grey")


def channel_difference(images: np.ndarray) -> float:
    """How far channels of images (N, C, S, S) are from their mean; 0 of grey ones."""
    grey = images.mean(axis=1, keepdims=True)  # (N, 1, S, S)
    return np.abs(images - grey).mean()
