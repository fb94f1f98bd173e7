"""Pictures of a model: image grids, and the activation statistics that make it hard to quantize.

Figures are made without pyplot, so that drawing needs no display and a notebook keeps its own.
Colours are those of Okabe and Ito (2008), which people with any common colour blindness tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from experiments.analyses.activations import (
    Seen,
    channel_rms,
    middle_site,
    one_row,
    watch_sites,
)
from experiments.plotting.style import BLACK, BLUE, LEGEND_ROOM, RED, make_panels, save_figure
from ptq.calibration import block_features
from ptq.types import Adapter, Rows, Site


def per_position(
    x: Tensor, positions: Tensor, measure: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Measure the tokens of inputs (B, T, C) at every position.

    Returns:
        The positions (P,) that occur, and what `measure` makes of the tokens (n, C) at each (k, P).
    """
    tokens, positions = one_row(x, positions)  # where lengths differ, one row holds all tokens
    places = positions.unique()
    figures = [measure(tokens[positions == place]) for place in places]  # P of (k,)
    return places, torch.stack(figures, dim=1)


@torch.no_grad()
def inputs_of(adapter: Adapter, rows: Rows, sites: list[Site]) -> Seen:
    """What arrives at the sites in one forward pass, on the CPU."""
    with watch_sites(adapter, sites) as seen:
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
    axis: Axes,
    places: Tensor | Sequence[int],
    heights: Tensor | Sequence[float],
    sinks: int,
    what: str,
    title: str,
) -> None:
    """A figure `what` of the tokens at every position (P,), the first `sinks` in another colour."""
    places = np.asarray(places)
    heights = np.asarray(heights)
    is_sink = places < sinks
    axis.bar(places[~is_sink], heights[~is_sink], width=1.0, color=BLUE)
    axis.bar(places[is_sink], heights[is_sink], width=1.0, color=RED, label="sink tokens")
    top = LEGEND_ROOM * heights.max()
    axis.set(xlabel="token position", ylabel=what, title=title, ylim=(0, top))
    if is_sink.any():
        axis.legend(loc="upper center")


def mean_peaks(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (P,) that occur in an input (B, T, C), and the mean largest |x| at each (P,)."""

    def mean_peak(tokens: Tensor) -> Tensor:
        return tokens.abs().amax(dim=1).mean()[None]  # (1,)

    places, peaks = per_position(x, positions, mean_peak)
    return places, peaks[0]


def draw_drift(axis: Axes, x: Tensor, positions: Tensor, site: Site) -> None:
    """How the values of an input (B, T, C) spread at every position."""
    levels = torch.tensor([0.001, 0.5, 0.999])

    def spread(tokens: Tensor) -> Tensor:
        return tokens.flatten().quantile(levels)  # (3,)

    places, quantiles = per_position(x, positions, spread)
    low, middle, high = quantiles  # (P,) each
    axis.fill_between(
        places, low, high, color=BLUE, alpha=0.3, label="0.1 % to 99.9 %", step="mid", linewidth=0
    )
    axis.plot(places, middle, color=BLUE, label="median", drawstyle="steps-mid")
    axis.set(xlabel="token position", ylabel="x", title=f"tokens: {site.name}")
    axis.legend()


def principal_plane(features: Tensor) -> Tensor:
    """Features (N, D) on their first two principal axes, (N, 2)."""
    centred = features - features.mean(dim=0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].t()


def draw_samples(axis: Axes, groups: dict[str, Tensor], title: str) -> None:
    """Samples by their features (n, D), one colour a group, on the principal axes of all."""
    sizes = [len(features) for features in groups.values()]
    plane = principal_plane(torch.cat(list(groups.values())))  # (N, 2)
    for name, place, marker in zip(groups, plane.split(sizes), "o^sDv"):
        axis.scatter(*place.t(), s=9, alpha=0.7, label=name, marker=marker, linewidths=0)
    axis.set(xlabel="first principal axis", ylabel="second principal axis", title=title)
    axis.legend()


def outlier_figure(
    adapter: Adapter, conditional: Rows, unconditional: Rows, path: Path, title: str
) -> None:
    """The four pictures of Figure 1 of the paper, of one block in the middle of the model.

    Outlier channels and sink tokens at the input of a linear layer, how the input of AdaLN (or,
    without one that varies with the position, of qkv) changes from token to token, and where
    samples with and without a class lie.
    """
    wide = middle_site(adapter, ("qkv", "fc1"))
    varying = varying_site(adapter)
    seen = inputs_of(adapter, conditional, [wide, varying])
    x, positions = seen[wide.name]
    places, peaks = mean_peaks(x, positions)
    features = {
        "with a class": block_features(adapter, conditional, 256, first_token=False).cpu(),
        "without": block_features(adapter, unconditional, 256, first_token=False).cpu(),
    }
    figure, axes = make_panels(2, 2, (10, 6))
    draw_channels(axes[0, 0], channel_rms(x, positions, wide.sinks), f"channels: {wide.name}")
    draw_tokens(axes[0, 1], places, peaks, wide.sinks, "mean peak of |x|", f"tokens: {wide.name}")
    draw_drift(axes[1, 0], *seen[varying.name], varying)
    draw_samples(axes[1, 1], features, f"samples: {adapter.last_block}")
    figure.suptitle(title)
    save_figure(figure, path)


def varying_site(adapter: Adapter) -> Site:
    """A site in the middle whose input varies with the position: AdaLN's, or else qkv."""
    modulations = []
    for site in adapter.sites:
        if site.kind == "adaln" and len(site.segments) > 1:
            modulations.append(site)
    if modulations:
        return modulations[len(modulations) // 2]
    return middle_site(adapter, ("qkv",))
