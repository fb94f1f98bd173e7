"""Whether the range of a token depends on its position or on the class (Figures 4, 11 and 12)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.analyses.activations import (
    middle_site,
    round_values,
    token_ranges,
    watch_sites,
)
from experiments.analyses.data import Measured, sample_tokens
from experiments.run.preparation import Run
from ptq.pipeline import Track
from ptq.types import Rows, Site

KINDS = ("adaln", "qkv", "proj", "fc1", "fc2")
PER_CLASS = 16  # images of each class whose ranges are compared


@torch.no_grad()
def range_invariance(run: Run, options: Mapping[str, Any], track: Track, folder: Path) -> Measured:
    """Ranges of tokens at every position, class by class, at a middle site of each kind.

    The classes are 0, 1, 2, the last one and none. `rest.` metrics leave out the sink tokens, which
    no one doubts to depend on their position.
    """
    adapter = run.generator.adapter
    classes = [0, 1, 2, run.generator.preset.classes - 1]
    present = {site.kind for site in adapter.sites}
    sites = [middle_site(adapter, (kind,)) for kind in KINDS if kind in present]
    ranges: dict[str, list[Tensor]] = {site.kind: [] for site in sites}  # of classes, (P,) each
    places: dict[str, Tensor] = {}  # positions that occur (P,)
    for rows in track(rows_by_class(run, classes, track), "classes"):
        with watch_sites(adapter, sites) as seen:
            adapter.forward(rows)
        for site in sites:
            places[site.kind], class_ranges = token_ranges(*seen[site.name])
            ranges[site.kind].append(class_ranges)
    metrics: dict[str, float] = {}
    detail: dict[str, Any] = {}
    for site in sites:
        positions = places[site.kind]
        if len(positions) == 1:
            continue  # VAR's modulation, which is that of the class alone
        table = torch.stack(ranges[site.kind])  # (classes, P)
        metrics |= compare_ranges(site, table, positions)
        detail[site.kind] = {
            "site": site.name,
            "sinks": site.sinks,
            "positions": positions.tolist(),
            "classes": [*classes, None],
            "ranges": round_values(table, 4),
        }
    return metrics, detail


def rows_by_class(run: Run, classes: list[int], track: Track) -> list[Rows]:
    """Rows of images of each class, and of those of the first class without one."""
    labels = torch.tensor(classes).repeat_interleave(PER_CLASS)  # (classes * PER_CLASS,)
    tokens = sample_tokens(run, labels, track)
    conditional = []
    unconditional = []
    for class_tokens, class_labels in zip(
        tokens.split(PER_CLASS), labels.to(run.device).split(PER_CLASS)
    ):
        with_class, without_class = run.generator.adapter.rows(class_tokens, class_labels)
        conditional.append(with_class)
        unconditional.append(without_class)
    return [*conditional, unconditional[0]]


def compare_ranges(site: Site, table: Tensor, positions: Tensor) -> dict[str, float]:
    """`agreement` of ranges (classes, P) at a site, of all tokens and of all but the sinks."""
    metrics = {}
    for name, value in agreement(table).items():
        metrics[f"{site.kind}.{name}"] = value
    no_sinks = positions >= site.sinks
    if not bool(no_sinks.all()):
        for name, value in agreement(table[:, no_sinks]).items():
            metrics[f"{site.kind}.rest.{name}"] = value
    return metrics


def agreement(ranges: Tensor) -> dict[str, float]:
    """How far ranges (classes, positions) depend on either.

    Returns:
        position_share: part of the variance of the logarithm that the position explains.
        class_spread: standard deviation over classes relative to the mean at a position, averaged.
        position_spread: the other way round.
    """
    logs = ranges.log()  # (classes, P)
    share = logs.mean(dim=0).var(correction=0) / logs.var(correction=0).clamp(min=1e-30)
    return {
        "position_share": share.item(),
        "class_spread": (ranges.std(dim=0, correction=0) / ranges.mean(dim=0)).mean().item(),
        "position_spread": (ranges.std(dim=1, correction=0) / ranges.mean(dim=1)).mean().item(),
    }
