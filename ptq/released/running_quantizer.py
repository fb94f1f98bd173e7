"""How the released code finds parameters: in every calibrating call, with percentile ranks in
float32, and averaged.

The released code asks `torch.quantile` for its percentiles, which computes the rank p (n - 1) in
the values' type. In float32 that moves a range by up to a millionth, enough for some activation to
be rounded the other way, and behind one such flip everything moves. To meet its intermediate
numbers the ranks here are float32 too. Groups of more than 2^24 values, which `torch.quantile`
refuses, go to `numpy.percentile` there and have float64 ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq.numbers.grouping import WHOLE
from ptq.numbers.numerics import PERCENTILES, QParams
from ptq.numbers.quantizers import choose_qparams
from ptq.sites import Segments
from ptq.spec import QuantSpec
from ptq.stwq import static_quantizer

LARGEST = 2**24  # values that `torch.quantile` takes


def quantile_ranges(low: Tensor, high: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`numerics.percentile_ranges` with ranks in the type of the values: exactly the numbers of
    `torch.quantile`."""

    rank_dtype = low.dtype if n <= LARGEST else torch.float64

    def locate_rank(percentile: float) -> tuple[int, int, float]:
        rank = torch.tensor(percentile, dtype=rank_dtype) * (n - 1)
        below = int(rank)
        return below, min(below + 1, n - 1), float(rank - below)

    los: list[Tensor] = []
    his: list[Tensor] = []
    last = high.shape[1] - 1
    for percentile in PERCENTILES:
        below, above, weight = locate_rank(1 - percentile)
        los.append(torch.lerp(low[:, min(below, last)], low[:, min(above, last)], weight))
        below, above, weight = locate_rank(percentile)
        # the tail at the upper end begins with the largest value
        high_below = high[:, min(n - 1 - below, last)]
        high_above = high[:, min(n - 1 - above, last)]
        his.append(torch.lerp(high_below, high_above, weight))
    return torch.stack(los), torch.stack(his)


def choose_released_qparams(
    x: Tensor, spec: QuantSpec, positions: Tensor | None = None, segments: Segments = WHOLE
) -> QParams:
    """Parameters from one tensor."""
    return choose_qparams(x, spec, positions, segments, quantile_ranges)


def running_average(new: Tensor, old: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """0.1 new + 0.9 old in the arithmetic of `dtype`; without an old value the new one stands
    in."""
    if old is None:
        old = new
    wide = new.dtype
    narrow = dtype or wide
    return (0.1 * new.to(narrow) + 0.9 * old.to(narrow)).to(wide)


class RunningQuantizer(nn.Module):
    """A quantizer that takes its parameters from every call until it is frozen.

    Args:
        sinks: so many leading tokens pass untouched.
        averaging: average over the calls instead of keeping the last one's parameters.
        dtype: what averaged parameters are rounded to.
    """

    def __init__(
        self,
        spec: QuantSpec,
        segments: Segments = WHOLE,
        sinks: int = 0,
        averaging: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.segments = segments
        self.sinks = sinks
        self.averaging = averaging
        self.dtype = dtype
        self.params: QParams | None = None
        self.frozen = False

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        others = x
        if self.sinks:
            others = x[:, self.sinks :]
            positions = None  # inputs without their sinks are quantized per channel
        if not self.frozen:
            self.update(choose_released_qparams(others, self.spec, positions, self.segments))
        quantized = self.quantizer()(others, positions)
        if not self.sinks:
            return quantized
        return torch.cat((x[:, : self.sinks], quantized), dim=1)

    def update(self, new: QParams) -> None:
        if self.averaging:
            old = self.params or new
            new = QParams(
                running_average(new.scale, old.scale, self.dtype),
                running_average(new.zero_point, old.zero_point, self.dtype),
            )
        self.params = new

    def quantizer(self) -> nn.Module:
        return static_quantizer(self.spec, self.params, self.segments)
