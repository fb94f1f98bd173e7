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
from ptq.numbers.grouping import (
    WHOLE,
    cut_rows,
    merge_groups,
    params_of_channels,
    params_of_columns,
    split_columns,
    split_groups,
    spread_groups,
)
from ptq.numbers.numerics import QParams, Ranges, percentile_ranges
from ptq.numbers.range_grid import search_ranges
from ptq.registry.entries import FORMATS
from ptq.sites import Segments
from ptq.spec import QuantSpec


class Passthrough(nn.Module):
    """Full precision."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return x


class SpreadGroups:
    """Parameters of groups as those of their channels, made once for as long as they stay."""

    def __init__(self) -> None:
        self.made_of: Tensor | None = None
        self.params: QParams | None = None

    def __call__(self, params: QParams, rows: int, size: int, channels: int) -> QParams:
        """Parameters (rows * G,) as (rows, channels)."""
        is_known = self.made_of is params.scale
        if not is_known or self.params.scale.shape[-1] != channels:
            self.params = spread_groups(params.view(rows, -1), size, channels)
            self.made_of = params.scale
        return self.params


class StaticQuantizer(nn.Module):
    """Fake quantization with parameters (G,) fixed in calibration: per tensor, channel, group of
    channels, or head."""

    def __init__(self, spec: QuantSpec, params: QParams) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("scale", params.scale)
        self.register_buffer("zero_point", params.zero_point)
        self.spread = SpreadGroups()

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        params = QParams(self.scale, self.zero_point)
        if self.spec.granularity == "group":
            params = self.spread(params, 1, self.spec.group_size, x.shape[-1])[0]
        else:
            params = params_of_channels(params, self.spec, x)
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


class GroupQuantizer(nn.Module):
    """Fake quantization with a range per token and group of channels of x (..., C), found at run
    time.

    Args:
        whole: scale () of the tensor, fixed in calibration, where the format has one.
    """

    def __init__(self, spec: QuantSpec, whole: Tensor | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("whole", whole)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        length = x.shape[-1]
        size = min(self.spec.group_size, length)
        missing = -length % size
        if missing:  # the last value again, which changes no range
            x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], missing)), dim=-1)
        rounded = self.round_groups(x.unflatten(-1, (-1, size))).flatten(-2)
        return rounded[..., :length] if missing else rounded

    def round_groups(self, values: Tensor) -> Tensor:
        """Groups of values (..., G, g), rounded."""
        lo = values.amin(dim=-1, keepdim=True)  # (..., G, 1)
        hi = values.amax(dim=-1, keepdim=True)  # (..., G, 1)
        if self.whole is None:
            params = numerics.params_from_range(lo, hi, self.spec)
        else:
            kind = FORMATS[self.spec.format].kind
            params = kind.choose_params(lo, hi, self.spec, self.whole)
        return numerics.simulate_format(values, params, self.spec)


def run_time_quantizer(spec: QuantSpec, largest: Tensor | None = None) -> nn.Module:
    """The quantizer of an activation whose ranges are found at run time, or nothing where the
    activation is left as it is.

    Args:
        largest: magnitude () of the whole activation in calibration, for formats with a scale of
            the tensor; without it every call has its own.
    """
    if not spec.is_rounded:
        return Passthrough()
    spec = spec.at_run_time()
    if spec.group_size is None:
        return DynamicQuantizer(spec)
    number_format = FORMATS[spec.format]
    if largest is None or not number_format.tensor_scale:
        return GroupQuantizer(spec)
    return GroupQuantizer(spec, number_format.kind.tensor_scale(-largest, largest))


def choose_qparams(
    x: Tensor,
    spec: QuantSpec,
    positions: Tensor | None = None,
    segments: Segments = WHOLE,
    ranges_of: Ranges = percentile_ranges,
) -> QParams:
    """Parameters from one tensor that holds all calibration values.

    Args:
        positions: token positions (T,) of x, for granularities by token positions.
        segments: their groups.
        ranges_of: gives the candidate ranges of the percentile search.

    Raises:
        NonFiniteError: x contains NaN or infinity.
    """
    groups = split_groups(x, spec.granularity, positions, segments, spec.group_size)
    return merge_groups([(ids, choose_by_rule(values, spec, ranges_of)) for ids, values in groups])


def choose_by_rule(
    values: Tensor, spec: QuantSpec, ranges_of: Ranges = percentile_ranges
) -> QParams:
    """Parameters (G,) of groups of values (G, n) by any range rule.

    Raises:
        NonFiniteError: values contain NaN or infinity.
    """
    if spec.range == "grid":
        return search_ranges(values, spec)
    return numerics.choose_group_qparams(values, spec, ranges_of)


@dataclass(frozen=True)
class Clip:
    """How far the range of every row of a weight, or of every group of columns in it, is drawn in
    towards zero.

    Where zero is not in the range, it is drawn in towards the end that is nearer to zero.

    Attributes:
        low, high: logits (O,), or (O * G,) of G groups a row, of the share of either end that is
            left.
    """

    low: Tensor
    high: Tensor

    def params(self, weight: Tensor, spec: QuantSpec) -> QParams:
        """Parameters (O,), or (O * G,), of a weight (O, I)."""
        parts = [weight[:, None]]  # (O, G, g) each
        if spec.granularity == "group":
            parts = cut_rows(weight, spec.group_size)
        # `aminmax` has no derivative in older PyTorch
        lo = torch.cat([part.amin(dim=2) for part in parts], dim=1).flatten()
        hi = torch.cat([part.amax(dim=2) for part in parts], dim=1).flatten()
        # what both ends are drawn towards: 0, or the weight nearest to it
        fixed = torch.zeros_like(lo).clamp(lo, hi)
        clipped_lo = fixed + self.low.sigmoid() * (lo - fixed)
        clipped_hi = fixed + self.high.sigmoid() * (hi - fixed)
        return numerics.params_from_range(clipped_lo, clipped_hi, spec)


def choose_weight_qparams(weight: Tensor, spec: QuantSpec, clip: Clip | None = None) -> QParams:
    """Parameters of a weight (O, I): (O,), (1,), or (O * G,) of G groups of columns a row.

    They follow the spec's range rule, or a clipping.

    Raises:
        NonFiniteError: the weight contains NaN or infinity.
    """
    if clip is not None:
        return clip.params(weight, spec)
    if spec.granularity != "group":
        return choose_qparams(weight, spec)
    groups = split_columns(weight, spec.group_size)
    if not FORMATS[spec.format].tensor_scale:
        return merge_groups([(ids, choose_by_rule(values, spec)) for ids, values in groups])
    extrema = [numerics.finite_extrema(values) for _, values in groups]
    lo = torch.cat([part for part, _ in extrema])
    hi = torch.cat([part for _, part in extrema])
    # one scale of the tensor for all its groups
    params = numerics.params_from_range(lo, hi, spec)
    ids = torch.cat([part for part, _ in groups])
    return merge_groups([(ids, params)])


def fake_quantize_weight(
    weight: Tensor, spec: QuantSpec, clip: Clip | None = None
) -> tuple[Tensor, QParams | None]:
    """A weight (O, I) rounded to nearest, and its parameters: (O,), (1,), or (O * G,) of G groups
    of columns a row.

    The parameters follow the spec's range rule, or a clipping. A weight that is left as it is has
    none.
    """
    if not spec.is_rounded:
        return weight, None
    params = choose_weight_qparams(weight, spec, clip)
    return round_weight(weight, params, spec), params


def round_weight(weight: Tensor, params: QParams, spec: QuantSpec) -> Tensor:
    """A weight (O, I) rounded to nearest with parameters that are known."""
    return numerics.simulate_format(weight, params_of_columns(params, spec, weight), spec)
