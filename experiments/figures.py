"""Pictures of a model: image grids, and the activation statistics that make it hard to quantize.

Figures are made without pyplot, so that drawing needs no display and a notebook keeps its own. Colours are those of
Okabe and Ito (2008), which people with any common colour blindness tell apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from experiments.outliers import Seen, channel_rms, watch
from ptq.calibration import block_features
from ptq.types import Adapter, Rows, Site

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000"
)
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, YELLOW)
LEGEND_ROOM = 1.25  # height of an axis with its legend above bars, over that of the bars
STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10, "legend.fontsize": 9, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "lines.linewidth": 1.8,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
}
matplotlib.rcParams.update(STYLE)


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """An empty figure of `size` inches, and its axes (rows, columns)."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def panels_for(count: int, across: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """An empty figure with `count` axes, at most `across` side by side, of `size` inches each."""
    across = min(across, count)
    down = -(-count // across)
    figure, axes = panels(down, across, (size[0] * across, size[1] * down))
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def save_figure(figure: Figure, path: Path, source: str | None = None, grey: bool = False) -> None:
    """Write a PNG under its final name in one step; `source`: a note in the file on what it was made of. `grey` ones
    take a byte a pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp{os.getpid()}.png")
    figure.savefig(temporary, dpi=120, bbox_inches="tight", metadata={"Software": None, "Source": source})
    if grey:
        note = PngInfo()
        if source is not None:
            note.add_text("Source", source)
        with Image.open(temporary) as picture:
            flat = picture.convert("L")
        flat.save(temporary, optimize=True, pnginfo=note)
    os.replace(temporary, path)


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 images (N, 3, S, S) as one picture (rows * S, columns * S, 3), left to right, N a multiple of columns."""
    n, channels, side, _ = images.shape
    rows = n // columns
    grid = images[:rows * columns].reshape(rows, columns, channels, side, side)
    return grid.transpose(0, 3, 1, 4, 2).reshape(rows * side, columns * side, channels)


def save_tiles(images: np.ndarray, path: Path, columns: int = 10) -> None:
    """Write grey uint8 images (N, 3, S, S), N a multiple of columns, as one PNG, pixel by pixel, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp{os.getpid()}.png")
    Image.fromarray(tile(images, columns)).convert("L").save(temporary, optimize=True)
    os.replace(temporary, path)


def image_grid(
    shown: dict[str, np.ndarray], path: Path, columns: int = 10, rows: int = 6, across: int = 4,
    source: str | None = None,
) -> None:
    """One panel of images per title, `across` panels side by side; the same place shows the same seed. Images that are
    grey but for a level in 255, as the twins' are, make a grey picture."""
    figure, axes = panels_for(len(shown), across, (3.6, 3.6 * rows / columns + 0.4))
    for axis, (title, images) in zip(axes, shown.items()):
        axis.axis("off")
        axis.imshow(tile(images[:columns * rows], min(columns, len(images))), interpolation="nearest")
        axis.set_title(title, fontsize=10)
    colour = max(np.abs(x - x.mean(axis=1, keepdims=True)).mean() for x in shown.values())
    save_figure(figure, path, source, grey=colour < 1)


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
def inputs_of(adapter: Adapter, rows: Rows, sites: list[Site]) -> Seen:
    """What arrives at the sites in one forward pass, on the CPU."""
    with watch(adapter, sites) as seen:
        adapter.forward(rows)
    return {name: (x.cpu().float(), positions.cpu()) for name, (x, positions) in seen.items()}


def draw_channels(axis: Axes, rms: Tensor | Sequence[float], title: str) -> None:
    """RMS of every channel (C,), with the median."""
    rms = np.asarray(rms)
    axis.bar(range(len(rms)), rms, width=1.0, color=BLUE)
    axis.axhline(np.median(rms), color=BLACK, linewidth=0.8, linestyle="--", label="median")
    axis.set(xlabel="channel", ylabel="RMS of x", title=title, ylim=(0, LEGEND_ROOM * rms.max()))
    axis.legend(loc="upper center")


