"""What can sit in front of a quantized product: nothing, a static or a dynamic quantizer. All map
(x, positions) to x.

The remaining one, static per token position, is `stwq.TokenStaticQuantizer`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq.numbers import numerics
from ptq.numbers.grouping import WHOLE, broadcast_params, merge_groups, split_groups
from ptq.numbers.numerics import QParams, Ranges, percentile_ranges
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
    """Fake quantization with a min-max range per token, found at run time: x (..., C), one range
    per last dimension."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        lo = x.amin(dim=-1, keepdim=True)
        hi = x.amax(dim=-1, keepdim=True)
        return numerics.simulate_format(x, numerics.params_from_range(lo, hi, self.spec), self.spec)


def choose_qparams(
    x: Tensor,
    spec: QuantSpec,
    positions: Tensor | None = None,
    segments: Segments = WHOLE,
    ranges_of: Ranges = percentile_ranges,
) -> QParams:
    """Parameters from one tensor that holds all calibration values."""
    return merge_groups(
        [
            (ids, numerics.choose_group_qparams(values, spec, ranges_of))
            for ids, values in split_groups(x, spec.granularity, positions, segments)
        ]
    )


@dataclass(frozen=True)
class Clip:
    """How far the range of every row of a weight is drawn in towards zero, as logits (O,) of what
    is left of its ends.

    Where zero is not in the range, it is drawn in towards the end that is nearer to zero.
    """

    low: Tensor
    high: Tensor

    def params(self, weight: Tensor, spec: QuantSpec) -> QParams:
        """Parameters (O,) of a weight (O, I)."""
        # `aminmax` has no derivative in older PyTorch
        lo = weight.amin(dim=1)
        hi = weight.amax(dim=1)
        fixed = torch.zeros_like(lo).clamp(lo, hi)
        return numerics.params_from_range(
            fixed + self.low.sigmoid() * (lo - fixed),
            fixed + self.high.sigmoid() * (hi - fixed),
            spec,
        )


def fake_quantize_weight(
    weight: Tensor, spec: QuantSpec, clip: Clip | None = None
) -> tuple[Tensor, QParams]:
    """A weight (O, I) rounded to nearest, and its parameters (O,), by the spec's range rule or by a
    clipping."""
    params = choose_qparams(weight, spec) if clip is None else clip.params(weight, spec)
    return numerics.simulate_format(weight, broadcast_params(params, spec), spec), params
