"""Watch the activations of a model: what arrives at its sites, by channel and by token position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ptq.types import Adapter, Site

TOP_CHANNELS = 0.02  # share of the channels that count as outliers

Seen = dict[str, tuple[Tensor, Tensor]]  # by site: its input (B, T, C) and the positions (T,)


def channel_rms(x: Tensor, positions: Tensor, sinks: int) -> Tensor:
    """RMS per channel (C,) of an input (B, T, C) over the positions that are no sinks."""
    kept = (positions >= sinks).float()  # a weight, not an index: its gradient needs no scatter
    sums = (x.float().pow(2) * kept[:, None]).sum(dim=(0, 1))  # (C,)
    return (sums / (len(x) * kept.sum())).sqrt()


def top_channels(rms: Tensor) -> Tensor:
    """The RMS of the top 2 % channels (at least one)."""
    return rms.topk(math.ceil(TOP_CHANNELS * len(rms))).values


def token_peaks(x: Tensor) -> Tensor:
    """Mean over samples of the largest |x| of each token, (T,)."""
    return x.float().abs().amax(dim=-1).mean(dim=0)


def token_ranges(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """How wide the tokens of an input (B, T, C) are, by position.

    Returns:
        The positions (P,) that occur, and the mean range of their tokens (P,): max - min over
        channels.
    """
    ranges = (x.amax(dim=-1) - x.amin(dim=-1)).double().mean(dim=0)  # (T,)
    places, place_of_token = positions.unique(return_inverse=True)  # (P,), (T,)
    # sums of ranges, and counts
    sums = torch.zeros(2, len(places), dtype=torch.float64, device=x.device)
    sums.index_add_(1, place_of_token, torch.stack((ranges, torch.ones_like(ranges))))
    total, count = sums  # (P,) each
    return places, total / count


def middle_site(adapter: Adapter, kinds: Sequence[str]) -> Site:
    """The site of one of the kinds that stands just past the middle of the model."""
    sites = [site for site in adapter.sites if site.kind in kinds]
    return sites[len(sites) // 2]


def attach_hooks(adapter: Adapter, sites: Sequence[Site], seen: Seen) -> list[RemovableHandle]:
    """Hooks that put what arrives at the sites into `seen` during a forward pass.

    That is the input and the positions of a site's first consumer. Where the pass reaches a site
    with rows of several lengths in turn (MAR's encoder), all their tokens stand in one row,
    (1, N, C) and (N,).
    """
    modules = dict(adapter.model.named_modules())
    handles = []
    for site in sites:
        hook = recording_hook(site.name, seen)
        handles.append(modules[site.name].register_forward_pre_hook(hook))
    return handles


def round_values(tensor: Tensor, digits: int) -> list[Any]:
    """The numbers of a tensor as nested lists, rounded as results hold them."""
    if tensor.ndim == 1:
        return [round(value, digits) for value in tensor.tolist()]
    return [round_values(row, digits) for row in tensor]


def recording_hook(name: str, seen: Seen) -> Callable[[nn.Module, tuple], None]:
    """A forward hook that puts a module's input and positions into `seen` under a name."""

    def record(module: nn.Module, args: tuple) -> None:
        x, positions = args[0], args[1]
        if name not in seen:
            seen[name] = (x, positions)
            return
        former_x, former_positions = one_row(*seen[name])
        x, positions = one_row(x, positions)
        seen[name] = (
            torch.cat((former_x, x))[None],  # (1, N, C)
            torch.cat((former_positions, positions)),  # (N,)
        )

    return record


def one_row(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens (B T, C) of an input (B, T, C), and the position of each (B T,)."""
    return x.flatten(0, 1), positions.repeat(len(x))


@contextmanager
def watch_sites(adapter: Adapter, sites: Sequence[Site]) -> Iterator[Seen]:
    """Inside, one forward pass fills the yielded dictionary as `attach_hooks` says."""
    seen: Seen = {}
    handles = attach_hooks(adapter, sites, seen)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
