"""Pure quantization numerics on tensors: affine codes, ranges, and the percentile search.

Everything works on groups: a matrix (G, n) whose rows are the values that share one scale and zero
point. `grouping.py` turns tensors of any granularity into such matrices.

    q  = clip(round(x / scale) + zero_point, 0, 2^b - 1)        x^ = (q - zero_point) * scale
    scale = (hi - lo) / (2^b - 1)                               zero_point = round(-lo / scale)

As in the released PTQ4ARVG code the zero point is an integer but may lie outside [0, 2^b - 1] (a
range that excludes zero), and the range is chosen among three two-sided percentiles by mean squared
error (`percentile_mse`). Other number formats (`formats.py`) take their scale from the same search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ptq.registry.entries import FORMATS, register_format
from ptq.spec import QuantSpec

PERCENTILES = (0.999, 0.9999, 0.99999)
# `percentile_ranges` or one like it
Ranges = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
# smallest scale relative to the largest magnitude of a group: zero points stay below 2^31
_EPS = 1e-9


class NonFiniteError(ValueError):
    """Values to be quantized contain NaN or infinity. The message is one line."""


@dataclass(frozen=True)
class QParams:
    """Scale and zero point, one per group: both (G,), the zero point integral."""

    scale: Tensor
    zero_point: Tensor
    pair_bytes: ClassVar[int] = 8  # at rest: float32 and int32

    def __getitem__(self, index: Tensor | slice | int) -> QParams:
        return QParams(self.scale[index], self.zero_point[index])

    def view(self, *shape: int) -> QParams:
        return QParams(self.scale.view(*shape), self.zero_point.view(*shape))


def join_params(parts: Iterable[QParams]) -> QParams:
    """Parameters of groups that stand one part after the other."""
    scales = []
    zero_points = []
    for params in parts:
        scales.append(params.scale)
        zero_points.append(params.zero_point)
    return QParams(torch.cat(scales), torch.cat(zero_points))


def quantize(x: Tensor, params: QParams, levels: int) -> Tensor:
    """Integer codes in [0, levels - 1], as floats, of x with broadcastable parameters."""
    return (torch.round(x / params.scale) + params.zero_point).clamp_(0, levels - 1)


def dequantize(codes: Tensor, params: QParams) -> Tensor:
    return (codes - params.zero_point) * params.scale


def fake_quantize(x: Tensor, params: QParams, levels: int) -> Tensor:
    """x as the integer computation sees it, with broadcastable parameters."""
    return dequantize(quantize(x, params, levels), params)


def simulate_format(x: Tensor, params: QParams, spec: QuantSpec) -> Tensor:
    """x as a computation in the spec's number format sees it, with broadcastable parameters."""
    if spec.format == "int":
        return fake_quantize(x, params, spec.levels)
    return FORMATS[spec.format].kind.simulate(x, params, spec)


def params_from_range(lo: Tensor, hi: Tensor, spec: QuantSpec) -> QParams:
    """Parameters for ranges lo, hi (G,).

    A group without extent (all values equal) gets the scale that represents its value up to
    rounding: |value| if it is not zero, else 1, so that nothing divides by zero.
    """
    if spec.include_zero:
        # 1e-8 stands for zero
        lo = lo.clamp(max=1e-8)
        hi = hi.clamp(min=-1e-8)
    if spec.format != "int":
        return FORMATS[spec.format].kind.choose_params(lo, hi, spec)
    magnitude = torch.maximum(lo.abs(), hi.abs())  # (G,)
    if spec.symmetric:
        half = 2 ** (spec.bits - 1)
        scale = one_for_zero(magnitude / (half - 1))
        return QParams(scale, torch.full_like(scale, half))
    scale = (hi - lo) / (spec.levels - 1)
    flat = scale <= magnitude * _EPS
    scale = torch.where(flat, one_for_zero(magnitude), scale)
    return QParams(scale, torch.round(-lo / scale))


