"""What can sit in front of a quantized product: nothing, a static or a dynamic quantizer.

All map (x, positions) to x. The remaining one, static per token position, is
`stwq.TokenStaticQuantizer`. `choose_qparams` finds parameters from a tensor that is there whole,
`observers.py` from one that streams.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq.numbers import numerics
from ptq.numbers.grouping import WHOLE, broadcast_params, merge_groups, split_groups
from ptq.numbers.numerics import QParams, Ranges, percentile_ranges
from ptq.numbers.range_grid import search_ranges
from ptq.sites import Segments
from ptq.spec import QuantSpec


class Passthrough(nn.Module):
    """Full precision."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return x


class StaticQuantizer(nn.Module):
    """Fake quantization with parameters fixed in calibration, per tensor or per channel."""

    def __init__(self, spec: QuantSpec, params: QParams) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("scale", params.scale)
        self.register_buffer("zero_point", params.zero_point)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        params = broadcast_params(QParams(self.scale, self.zero_point), self.spec)
        return numerics.simulate_format(x, params, self.spec)


class DynamicQuantizer(nn.Module):
    """Fake quantization with a min-max range per token of x (..., C), found at run time."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        lo = x.amin(dim=-1, keepdim=True)  # (..., 1)
        hi = x.amax(dim=-1, keepdim=True)  # (..., 1)
        params = numerics.params_from_range(lo, hi, self.spec)
        return numerics.simulate_format(x, params, self.spec)


def choose_qparams(
    x: Tensor,
    spec: QuantSpec,
    positions: Tensor | None = None,
    segments: Segments = WHOLE,
    ranges_of: Ranges = percentile_ranges,
) -> QParams:
    """Parameters from one tensor that holds all calibration values.

    Args:
        positions: token positions (T,) of x, for the granularity `token_static`.
        segments: their groups.
        ranges_of: gives the candidate ranges of the percentile search.

    Raises:
        NonFiniteError: x contains NaN or infinity.
    """
    parts: list[tuple[Tensor, QParams]] = []
    for ids, values in split_groups(x, spec.granularity, positions, segments):
        if spec.range == "grid":
            parts.append((ids, search_ranges(values, spec)))
        else:
            parts.append((ids, numerics.choose_group_qparams(values, spec, ranges_of)))
    return merge_groups(parts)


@dataclass(frozen=True)
class Clip:
    """How far the range of every row of a weight is drawn in towards zero.

    Where zero is not in the range, it is drawn in towards the end that is nearer to zero.

    Attributes:
        low, high: logits (O,) of the share of either end that is left.
    """

    low: Tensor
    high: Tensor

    def params(self, weight: Tensor, spec: QuantSpec) -> QParams:
        """Parameters (O,) of a weight (O, I)."""
        # `aminmax` has no derivative in older PyTorch
        lo = weight.amin(dim=1)  # (O,)
        hi = weight.amax(dim=1)  # (O,)
        # (O,), what both ends are drawn towards: 0, or the weight nearest to it
        fixed = torch.zeros_like(lo).clamp(lo, hi)
        clipped_lo = fixed + self.low.sigmoid() * (lo - fixed)
        clipped_hi = fixed + self.high.sigmoid() * (hi - fixed)
        return numerics.params_from_range(clipped_lo, clipped_hi, spec)


def fake_quantize_weight(
    weight: Tensor, spec: QuantSpec, clip: Clip | None = None
) -> tuple[Tensor, QParams]:
    """A weight (O, I) rounded to nearest, and its parameters (O,).

    The parameters follow the spec's range rule, or a clipping.
    """
    params = choose_qparams(weight, spec) if clip is None else clip.params(weight, spec)
    rounded = numerics.simulate_format(weight, broadcast_params(params, spec), spec)
    return rounded, params