def draw_tokens(
    axis: Axes, places: Tensor | Sequence[int], heights: Tensor | Sequence[float], sinks: int, what: str, title: str
) -> None:
    """A figure `what` of the tokens at every position (P,), those of the first `sinks` in another colour."""
    places, heights = np.asarray(places), np.asarray(heights)
    sink = places < sinks
    axis.bar(places[~sink], heights[~sink], width=1.0, color=BLUE)
    axis.bar(places[sink], heights[sink], width=1.0, color=RED, label="sink tokens")
    axis.set(xlabel="token position", ylabel=what, title=title, ylim=(0, LEGEND_ROOM * heights.max()))
    if sink.any():
        axis.legend(loc="upper center")


def mean_peaks(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (P,) that occur in an input (B, T, C), and the mean over samples of the largest |x| at each (P,)."""
    places, peaks = per_position(x, positions, lambda tokens: tokens.abs().amax(dim=1).mean()[None])
    return places, peaks[0]


def draw_drift(axis: Axes, x: Tensor, positions: Tensor, site: Site) -> None:
    """How the values of an input (B, T, C) spread at every position."""
    levels = torch.tensor([0.001, 0.5, 0.999])
    places, (low, middle, high) = per_position(x, positions, lambda tokens: tokens.flatten().quantile(levels))
    axis.fill_between(places, low, high, color=BLUE, alpha=0.3, label="0.1 % to 99.9 %", step="mid", linewidth=0)
    axis.plot(places, middle, color=BLUE, label="median", drawstyle="steps-mid")
    axis.set(xlabel="token position", ylabel="x", title=f"tokens: {site.name}")
    axis.legend()


def principal_plane(features: Tensor) -> Tensor:
    """Features (N, D) on their first two principal axes, (N, 2)."""
    centred = features - features.mean(dim=0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].t()


def draw_samples(axis: Axes, groups: dict[str, Tensor], title: str) -> None:
    """Samples by their features (n, D), one colour a group, on the two principal axes of all together."""
    places = principal_plane(torch.cat(list(groups.values()))).split([len(g) for g in groups.values()])
    for name, place, marker in zip(groups, places, "o^sDv"):
        axis.scatter(*place.t(), s=9, alpha=0.7, label=name, marker=marker, linewidths=0)
    axis.set(xlabel="first principal axis", ylabel="second principal axis", title=title)
    axis.legend()


def outlier_figure(adapter: Adapter, conditional: Rows, unconditional: Rows, path: Path, title: str) -> None:
    """The four pictures of Figure 1 of the paper, of one block in the middle of the model.

    Outlier channels and sink tokens at the input of a linear layer, how the input of AdaLN (or, without one that varies
    with the position, of qkv) changes from token to token, and where samples with and without a class lie.
    """
    wide = middle_site(adapter, ("qkv", "fc1"))
    modulations = [s for s in adapter.sites if s.kind == "adaln" and len(s.segments) > 1]
    varying = modulations[len(modulations) // 2] if modulations else middle_site(adapter, ("qkv",))
    seen = inputs_of(adapter, conditional, [wide, varying])
    features = [block_features(adapter, rows, 256, first_token=False).cpu() for rows in (conditional, unconditional)]
    figure, axes = panels(2, 2, (10, 6))
    draw_channels(axes[0, 0], channel_rms(*seen[wide.name], wide.sinks), f"channels: {wide.name}")
    peaks = mean_peaks(*seen[wide.name])
    draw_tokens(axes[0, 1], *peaks, wide.sinks, "mean peak of |x|", f"tokens: {wide.name}")
    draw_drift(axes[1, 0], *seen[varying.name], varying)
    draw_samples(
        axes[1, 1], dict(zip(("with a class", "without"), features)), f"samples: {adapter.last_block}"
    )
    figure.suptitle(title)
    save_figure(figure, path)
