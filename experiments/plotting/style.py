"""How figures look.

Figures are made without pyplot, so that drawing needs no display and a notebook keeps its own.
Colours are those of Okabe and Ito (2008), which people with any common colour blindness tell apart.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ptq.files import replacing

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
RED = "#D55E00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
YELLOW = "#F0E442"
BLACK = "#000000"
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, YELLOW)
DPI = 120  # of files
LEGEND_ROOM = 1.25  # height of an axis with its legend above bars, over that of the bars
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
}
matplotlib.rcParams.update(STYLE)  # of every figure made after this import


def make_panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """An empty figure of `size` inches, and its axes (rows, columns)."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def panels_for(count: int, across: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """An empty figure with `count` axes, at most `across` side by side, of `size` inches each."""
    across = min(across, count)
    down = -(-count // across)
    figure, axes = make_panels(down, across, (size[0] * across, size[1] * down))
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def save_figure(
    figure: Figure,
    path: Path,
    source: str | None = None,
    palette: str | None = None,
    cropped: bool = True,
) -> None:
    """Write a PNG under its final name in one step.

    Args:
        source: a note in the file on what it was made of.
        palette: `grey` for all levels, `coarse grey` for 16 of them, which are enough for small
            images, `own` for the picture's 64 main colours, or `photo` for 256 of them; None keeps
            all colours.
        cropped: leave out what is empty at the margins; else the figure keeps its pixels.
    """
    # None leaves a note out: Software would name the version of matplotlib
    notes = {"Software": None, "Source": source}
    with replacing(path) as temporary:
        bounds = "tight" if cropped else None
        figure.savefig(temporary, format="png", dpi=DPI, bbox_inches=bounds, metadata=notes)
        if palette is not None:
            _reduce_colours(temporary, palette, source)


def _reduce_colours(path: Path, palette: str, source: str | None) -> None:
    """Rewrite a PNG with a byte a pixel or less; its note is kept."""
    note = PngInfo()
    if source is not None:
        note.add_text("Source", source)
    with Image.open(path) as picture:  # in memory, before the file is written anew
        if palette == "own":
            flat = picture.convert("RGB").quantize(64)
        elif palette == "photo":
            flat = picture.convert("RGB").quantize(256)
        else:
            flat = picture.convert("L")
    if palette == "coarse grey":
        flat = flat.quantize(16, dither=Image.Dither.NONE)
    flat.save(path, format="png", optimize=True, pnginfo=note)
