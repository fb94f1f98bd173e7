"""Static Token-Wise Quantization (STWQ, section 4.2 of the paper): offline parameters per group of
token positions.

The token sequence of an autoregressive generator has a fixed length, and what a token's activations
look like depends on its position far more than on the class. So the scale and zero point of an
activation can be fixed per position offline: sink tokens (RAR's first two, VAR's first, ...) no
longer stretch the range of all others, and inputs of AdaLN projections, which vary from step to
step, get one pair per position. Nothing but a table look-up happens at run time.

    q_t  = clip(round(x_t / scale_g(t)) + zero_g(t), 0, 2^b - 1)      g(t): segment of token t
    x^_t = (q_t - zero_g(t)) * scale_g(t)

STWQ is a granularity (`token_static`) and a quantizer, not a special layer. Which positions form a
segment is the adapter's knowledge (`Site.segments`); sites with one segment are plain per-tensor
ones. With a group size every segment has a pair for each group of channels; operands of attention
(B, H, T, D) can have one for each head and segment (`head_segment`). The released code finds the
group from the number of tokens in a call and from a `current_token` attribute; here the position is
an argument, so a decoding step and the full sequence use the same parameters by construction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq.numbers.numerics import QParams, simulate_format
from ptq.numbers.quantizers import SpreadGroups, StaticQuantizer
from ptq.sites import Segments, Site
from ptq.spec import QuantSpec


def input_spec(site: Site, base: QuantSpec, stwq: bool) -> QuantSpec:
    """How a site's input is quantized: `base`, and token-wise if STWQ is on and the site has
    several segments."""
    if stwq and len(site.segments) > 1:
        return base.at("token_static")
    return base


class TokenStaticQuantizer(nn.Module):
    """Fake quantization of (B, T, C) with the parameters of each token's segment, or of
    (B, H, T, D) with those of its head and segment.

    Args:
        params: one scale and zero point per segment (G,); per segment and group of channels
            (G * K,), or per head and segment (H * G,), in this order.
        segments: groups of positions.
    """

    def __init__(self, spec: QuantSpec, params: QParams, segments: Segments) -> None:
        super().__init__()
        self.spec = spec
        self.segments = segments
        self.register_buffer("scale", params.scale)  # (G,)
        self.register_buffer("zero_point", params.zero_point)  # (G,)
        # the look-up table stops at the last segment, which all positions behind it share
        last = segments.starts[-1]
        group = segments.index(torch.arange(last + 1, device=params.scale.device))  # (last + 1,)
        self.register_buffer("group", group, persistent=False)
        self.spread = SpreadGroups()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        group = self.group[positions.clamp(max=len(self.group) - 1)]  # (T,)
        return simulate_format(x, self.token_params(group, x.shape[-1]), self.spec)

    def token_params(self, group: Tensor, channels: int) -> QParams:
        """Parameters of tokens in segments `group` (T,) as they broadcast: (T, 1), (T, C), or
        (H, T, 1)."""
        params = QParams(self.scale, self.zero_point)
        if self.spec.granularity == "head_segment":
            by_head = params.view(-1, len(self.segments))
            return QParams(by_head.scale[:, group, None], by_head.zero_point[:, group, None])
        if self.spec.group_size is None:
            return params[group].view(-1, 1)
        # (G * K,) -> (G, C)
        by_segment = self.spread(params, len(self.segments), self.spec.group_size, channels)
        return by_segment[group]  # (T, C)


def static_quantizer(spec: QuantSpec, params: QParams, segments: Segments) -> nn.Module:
    """The quantizer with parameters fixed in calibration that a granularity asks for."""
    if spec.granularity in ("token_static", "head_segment"):
        return TokenStaticQuantizer(spec, params, segments)
    return StaticQuantizer(spec, params)
