"""Whether the range of a token depends on its position or on the class (Figures 4, 11 and 12)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.analyses.activations import token_ranges, watch
from experiments.analyses.data import Found, drawn
from experiments.run.cell import Run
from ptq.pipeline import Track
from ptq.types import Site

OF_CLASS = 16  # images of each class whose ranges are compared


def middle(sites: Sequence[Site], kinds: Sequence[str]) -> Site:
    """The site of one of the kinds that stands in the middle of the model."""
    found = [s for s in sites if s.kind in kinds]
    return found[len(found) // 2]


def agreement(ranges: Tensor) -> dict[str, float]:
    """How far ranges (classes, positions) depend on either.

    position_share: part of the variance of the logarithm that the position explains. class_spread:
    standard deviation
    over classes relative to the mean at a position, averaged. position_spread: the other way round.
    """
    logs = ranges.log()
    share = logs.mean(dim=0).var(correction=0) / logs.var(correction=0).clamp(min=1e-30)
    return {
        "position_share": share.item(),
        "class_spread": (ranges.std(dim=0, correction=0) / ranges.mean(dim=0)).mean().item(),
        "position_spread": (ranges.std(dim=1, correction=0) / ranges.mean(dim=1)).mean().item(),
    }


@torch.no_grad()
def invariance(of: Run, options: Mapping[str, Any], track: Track, folder: Path) -> Found:
    """Ranges of tokens at every position, for the classes 0, 1, 2, the last one and none, at middle
    sites of each kind.

    `rest.` metrics leave out the sink tokens, which no one doubts to depend on their position.
    """
    adapter = of.generator.adapter
    classes = of.generator.preset.classes
    labels = torch.tensor([0, 1, 2, classes - 1]).repeat_interleave(OF_CLASS)
    tokens = drawn(of, labels, track)
    kinds = [
        kind
        for kind in ("adaln", "qkv", "proj", "fc1", "fc2")
        if any(s.kind == kind for s in adapter.sites)
    ]
    sites = [middle(adapter.sites, (kind,)) for kind in kinds]
    of_class = [
        adapter.rows(*part)
        for part in zip(tokens.split(OF_CLASS), labels.to(of.device).split(OF_CLASS))
    ]
    groups = [*(conditional for conditional, _ in of_class), of_class[0][1]]
    ranges: dict[str, list[Tensor]] = {s.kind: [] for s in sites}
    places: dict[str, Tensor] = {}
    for rows in track(groups, "classes"):
        with watch(adapter, sites) as seen:
            adapter.forward(rows)
        for site in sites:
            places[site.kind], found = token_ranges(*seen[site.name])
            ranges[site.kind].append(found)
    metrics = {}
    detail = {}
    for site in sites:
        table = torch.stack(ranges[site.kind])
        kept = places[site.kind] >= site.sinks
        if len(kept) == 1:
            continue  # one token position: VAR's modulation, which is that of the class alone
        metrics |= {f"{site.kind}.{k}": v for k, v in agreement(table).items()}
        if not bool(kept.all()):
            metrics |= {f"{site.kind}.rest.{k}": v for k, v in agreement(table[:, kept]).items()}
        detail[site.kind] = {
            "site": site.name,
            "sinks": site.sinks,
            "positions": places[site.kind].tolist(),
            "classes": [0, 1, 2, classes - 1, None],
            "ranges": [[round(v, 4) for v in row] for row in table.tolist()],
        }
    return metrics, detail
