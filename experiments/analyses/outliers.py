"""The two activation statistics that make these models hard to quantize: outliers and sinks.

Figure 1 of the paper shows both by eye; here each is one number per input of a linear layer.

    channel ratio = mean RMS of the top 2 % channels / median channel RMS, sink positions left out
    sink ratio    = mean peak |x| of the sink positions / mean peak |x| of all other positions

Small twins have the ratios of released models because a training term plants them
(`train_zoo/planting.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.analyses.activations import (
    channel_rms,
    middle_site,
    round_values,
    token_peaks,
    token_ranges,
    top_channels,
    watch_sites,
)
from experiments.analyses.data import GPS_KINDS, Measured, scoring_sequences
from experiments.run.preparation import Run
from ptq.pipeline import Track
from ptq.types import Adapter

SiteRatios = dict[str, dict[str, float]]  # {site name: {channel_ratio, sink_ratio}}

# the twins' target, read off Figure 1 of the paper
BANDS = {"channel_ratio": (6.0, 12.0), "sink_ratio": (7.0, 13.0)}
# kinds of sites that the training term acts on
PLANTED_KINDS = {"channel_ratio": ("qkv", "fc1"), "sink_ratio": ("qkv", "fc1", "fc2")}


def channel_ratio(x: Tensor, positions: Tensor, sinks: int) -> Tensor:
    """The channel ratio of an input (B, T, C)."""
    rms = channel_rms(x, positions, sinks)  # (C,)
    return top_channels(rms).mean() / rms.median()


def sink_ratio(x: Tensor, positions: Tensor, sinks: int) -> Tensor:
    """The sink ratio of an input (B, T, C)."""
    peaks = token_peaks(x)  # (T,)
    is_sink = (positions < sinks).float()  # (T,), a weight, as in `channel_rms`
    sink_peak = (peaks * is_sink).sum() / is_sink.sum()
    return sink_peak / ((peaks * (1 - is_sink)).sum() / (1 - is_sink).sum())


@torch.no_grad()
def measure_outliers(adapter: Adapter, rows: dict[str, Tensor]) -> SiteRatios:
    """Both ratios at the input of every site that has sink tokens."""
    sites = [site for site in adapter.sites if site.sinks]
    ratios: SiteRatios = {}
    with watch_sites(adapter, sites) as seen:
        adapter.forward(rows)
        for site in sites:
            x, positions = seen[site.name]
            ratios[site.name] = {
                "channel_ratio": channel_ratio(x, positions, site.sinks).item(),
                "sink_ratio": sink_ratio(x, positions, site.sinks).item(),
            }
    return ratios


def planted_ratios(ratios: SiteRatios, kinds: Mapping[str, str], name: str) -> list[float]:
    """One of the two ratios at the sites that the training term acts on.

    Args:
        kinds: of the sites, by their names.
    """
    acted_on = PLANTED_KINDS[name]
    planted = []
    for site, values in ratios.items():
        if kinds[site] in acted_on:
            planted.append(values[name])
    return planted


def share_inside_bands(ratios: SiteRatios, kinds: Mapping[str, str]) -> dict[str, float]:
    """Per ratio the share of the sites acted on whose ratio lies inside its band."""
    shares = {}
    for name, (low, high) in BANDS.items():
        values = planted_ratios(ratios, kinds, name)
        shares[name] = sum(low <= value <= high for value in values) / len(values)
    return shares


@torch.no_grad()
def outlier_statistics(
    run: Run, options: Mapping[str, Any], track: Track, folder: Path
) -> Measured:
    """Both ratios at every site that has sinks, their means where they matter, and two pictures.

    Held-out sequences of a twin, images of a released model's own; conditional branch.
    """
    adapter = run.generator.adapter
    rows, _ = adapter.rows(*scoring_sequences(run, track))
    ratios = measure_outliers(adapter, rows)
    kinds = {site.name: site.kind for site in adapter.sites}
    metrics = {}
    for name in PLANTED_KINDS:
        metrics[name] = torch.tensor(planted_ratios(ratios, kinds, name)).mean().item()
    for name, share in share_inside_bands(ratios, kinds).items():
        metrics[f"inside.{name}"] = share
    return metrics, {"sites": ratios, **describe_middle_site(adapter, rows)}


def describe_middle_site(adapter: Adapter, rows: dict[str, Tensor]) -> dict[str, Any]:
    """RMS by channel and range by position at one site in the middle, for the two pictures."""
    site = middle_site(adapter, GPS_KINDS)
    with watch_sites(adapter, [site]) as seen:
        adapter.forward(rows)
    x, positions = seen[site.name]
    rms = channel_rms(x, positions, site.sinks)  # (C,)
    places, ranges = token_ranges(x, positions)  # (P,) each
    return {
        "channels": {
            "site": site.name,
            "rms": round_values(rms, 5),
        },
        "tokens": {
            "site": site.name,
            "sinks": site.sinks,
            "positions": places.tolist(),
            "ranges": round_values(ranges, 5),
        },
    }
