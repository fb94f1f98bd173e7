"""Rounding a weight for the inputs that it will see: rounded ones.

GPTQ (`rounding.py`) changes the layer's output least for inputs in full precision. The layer gets
a = Q(x) instead. Over calibration tokens t with weights w_t,

    H = sum_t w_t a_t a_t^T / sum w,    C = sum_t w_t x_t a_t^T / sum w      (without the means)

    sum_t w_t |W x_t - Wq a_t|^2  is least for the real-valued  W* = W C H^-1

(GPTAQ, Li et al., 2025), so W* is rounded by GPTQ with this H. The whole step to W* follows the
noise of few rows; half of it,

    W + correction W (C - H)(H + lambda I)^-1,       correction = .5,

is as good or better. The sinks stay in H: left out, the correction found on other tokens does harm
there. Columns are rounded by falling diagonal of H, those that matter while there is most to
make up for them; rows have steps of their own, so the order is free.

Token weights. A sink's output is hundreds of times larger than a token's and would be all that is
seen. Each token counts by the inverse of its segment's mean output energy, w_t = 1 / E_g |W x|^2.

Bias correction. Rounding moves the mean output, which a bias takes back:

    b' = b + W E[x] - Wq E[Q(x)]        over the tokens past the sinks

The same over the sinks gives their own bias row (`sink_shift.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.numbers.numerics import QParams
from ptq.rounding import gptq_round, inverse_factor
from ptq.sites import Segments
from ptq.spec import QuantSpec

CHUNK = 8192  # tokens of a product at a time


def energy_weights(x: Tensor, positions: Tensor, weight: Tensor, segments: Segments) -> Tensor:
    """w (N,) of tokens x (N, C): the inverse of their segment's mean output energy, 1 in the
    last."""
    # (N,)
    energy = torch.cat([(part @ weight.t()).square().mean(dim=1) for part in x.split(CHUNK)])
    group = segments.index(positions)  # (N,)
    sums = energy.new_zeros(len(segments)).index_add_(0, group, energy)  # (G,)
    counts = torch.bincount(group, minlength=len(segments))
    # (G,); clamped, as a segment may be empty
    means = (sums / counts.clamp(min=1)).clamp(min=torch.finfo(energy.dtype).tiny)
    last = means[counts > 0][-1]  # the unit
    return (last / means)[group]


def weighted_mean(x: Tensor, weights: Tensor) -> Tensor:
    """Mean (C,) in float64 of tokens x (N, C) with weights (N,)."""
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    for part, w in zip(x.split(CHUNK), weights.split(CHUNK)):
        total += (w @ part).double()  # float64 across chunks, the inputs' type within
    return total / weights.sum().double()


@dataclass(frozen=True)
class Moments:
    """Second moments (C, C) in float64 of inputs x and of what rounding makes of them, a.

    Attributes:
        hessian: of a with itself. cross: of x with a.
    """

    hessian: Tensor
    cross: Tensor


def moments_of(x: Tensor, rounded: Tensor, weights: Tensor) -> Moments:
    """H and C of inputs x (N, C) and of what rounding makes of them (N, C), for token weights
    (N,)."""
    channels = x.shape[1]
    hessian = x.new_zeros(channels, channels, dtype=torch.float64)
    cross = torch.zeros_like(hessian)
    for exact, a, w in zip(x.split(CHUNK), rounded.split(CHUNK), weights.split(CHUNK)):
        weighted = a * w[:, None]  # (n, C)
        hessian += (a.t() @ weighted).double()
        cross += (exact.t() @ weighted).double()
    total = weights.sum().double()
    return Moments(hessian / total, cross / total)


def corrected_target(weight: Tensor, moments: Moments, correction: float, damping: float) -> Tensor:
    """W + correction W (C - H)(H + lambda I)^-1, (O, C)."""
    hessian = moments.hessian
    damped = hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * (
        damping * hessian.diagonal().mean() + torch.finfo(hessian.dtype).tiny
    )
    step = weight.double() @ (moments.cross - hessian)  # (O, C)
    # X H = step with H symmetric is H X^T = step^T
    solved = torch.linalg.solve(damped, step.t()).t()
    return (weight.double() + correction * solved).to(weight.dtype)


@dataclass(frozen=True)
class OrderedFactor:
    """GPTQ's factor U for columns taken in `order`."""

    order: Tensor
    factor: Tensor

    def round_weight(self, weight: Tensor, params: QParams, spec: QuantSpec, block: int) -> Tensor:
        """The weight (O, C) on the grid of its rows' `params` (O,), or (C, O) of every column."""
        if params.scale.dim() == 2:
            params = params[self.order]
        rounded = torch.empty_like(weight)
        # back to the columns' own places
        rounded[:, self.order] = gptq_round(weight[:, self.order], self.factor, params, spec, block)
        return rounded


def ordered_factor(
    hessian: Tensor, damping: float, by_diagonal: bool = True, rounder: str = "gptaq"
) -> OrderedFactor:
    """The factor for H (C, C) and columns by its falling diagonal, or as they come."""
    order = torch.arange(len(hessian), device=hessian.device)  # (C,)
    if by_diagonal:
        order = hessian.diagonal().argsort(descending=True)
    return OrderedFactor(order, inverse_factor(hessian[order][:, order], damping, rounder))
