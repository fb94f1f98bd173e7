"""The two activation statistics that make these models hard to quantize: outlier channels and sink
tokens.

Figure 1 of the paper shows both by eye; here each is one number per input of a linear layer.

    channel ratio = mean RMS of the top 2 % channels / median channel RMS, sink positions left out
    sink ratio    = mean peak |x| of the sink positions / mean peak |x| of all other positions

`PlantedStatistics` is the training term that gives small twins the ratios of released models;
`measure` reads them off any model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

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
    peaks = token_peaks(x)
    sink = (positions < sinks).float()
    return (peaks * sink).sum() / sink.sum() / ((peaks * (1 - sink)).sum() / (1 - sink).sum())


Seen = dict[str, tuple[Tensor, Tensor]]  # by site: its input (B, T, C) and the positions (T,)


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


class PlantedStatistics:
    """A training term that pulls outlier channels and sink tokens to given ratios, squared in the
    log domain.

    Channels: at inputs of qkv and fc1, the mean log RMS of the top 2 % channels towards `channels`
    times the median.
    Tokens: at inputs of qkv, fc1 and fc2, the peak of every sink token towards `tokens` times the
    mean of the rest. The denominators carry no gradient, so the term raises outliers and does not
    flatten the others. The first `SAMPLES` samples of a batch are enough.

    Args:
        channels_only: names of sites at which no sink tokens are asked for.
        through_rest: let the gradient of the tokens' part through the mean of the rest as well.
            Where sink tokens and others share their embeddings (PAR's first image tokens), a push
            on the sinks alone raises all tokens, and the ratio is never reached; with both
            gradients only what tells them apart moves.
    """

    SAMPLES = 128

    def __init__(
        self,
        adapter: Adapter,
        channels: float,
        tokens: float,
        channels_only: tuple[str, ...] = (),
        through_rest: bool = False,
    ) -> None:
        self.adapter = adapter
        self.channels = channels
        self.tokens = tokens
        self.channels_only = channels_only
        self.through_rest = through_rest
        self.sites = [s for s in adapter.sites if s.kind in ("qkv", "fc1", "fc2") and s.sinks]

    def __call__(self, seen: Seen) -> Tensor:
        terms: list[Tensor] = []
        for site in self.sites:
            x, positions = seen[site.name]
            x = x[: self.SAMPLES]
            sink = (positions < site.sinks).float()
            if site.kind != "fc2":
                rms = channel_rms(x, positions, site.sinks)
                terms.append(
                    (
                        top_channels(rms).log().mean()
                        - (self.channels * rms.median().detach()).log()
                    ).pow(2)
                )
            if site.name in self.channels_only:
                continue
            peaks = token_peaks(x)
            rest = (peaks * (1 - sink)).sum() / (1 - sink).sum()
            rest = rest if self.through_rest else rest.detach()
            terms.append(
                ((peaks.log() - (self.tokens * rest).log()).pow(2) * sink).sum() / sink.sum()
            )
        return torch.stack(terms).mean()


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
