"""Static parameters per token position, and per head and position: STWQ with segments of one token.

STWQ (`stwq.py`) gives each sink token and each image scale parameters of its own and lets all other
tokens share. The position explains most of a token's range in general, so every position can have
its own pair; at run time that is the same look-up in a longer table. Queries and keys are
quantized per head and position likewise: the scale of a query multiplies a row of the scores and
that of a key a column, so the product of codes stays as it is. The values' scale stands inside the
sum over keys and can differ between heads alone (`numerators.py` has the way around that).

    x^_t = (clip(round(x_t / d_g) + z_g, 0, 2^b - 1) - z_g) d_g,      g = (head, segment of t)

A pair takes 4 bytes: d in bfloat16, z as a 16-bit integer (`compact`). That costs nothing: a scale
that is .2 % larger is one of the candidates a range search does not tell apart, and codes are
computed with exactly the scale that is stored. Rows of weights are stored so, too
(`rounded_inputs.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ptq.numbers.grouping import WHOLE
from ptq.numbers.numerics import QParams, simulate_format
from ptq.numbers.quantizers import choose_qparams
from ptq.sites import Segments
from ptq.spec import QuantSpec

# 16 bits hold it also when codes are signed, zero points with them
ZERO_LIMIT = 2**15 - 1 - 2**7


def segments_of(positions: Tensor) -> Segments:
    """One segment per position that occurs among `positions` (N,); what lies between joins the one
    before."""
    return Segments(tuple(positions.unique().tolist()))


@dataclass(frozen=True)
class CompactQParams(QParams):
    """Pairs of a scale that bfloat16 holds and a zero point that 16 bits hold."""

    pair_bytes: ClassVar[int] = 4


def compact(params: QParams) -> CompactQParams:
    """The same parameters as 4 bytes a pair hold them: the zero point follows the shortened
    scale."""
    scale = params.scale.bfloat16().to(params.scale.dtype)
    # the lower end -z d stays where it was
    zero_point = torch.round(params.zero_point * (params.scale / scale))
    return CompactQParams(scale, zero_point.clamp(-ZERO_LIMIT, ZERO_LIMIT))


def fit_positions(x: Tensor, positions: Tensor, spec: QuantSpec, segments: Segments) -> QParams:
    """Parameters (G,) of the segments, from tokens x (N, C) at positions (N,); of the segments and
    K groups of channels (G * K,) where the spec has groups."""
    params = choose_qparams(x[None], spec.at("token_static"), positions, segments)
    return compact(params)


def fit_heads(x: Tensor, positions: Tensor, spec: QuantSpec, segments: Segments) -> QParams:
    """Parameters (H, G) of heads and segments, from tokens x (N, H, D) at positions (N,)."""
    tokens, heads, _ = x.shape
    # head h of a token at segment g counts as a token of group h * G + g
    shift = torch.arange(heads, device=x.device) * len(segments)  # (H,)
    group = segments.index(positions)[:, None] + shift  # (N, H)
    by_token = spec.at("tensor").at("token_static")  # a head has no groups of channels
    every = Segments(tuple(range(heads * len(segments))))
    params = choose_qparams(x.reshape(1, tokens * heads, -1), by_token, group.flatten(), every)
    params = compact(params)
    return QParams(params.scale.view(heads, -1), params.zero_point.view(heads, -1))


class TableQuantizer(nn.Module):
    """Fake quantization with a table of 4-byte pairs.

    Args:
        params: (G,) for inputs (B, T, C), or (H, G) for operands of attention (B, H, T, D).
        segments: groups of positions.
        key_weights: factor (H,) on the operand of the first `sinks` positions before it is
            quantized (`numerators.py`), or None.
    """

    def __init__(
        self,
        spec: QuantSpec,
        params: QParams,
        segments: Segments = WHOLE,
        key_weights: Tensor | None = None,
        sinks: int = 0,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.segments = segments
        self.sinks = sinks
        self.register_buffer("scale", params.scale)
        self.register_buffer("zero_point", params.zero_point)
        self.register_buffer("key_weights", key_weights)
        starts = torch.tensor(segments.starts, device=params.scale.device)
        self.register_buffer("starts", starts, persistent=False)

    @property
    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the table is made of here, and at rest takes `table_bytes`: a segment per position
        needs no list of starts."""
        return self.scale, self.zero_point, self.starts

    @property
    def table_bytes(self) -> int:
        return CompactQParams.pair_bytes * self.scale.numel()

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        x = self.without_rounding(x, positions)
        return simulate_format(x, self.params_at(positions), self.spec)

    def without_rounding(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """What is rounded: x, at sinks times its key weights."""
        if self.key_weights is None:
            return x
        is_sink = (positions < self.sinks)[:, None]  # (T, 1)
        factor = torch.where(is_sink, self.key_weights[:, None, None], 1)  # (H, T, 1)
        return x * factor

    def params_at(self, positions: Tensor | None) -> QParams:
        """Parameters that broadcast against a call's tensor: (T, 1), or (H, T, 1)."""
        if len(self.segments) == 1:
            return QParams(self.scale[..., None], self.zero_point[..., None])
        # (T,); the clamp takes positions before the first segment into it
        group = (torch.searchsorted(self.starts, positions, right=True) - 1).clamp_(min=0)
        return QParams(self.scale[..., group, None], self.zero_point[..., group, None])
