"""The two activation statistics that make these models hard to quantize: outlier channels and sink tokens.

Figure 1 of the paper shows both by eye; here each is one number per input of a linear layer.

    channel ratio = mean RMS of the top 2 % channels / median channel RMS, sink positions left out
    sink ratio    = mean peak |x| of the sink positions / mean peak |x| of all other positions

`PlantedStatistics` is the training term that gives small twins the ratios of released models; `measure` reads them off
any model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ptq.types import Adapter, Site

TOP_CHANNELS = 0.02


def channel_rms(x: Tensor, positions: Tensor, sinks: int) -> Tensor:
    """RMS per channel (C,) of an input (B, T, C) over the positions that are no sinks."""
    kept = (positions >= sinks).float()  # a weight, not an index: its gradient needs no scatter
    return ((x.float().pow(2) * kept[:, None]).sum(dim=(0, 1)) / (len(x) * kept.sum())).sqrt()


def top_channels(rms: Tensor) -> Tensor:
    """The RMS of the top 2 % channels (at least one)."""
    return rms.topk(math.ceil(TOP_CHANNELS * len(rms))).values


def channel_ratio(x: Tensor, positions: Tensor, sinks: int) -> Tensor:
    rms = channel_rms(x, positions, sinks)
    return top_channels(rms).mean() / rms.median()


def token_peaks(x: Tensor) -> Tensor:
    """Mean over samples of the largest |x| of each token, (T,)."""
    return x.float().abs().amax(dim=-1).mean(dim=0)


def sink_ratio(x: Tensor, positions: Tensor, sinks: int) -> Tensor:
    peaks, sink = token_peaks(x), (positions < sinks).float()
    return (peaks * sink).sum() / sink.sum() / ((peaks * (1 - sink)).sum() / (1 - sink).sum())


@contextmanager
def watch(adapter: Adapter, sites: list[Site]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record input and positions, (B, T, C) and (T,), of the sites' first consumers during forward passes."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    modules = dict(adapter.model.named_modules())

    def record(name: str):
        def hook(module: torch.nn.Module, args: tuple) -> None:
            seen[name] = (args[0], args[1])
        return hook

    handles = [modules[s.name].register_forward_pre_hook(record(s.name)) for s in sites]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class PlantedStatistics:
    """A training term that pulls outlier channels and sink tokens to given ratios, squared in the log domain.

    Channels: at inputs of qkv and fc1, the mean log RMS of the top 2 % channels towards `channels` times the median.
    Tokens: at inputs of qkv, fc1 and fc2, the peak of every sink token towards `tokens` times the mean of the rest.
    The denominators carry no gradient, so the term raises outliers and does not flatten the others. The first
    `SAMPLES` samples of a batch are enough.
    """

    SAMPLES = 128

    def __init__(self, adapter: Adapter, channels: float, tokens: float) -> None:
        self.adapter, self.channels, self.tokens = adapter, channels, tokens
        self.sites = [s for s in adapter.sites if s.kind in ("qkv", "fc1", "fc2") and s.sinks]

    def __call__(self, seen: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        terms: list[Tensor] = []
        for site in self.sites:
            x, positions = seen[site.name]
            x, sink = x[:self.SAMPLES], (positions < site.sinks).float()
            if site.kind != "fc2":
                rms = channel_rms(x, positions, site.sinks)
                terms.append((top_channels(rms).log().mean() - (self.channels * rms.median().detach()).log()).pow(2))
            peaks = token_peaks(x)
            rest = (peaks * (1 - sink)).sum().detach() / (1 - sink).sum()
            terms.append(((peaks.log() - (self.tokens * rest).log()).pow(2) * sink).sum() / sink.sum())
        return torch.stack(terms).mean()


@torch.no_grad()
def measure(adapter: Adapter, rows: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Both ratios at the input of every site that has sink tokens, {site name: {channel_ratio, sink_ratio}}."""
    sites = [s for s in adapter.sites if s.sinks]
    with watch(adapter, sites) as seen:
        adapter.forward(rows)
        return {
            s.name: {
                "channel_ratio": channel_ratio(*seen[s.name], s.sinks).item(),
                "sink_ratio": sink_ratio(*seen[s.name], s.sinks).item(),
            } for s in sites
        }
