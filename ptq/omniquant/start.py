"""Where OmniQuant's training starts: which sites are transformed, and by what.

    scale_j = SmoothQuant's for `alpha`
    shift_j = running average over the rows of the middle (max_j + min_j) / 2 of channel j, each row
              entering with weight .01

Where the producer has no bias (LLaMA-type blocks, PAR's) there is no shift, neither at the start
nor later.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ptq.inputs import watch_inputs
from ptq.methods.smoothquant import smoothing_step
from ptq.methods.solver import stacked_weight
from ptq.omniquant.student import select_within
from ptq.recipe import Recipe
from ptq.sites import Adapter, Fold, NormFold, Rows, RowsFold, Site, Track
from ptq.transform import InputTransform

MEMORY = 0.99  # share of the running middle that stays when a row enters


def transformed_sites(adapter: Adapter, recipe: Recipe, block: str) -> list[Site]:
    """The sites of a block that get a transform.

    Those of V are among them only where V alone feeds its projection.
    """
    options = recipe.options.omniquant
    chosen: list[Site] = []
    for site in select_within(block, recipe.scope.sites(adapter)):
        reads_values = site.kind == "proj" and isinstance(site.fold, RowsFold)
        is_transformed = options.transform and site.kind in recipe.sites
        if is_transformed or (options.values and reads_values):
            chosen.append(site)
    return chosen


def takes_shift(model: nn.Module, fold: Fold | None) -> bool:
    """Whether what feeds a site has a bias for a shift to go into (online, none is needed)."""
    if isinstance(fold, NormFold):
        return model.get_submodule(fold.norm).bias is not None
    if isinstance(fold, RowsFold):
        return fold.shift and model.get_submodule(fold.linear).bias is not None
    return True


class Extent:
    """The largest |x| of every channel and the running middle of its range, both (C,)."""

    def __init__(self, like: Tensor) -> None:
        self.peaks = torch.zeros_like(like)  # (C,)
        self.middle: Tensor | None = None  # (C,)

    def update(self, x: Tensor) -> None:
        """Take in rows (B, T, C), in their order; without sinks they may be empty."""
        if not x.numel():
            return
        lo = x.amin(dim=1)  # (B, C)
        hi = x.amax(dim=1)  # (B, C)
        self.peaks = torch.maximum(self.peaks, torch.maximum(-lo, hi).amax(dim=0))
        middles = (lo + hi) / 2  # (B, C)
        if self.middle is None:
            self.middle = middles[0]  # (C,), the first row counts in full
            middles = middles[1:]
        # the running average over all rows of x at once: row i counts MEMORY^(rows after it)
        ages = torch.arange(len(middles) - 1, -1, -1, device=x.device)  # (B,)
        row_weights = (1 - MEMORY) * (MEMORY**ages).to(x.dtype)  # (B,)
        self.middle = MEMORY ** len(middles) * self.middle + row_weights @ middles


def initial_transforms(
    adapter: Adapter, batches: Sequence[Rows], recipe: Recipe, track: Track
) -> dict[str, InputTransform]:
    """The transforms before training, by site, from one pass over the calibration rows."""
    sites: list[Site] = []
    for block in adapter.blocks:
        sites += transformed_sites(adapter, recipe, block)
    weights = {site.name: stacked_weight(adapter.model, site) for site in sites}  # (O, C) each
    extents = {name: Extent(like=weight[0]) for name, weight in weights.items()}

    def update_extent(site: Site, x: Tensor) -> None:
        extents[site.name].update(x)

    with watch_inputs(adapter, sites, recipe.exclude_sinks, update_extent):
        for batch in track(batches if sites else [], "omniquant"):
            adapter.forward(batch)

    transforms: dict[str, InputTransform] = {}
    for site in sites:
        extent = extents[site.name]
        alpha = recipe.options.omniquant.alpha
        transform = smoothing_step(extent.peaks, weights[site.name], alpha)
        if takes_shift(adapter.model, site.fold) and extent.middle is not None:
            transform = InputTransform(transform.scale, extent.middle)
        transforms[site.name] = transform
    return transforms
