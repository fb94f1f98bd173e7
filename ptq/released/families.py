"""Where PTQ4ARVG's four released codes differ, as data; what they have in common is the sequence in
`sequence.py`.

| | RAR | VAR | PAR | MAR |
|---|---|---|---|---|
| ranges of weights, per-channel and per-tensor inputs | include zero | | | include zero |
| calibration rows | one batch | minibatches | minibatches | one batch |
| head | second shift | GPS | GPS | none |
| last calibration | smoothed sites | everything | everything | smoothed sites |
| attention weights | integers | integers | log-sqrt2 | not quantized |
| parameters of token groups | float32 | float32 | bfloat16 | float32 |

Over minibatches, parameters and scales are averaged, 0.9 of the old and 0.1 of the new value: the
first minibatch keeps nearly all the weight and zero points become fractional, which suits no
integer kernel. Which tokens are sinks and share parameters is the adapters' knowledge, but for PAR,
whose released numbers are those of 4x for every model.

Two things of the released codes are not repeated. A token's group is found by its position here:
RAR's first call gives its second token the head modulation parameters of the third, and PAR-16x's
tokens 5 .. 7 decode with the last group's parameters. PAR calibrates in bfloat16; here only its
token parameters are rounded to it.

Source: RAR/quant, VAR/quant, PAR/autoregressive/sample/quant and MAR/quant with main_mar_quant.py
of BienLuky/PTQ4ARVG.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ptq.sites import Scope, Segments, Site

# Where the released code has minibatches, its calibration files hold images in blocks of so many of
# either kind, and every block has the same share of both kinds.
BLOCK = 32


@dataclass(frozen=True)
class ReleasedBehaviour:
    """One family's released code.

    Attributes:
        scope: what it quantizes.
        include_zero: the ranges of all but token-wise quantizers are stretched to contain zero.
        averaging: calibrate in minibatches and average over them, instead of one batch.
        gps_head: GPS at the head too; otherwise a second shift there.
        renew: the last calibration finds all activation parameters anew, not only those of the
            smoothed sites.
        softmax: number format of the attention weights.
        token_dtype: what token-wise parameters are rounded to.
        sinks, tokens: in place of the adapter's, None keeps it.
    """

    scope: Scope = Scope()
    include_zero: bool = False
    averaging: bool = False
    gps_head: bool = True
    renew: bool = False
    softmax: str = "int"
    token_dtype: torch.dtype | None = None
    sinks: int | None = None
    tokens: Segments | None = None

    def of(self, site: Site) -> Site:
        """The site with the sink tokens and token groups of the released code."""
        sinks = site.sinks
        if self.sinks is not None and site.sinks:
            sinks = self.sinks
        segments = site.segments
        if self.tokens is not None and len(site.segments) > 1:
            segments = self.tokens
        return replace(site, sinks=sinks, segments=segments)


RELEASED: dict[str, ReleasedBehaviour] = {
    "rar": ReleasedBehaviour(include_zero=True, gps_head=False),
    "var": ReleasedBehaviour(averaging=True, renew=True),
    "par": ReleasedBehaviour(
        averaging=True,
        renew=True,
        softmax="log_sqrt2",
        token_dtype=torch.bfloat16,
        sinks=8,
        tokens=Segments((0, 1, 2, 3, 4, 8)),
    ),
    "mar": ReleasedBehaviour(
        scope=Scope(("qkv", "proj", "fc1", "fc2"), matmuls=False), include_zero=True
    ),
}
