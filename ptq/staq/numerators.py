"""Attention weights rounded as numerators of the softmax, before they are normalised.

With m = max_j s_j the softmax of a row of scores computes e_j = exp(s_j - m) in (0, 1], and e = 1
at least once. The codes are those of e on a fixed grid, and the row is divided by what was rounded:

    c_j = round((2^b - 1) e_j)              out = sum_j c_j v_j / sum_j c_j

The scale 1 / (2^b - 1) cancels and the zero point is 0. Nothing is calibrated, a row of one key or
of a thousand uses all codes, masked keys have the code 0, and the weights of a row sum to one
exactly, as a shift of V needs (`RowsFold`). There is no range beyond the maximum that the softmax
takes anyway. One static range for normalised weights has to serve rows whose largest weight is 1
and rows whose largest is 1/1000; on VAR's twin that is two thirds of PTQ4ARVG's whole error.

Key weights. V is 2 to 8 times larger or smaller at sink tokens than elsewhere, and one scale per
head has to serve both. A scale per key would stand inside the sum over keys; but a factor r on the
values of some keys can move to their numerators:

    sinks:   Q(r v_j), c_j = round((2^b - 1) e_j / r)          r = spread of v past the sinks
    others:  Q(v_j),   c_j = round((2^b - 1) e_j)                  / spread of v at the sinks
    out = sum_j c_j Q(r_j v_j) / sum_j c_j r_j                 r_j = r at sinks, else 1

per head, with m = max_j (s_j - log r_j), so that the largest quotient is 1 again. Without rounding
this is the softmax exactly. At run time it is one number per head added to the scores of sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq.registry.entries import register_format

SPREAD = 0.999  # quantile of |v| that stands for the spread of a head


@register_format("numerators", operands=("softmax",), own_quantizer=True)
class NumeratorQuantizer(nn.Module):
    """Rounds attention weights p (B, H, T, S), normalised or not, as numerators.

    Args:
        levels: number of codes, 2^b. key_weights: r (H,) of the sinks, the first `sinks` keys;
            None leaves all keys alike.
    """

    def __init__(self, levels: int, key_weights: Tensor | None = None, sinks: int = 0) -> None:
        super().__init__()
        self.levels = levels
        self.sinks = sinks
        self.register_buffer("key_weights", key_weights)

    def forward(self, p: Tensor, positions: Tensor | None = None) -> Tensor:
        if self.key_weights is None:
            codes = self._codes(p)  # (B, H, T, S)
            return codes / codes.sum(dim=-1, keepdim=True)
        weights = key_weights_of(self.key_weights, self.sinks, p.shape[-1])[:, None]  # (H, 1, S)
        codes = self._codes(p / weights)  # (B, H, T, S)
        return codes / (codes * weights).sum(dim=-1, keepdim=True)

    def without_rounding(self, p: Tensor, positions: Tensor | None = None) -> Tensor:
        """The softmax (B, H, T, S) that the codes stand for: at sinks divided by key weights."""
        p = p / p.sum(dim=-1, keepdim=True)
        if self.key_weights is None:
            return p
        return p / key_weights_of(self.key_weights, self.sinks, p.shape[-1])[:, None]

    def _codes(self, numerators: Tensor) -> Tensor:
        """Codes 0 .. levels - 1 of rows, whose largest gets the last code."""
        # (B, H, T, 1), not 0, as a row sees a key
        largest = numerators.amax(dim=-1, keepdim=True)
        return torch.round(numerators / largest * (self.levels - 1))


def key_weights_of(weights: Tensor, sinks: int, keys: int) -> Tensor:
    """r_j (H, S) of all keys, from those of the sinks (H,)."""
    is_sink = torch.arange(keys, device=weights.device) < sinks  # (S,)
    return torch.where(is_sink, weights[:, None], torch.ones_like(weights[:, None]))


def fit_key_weights(v: Tensor, is_sink: Tensor) -> Tensor:
    """r (H,) of values v (N, H, D), of which the tokens `is_sink` (N,) are sinks."""
    return spread_of(v[~is_sink]) / spread_of(v[is_sink])


def spread_of(v: Tensor) -> Tensor:
    """Quantile of |v| per head (H,), of values v (N, H, D)."""
    magnitudes = v.abs().transpose(0, 1).flatten(1)  # (H, N * D)
    rank = max(1, round(SPREAD * magnitudes.shape[1]))
    spread = magnitudes.kthvalue(rank, dim=1).values  # (H,)
    return spread.clamp(min=torch.finfo(v.dtype).tiny)
