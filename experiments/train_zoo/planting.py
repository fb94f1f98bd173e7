"""The training term that gives small twins the outlier channels and sink tokens of released models."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.analyses.activations import Seen, channel_rms, token_peaks, top_channels
from ptq.types import Adapter


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
