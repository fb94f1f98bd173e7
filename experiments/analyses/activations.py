"""Watch the activations of a model: what arrives at its sites, and how large it is per channel and token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ptq.types import Adapter, Site

TOP_CHANNELS = 0.02

Seen = dict[str, tuple[Tensor, Tensor]]  # by site: its input (B, T, C) and the positions (T,)


def channel_rms(x: Tensor, positions: Tensor, sinks: int) -> Tensor:
    """RMS per channel (C,) of an input (B, T, C) over the positions that are no sinks."""
    kept = (positions >= sinks).float()  # a weight, not an index: its gradient needs no scatter
    return ((x.float().pow(2) * kept[:, None]).sum(dim=(0, 1)) / (len(x) * kept.sum())).sqrt()


def top_channels(rms: Tensor) -> Tensor:
    """The RMS of the top 2 % channels (at least one)."""
    return rms.topk(math.ceil(TOP_CHANNELS * len(rms))).values


def token_peaks(x: Tensor) -> Tensor:
    """Mean over samples of the largest |x| of each token, (T,)."""
    return x.float().abs().amax(dim=-1).mean(dim=0)


def token_ranges(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (P,) that occur, and the mean range (max - min over channels) of their tokens (P,),
    of x (B, T, C)."""
    width = (x.amax(dim=-1) - x.amin(dim=-1)).double().mean(dim=0)
    places, home = positions.unique(return_inverse=True)
    sums = torch.zeros(2, len(places), dtype=torch.float64, device=x.device)
    sums.index_add_(1, home, torch.stack((width, torch.ones_like(width))))
    return places, sums[0] / sums[1]


def middle_site(adapter: Adapter, kinds: tuple[str, ...]) -> Site:
    """The site of one of the kinds that stands just past the middle of the model."""
    found = [s for s in adapter.sites if s.kind in kinds]
    return found[len(found) // 2]


def attach(adapter: Adapter, sites: list[Site], seen: Seen) -> list[RemovableHandle]:
    """Hooks that put input and positions of the sites' first consumers into `seen` during a forward
    pass.

    Where the pass reaches a site with rows of several lengths in turn (MAR's encoder), all their
    tokens stand in one row, (1, N, C) and (N,).
    """
    modules = dict(adapter.model.named_modules())

    def record(name: str) -> Callable[[torch.nn.Module, tuple], None]:
        def hook(module: torch.nn.Module, args: tuple) -> None:
            if name in seen:
                (x, p), (y, q) = (
                    (x.flatten(0, 1), p.repeat(len(x))) for x, p in (seen[name], args)
                )
                seen[name] = torch.cat((x, y))[None], torch.cat((p, q))
            else:
                seen[name] = (args[0], args[1])

        return hook

    return [modules[s.name].register_forward_pre_hook(record(s.name)) for s in sites]


@contextmanager
def watch(adapter: Adapter, sites: list[Site]) -> Iterator[Seen]:
    """Inside, one forward pass fills the yielded dictionary as `attach` says."""
    seen: Seen = {}
    handles = attach(adapter, sites, seen)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
