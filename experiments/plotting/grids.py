"""Images side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from experiments.plotting.style import DPI, panels_for, save_figure
from ptq.files import replacing

ENLARGED = 2  # pixels of a gallery for one of an image
NAMES_ROOM = 172  # pixels left of a gallery's panels, and above them
TITLES_ROOM = 34
PANEL_GAP = 14
ROW_GAP = 8


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
    save_figure(figure, path, source, palette="coarse grey" if are_grey(shown.values()) else None)


def image_gallery(
    shown: dict[tuple[str, str], np.ndarray],
    path: Path,
    columns: int = 4,
    marked: str | None = None,
    source: str | None = None,
) -> None:
    """One row of panels per method and one column per model, in the order in which they come.

    Images are enlarged by a whole number, pixel by pixel.

    Args:
        shown: images (N, 3, S, S) by model and method, N >= columns; panels may be missing.
        columns: images of a panel.
        marked: the method whose name is bold.
    """
    models = list(dict.fromkeys(model for model, _ in shown))
    methods = list(dict.fromkeys(method for _, method in shown))
    side = ENLARGED * next(iter(shown.values())).shape[-1]
    panel = side * columns
    width = NAMES_ROOM + len(models) * (panel + PANEL_GAP)  # all in pixels
    height = TITLES_ROOM + len(methods) * (side + ROW_GAP)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for (row, method), (column, model) in itertools.product(enumerate(methods), enumerate(models)):
        left = NAMES_ROOM + column * (panel + PANEL_GAP)
        top = TITLES_ROOM + row * (side + ROW_GAP)
        axis = figure.add_axes(
            (left / width, 1 - (top + side) / height, panel / width, side / height)
        )
        axis.axis("off")
        if row == 0:
            axis.set_title(model, fontsize=11, fontweight="bold", pad=6)
        if column == 0:
            weight = "bold" if method == marked else "normal"
            figure.text(
                (NAMES_ROOM - PANEL_GAP) / width,
                1 - (top + side / 2) / height,
                method,
                ha="right",
                va="center",
                fontsize=11,
                fontweight=weight,
            )
        if (model, method) in shown:
            tiles = tile_images(shown[model, method][:columns], columns)  # (S, columns * S, 3)
            axis.imshow(tiles, interpolation="nearest", aspect="auto")
    palette = "grey" if are_grey(shown.values()) else "photo"
    save_figure(figure, path, source, palette=palette, cropped=False)


def are_grey(sets: Iterable[np.ndarray]) -> bool:
    """Whether all images (N, C, S, S) of several sets are grey, but for a level in 255."""
    return max(map(channel_difference, sets)) < 1


def channel_difference(images: np.ndarray) -> float:
    """How far channels of images (N, C, S, S) are from their mean; 0 of grey ones."""
    grey = images.mean(axis=1, keepdims=True)  # (N, 1, S, S)
    return np.abs(images - grey).mean()
