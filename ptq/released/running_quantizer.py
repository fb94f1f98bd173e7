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

    def place(p: float) -> tuple[int, int, float]:
        rank = torch.tensor(p, dtype=low.dtype if n <= LARGEST else torch.float64) * (n - 1)
        below = int(rank)
        return below, min(below + 1, n - 1), float(rank - below)

    los = []
    his = []
    last = high.shape[1] - 1
    for p in PERCENTILES:
        below, above, weight = place(1 - p)
        los.append(torch.lerp(low[:, min(below, last)], low[:, min(above, last)], weight))
        below, above, weight = place(p)
        his.append(
            torch.lerp(high[:, min(n - 1 - below, last)], high[:, min(n - 1 - above, last)], weight)
        )
    return torch.stack(los), torch.stack(his)


def choose_released_qparams(
    x: Tensor, spec: QuantSpec, positions: Tensor | None = None, segments: Segments = WHOLE
) -> QParams:
    """Parameters from one tensor."""
    return choose_qparams(x, spec, positions, segments, quantile_ranges)


def running_average(new: Tensor, old: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """0.1 new + 0.9 old in the arithmetic of `dtype`; the first value stands for the old one
    too."""
    wide = new.dtype
    new, old = new.to(dtype or wide), (new if old is None else old).to(dtype or wide)
    return (0.1 * new + 0.9 * old).to(wide)


class RunningQuantizer(nn.Module):
    """A quantizer that takes its parameters from every call until it is frozen; leading `sinks`
    tokens pass untouched.

    Args:
        averaging: average over the calls instead of keeping the last one's. dtype: what parameters
            are rounded to then.
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
        kept = x
        if self.sinks:
            kept = x[:, self.sinks :]
            positions = None
        if not self.frozen:
            self.update(choose_released_qparams(kept, self.spec, positions, self.segments))
        quantized = self.quantizer()(kept, positions)
        return torch.cat((x[:, : self.sinks], quantized), dim=1) if self.sinks else quantized

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
