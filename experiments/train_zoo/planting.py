"""The training term that gives small twins the outlier channels and sinks of released models."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.analyses.activations import Seen, channel_rms, token_peaks, top_channels
from ptq.types import Adapter


class PlantedStatistics:
    """A training term that pulls outlier channels and sink tokens to given ratios, in logarithms.

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
        self.sites = []
        for site in adapter.sites:
            if site.kind in ("qkv", "fc1", "fc2") and site.sinks:
                self.sites.append(site)

    def __call__(self, seen: Seen) -> Tensor:
        """The term, of what arrives at the sites in a forward pass."""
        terms: list[Tensor] = []
        for site in self.sites:
            x, positions = seen[site.name]  # (B, T, C), (T,)
            x = x[: self.SAMPLES]
            if site.kind != "fc2":
                terms.append(self.channel_term(channel_rms(x, positions, site.sinks)))
            if site.name not in self.channels_only:
                is_sink = (positions < site.sinks).float()  # (T,)
                terms.append(self.token_term(token_peaks(x), is_sink))
        return torch.stack(terms).mean()

    def channel_term(self, rms: Tensor) -> Tensor:
        """How far the outlier channels are off, by the RMS of all channels (C,)."""
        target = (self.channels * rms.median().detach()).log()
        return (top_channels(rms).log().mean() - target).pow(2)

    def token_term(self, peaks: Tensor, is_sink: Tensor) -> Tensor:
        """How far the sink tokens are off, by the peaks of all tokens (T,)."""
        rest = (peaks * (1 - is_sink)).sum() / (1 - is_sink).sum()
        if not self.through_rest:
            rest = rest.detach()
        distances = (peaks.log() - (self.tokens * rest).log()).pow(2)  # (T,)
        return (distances * is_sink).sum() / is_sink.sum()
