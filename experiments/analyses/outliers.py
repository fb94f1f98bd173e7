"""The two activation statistics that make these models hard to quantize: outlier channels and sink
tokens.

Figure 1 of the paper shows both by eye; here each is one number per input of a linear layer.

    channel ratio = mean RMS of the top 2 % channels / median channel RMS, sink positions left out
    sink ratio    = mean peak |x| of the sink positions / mean peak |x| of all other positions

`PlantedStatistics` is the training term that gives small twins the ratios of released models;
`measure` reads them off any model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.analyses.activations import (
    channel_rms,
    token_peaks,
    token_ranges,
    top_channels,
    watch,
)
from experiments.analyses.data import LAYERS, Found, sequences
from experiments.analyses.invariance import middle
from experiments.run.cell import Run
from ptq.pipeline import Track
from ptq.types import Adapter

# the twins' target, read off Figure 1 of the paper
BANDS = {"channel_ratio": (6.0, 12.0), "sink_ratio": (7.0, 13.0)}

# sites of the training term
ACTED_ON = {"channel_ratio": ("qkv", "fc1"), "sink_ratio": ("qkv", "fc1", "fc2")}


def channel_ratio(x: Tensor, positions: Tensor, sinks: int) -> Tensor:
    rms = channel_rms(x, positions, sinks)
    return top_channels(rms).mean() / rms.median()


def sink_ratio(x: Tensor, positions: Tensor, sinks: int) -> Tensor:
    peaks = token_peaks(x)
    sink = (positions < sinks).float()
    return (peaks * sink).sum() / sink.sum() / ((peaks * (1 - sink)).sum() / (1 - sink).sum())


@torch.no_grad()
def measure(adapter: Adapter, rows: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Both ratios at the input of every site that has sink tokens, {site name: {channel_ratio,
    sink_ratio}}."""
    sites = [s for s in adapter.sites if s.sinks]
    with watch(adapter, sites) as seen:
        adapter.forward(rows)
        return {
            s.name: {
                "channel_ratio": channel_ratio(*seen[s.name], s.sinks).item(),
                "sink_ratio": sink_ratio(*seen[s.name], s.sinks).item(),
            }
            for s in sites
        }


def inside(statistics: dict[str, dict[str, float]], kinds: dict[str, str]) -> dict[str, float]:
    """Share of the sites the training term acts on whose ratio lies inside its band, per ratio."""
    shares = {}
    for ratio, (low, high) in BANDS.items():
        found = [s[ratio] for name, s in statistics.items() if kinds[name] in ACTED_ON[ratio]]
        shares[ratio] = sum(low <= value <= high for value in found) / len(found)
    return shares


@torch.no_grad()
def outlier_statistics(of: Run, options: Mapping[str, Any], track: Track, folder: Path) -> Found:
    """The two ratios of `outliers.py` at every site that has sinks, the mean over those that
    matter, and two pictures.

    Held-out sequences of a twin, images of a released model's own; conditional branch.
    """
    adapter = of.generator.adapter
    rows, _ = adapter.rows(*sequences(of, track))
    found = measure(adapter, rows)
    kinds = {s.name: s.kind for s in adapter.sites}
    metrics = {
        ratio: torch.tensor([v[ratio] for n, v in found.items() if kinds[n] in acted]).mean().item()
        for ratio, acted in ACTED_ON.items()
    } | {f"inside.{ratio}": share for ratio, share in inside(found, kinds).items()}
    site = middle(adapter.sites, LAYERS)
    with watch(adapter, [site]) as seen:
        adapter.forward(rows)
    x, positions = seen[site.name]
    rms = channel_rms(x, positions, site.sinks)
    places, ranges = token_ranges(x, positions)
    return metrics, {
        "sites": found,
        "channels": {"site": site.name, "rms": [round(v, 5) for v in rms.tolist()]},
        "tokens": {
            "site": site.name,
            "sinks": site.sinks,
            "positions": places.tolist(),
            "ranges": [round(v, 5) for v in ranges.tolist()],
        },
    }