@register_format("int")
class Integers:
    """The integer grid, as other formats are registered; without a way through the registry it is
    what the functions above do."""

    choose_params = staticmethod(params_from_range)
    simulate = staticmethod(simulate_format)


def one_for_zero(scale: Tensor) -> Tensor:
    """The scale, and 1 where it is not positive."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def group_extrema(values: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value (G,) of each group (G, n)."""
    lo, hi = values.aminmax(dim=1)
    return lo, hi


def finite_extrema(values: Tensor) -> tuple[Tensor, Tensor]:
    """The same, of values that have to be finite.

    Raises:
        NonFiniteError: values contain NaN or infinity.
    """
    lo, hi = group_extrema(values)
    if not bool(torch.isfinite(lo).all() & torch.isfinite(hi).all()):
        raise NonFiniteError(
            "values to quantize: NaN or infinity found, only finite numbers are allowed"
        )
    return lo, hi


def tail_size(n: int) -> int:
    """How many order statistics of each tail the percentiles of n values need."""
    return min(n, int((1 - PERCENTILES[0]) * (n - 1)) + 2)


def percentile_ranges(low: Tensor, high: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Candidate ranges from the tails of groups of n values.

    Args:
        low: the k smallest values ascending, (G, k). high: the k largest descending, (G, k). k >=
            tail_size(n).

    Returns:
        lo, hi (3, G) for the three percentiles, interpolated linearly between order statistics
        (`torch.quantile`).
    """
    los = []
    his = []
    for p in PERCENTILES:
        rank = (1 - p) * (n - 1)  # of the order statistic, counted from either end
        below = int(rank)
        above = min(below + 1, n - 1)
        weight = rank - below
        los.append(torch.lerp(low[:, below], low[:, above], weight))
        his.append(torch.lerp(high[:, below], high[:, above], weight))
    return torch.stack(los), torch.stack(his)


def group_tails(values: Tensor) -> tuple[Tensor, Tensor]:
    """What `percentile_ranges` needs: smallest ascending, largest descending, (G, k) each."""
    k = tail_size(values.shape[1])
    smallest = values.topk(k, dim=1, largest=False).values
    largest = values.topk(k, dim=1).values
    return smallest, largest


def candidate_params(los: Tensor, his: Tensor, spec: QuantSpec) -> list[QParams]:
    """Parameters for candidate ranges los, his (c, G), candidate by candidate."""
    return [params_from_range(lo, hi, spec) for lo, hi in zip(los, his)]


def squared_errors(values: Tensor, candidates: list[QParams], spec: QuantSpec) -> Tensor:
    """Sums of squared errors (candidates, G), in float64, of quantizing values (G, n)."""
    errors: list[Tensor] = []
    for candidate in candidates:
        error = simulate_format(values, candidate.view(-1, 1), spec) - values  # (G, n)
        errors.append(error.pow_(2).sum(dim=1, dtype=torch.float64))
    return torch.stack(errors)


def pick_least_error(candidates: list[QParams], errors: Tensor) -> QParams:
    """Of candidates with errors (c, G), per group the first that has the least error."""
    best = candidates[0]
    least = errors[0]
    for candidate, error in zip(candidates[1:], errors[1:]):
        better = error < least
        best = QParams(
            torch.where(better, candidate.scale, best.scale),
            torch.where(better, candidate.zero_point, best.zero_point),
        )
        least = torch.minimum(least, error)
    return best


def choose_group_qparams(
    values: Tensor, spec: QuantSpec, ranges_of: Ranges = percentile_ranges
) -> QParams:
    """Parameters of groups (G, n) by the spec's range rule; `ranges_of` gives the candidates.

    Raises:
        NonFiniteError: values contain NaN or infinity.
    """
    lo, hi = finite_extrema(values)
    if spec.range == "minmax":
        return params_from_range(lo, hi, spec)
    los, his = ranges_of(*group_tails(values), values.shape[1])  # (3, G) each
    candidates = candidate_params(los, his, spec)
    return pick_least_error(candidates, squared_errors(values, candidates, spec))
