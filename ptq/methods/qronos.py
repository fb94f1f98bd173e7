"""The rounder `qronos` (Zhang et al., 2026, arXiv 2505.11695): errors of the past and of the layers
before are made up for, column by column.

The layer gets a where x was meant (rounded inputs, from a model that is rounded so far). Every
column is rounded where the error sum |W x - Wq a|^2 asks for, and then all columns still to come
are chosen anew, as real numbers:

    q_i  = Q(argmin_u  sum |W x - q_1 a_1 - .. - u a_i - w_i+1 a_i+1 - ..|^2)
    w_>i =   argmin_v  sum |W x - q_1 a_1 - .. - q_i a_i - v a_>i|^2

With H = sum a a^T, C = sum x a^T, both argmins of the first column are

    z = (W C_1 - W_>1 H_>1,1) / H_11,  q_1 = Q(z),     w_>1 = (W C_>1 - q_1 H_1,>1) (H_>1,>1)^-1

After that w_>i is best for all that was rounded, so column i + 1 is best where it is, and the step
that follows is GPTQ's. In terms of the least-squares weight W* = W C H^-1, of GPTQ's factor U
(H^-1 = U^T U) and of n = U_1 / U_11, the columns >1 behind q_1 are W*_>1 - (W*_1 - q_1) n_>1, which
GPTQ reaches from any weight T with T - T_1 n = W* - W*_1 n. So Qronos is GPTQ of

    T = W* - (W*_1 - z) n

the least-squares weight, but for where its first column is rounded. STAQ's and GPTAQ's targets
(`../staq/gptaq.py`) differ from it by that alone, and by how far they go.

The authors' code (Xilinx/brevitas, `graph/qronos.py`) adds 1e-6 of the largest eigenvalue to the
diagonals of H and C, as here; z is of the undamped ones. It takes columns by falling diagonal where
asked to (`order`), and sets weights of dead inputs to zero; here they are rounded to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptq.numbers.numerics import QParams
from ptq.numbers.quantizers import Clip, choose_weight_qparams
from ptq.options import Settings, setting
from ptq.ranges import Flag, Integer, Number
from ptq.recipe import Recipe
from ptq.registry.entries import register_rounder, register_settings
from ptq.staq.gptaq import exact_params, plain_moments
from ptq.staq.rounded_inputs import Moments, OrderedFactor, corrected_target, ordered_factor

if TYPE_CHECKING:
    from ptq.staq.inputs import SiteData


@register_settings("qronos")
@dataclass(frozen=True)
class QronosSettings(Settings):
    """Qronos rounding.

    Attributes:
        damping: share of the largest eigenvalue of H that is added to its diagonal.
        block: columns per lazy update.
        order: take columns by falling diagonal of H.
    """

    damping: float = setting(1e-6, Number(0, 100, above=True))
    block: int = setting(128, Integer(1, 65_536))
    order: bool = setting(True, Flag())


@register_rounder("qronos", reads="site", integers_only=True)
class QronosRounder:
    """The rounder of one site."""

    def __init__(self, recipe: Recipe, data: SiteData) -> None:
        self.spec = recipe.weights
        self.block = recipe.options.qronos.block
        self.moments = plain_moments(data, recipe)
        self.damping = mean_damping(self.moments.hessian, recipe.options.qronos.damping)
        self.factor = ordered_factor(
            self.moments.hessian, self.damping, recipe.options.qronos.order, "qronos"
        )

    def __call__(self, weight: Tensor, clip: Clip | None) -> tuple[Tensor, QParams]:
        params = choose_weight_qparams(weight, self.spec, clip)
        target = qronos_target(weight.double(), self.moments, self.factor, self.damping)
        rounded = self.factor.round_weight(
            target, exact_params(params, self.spec, weight), self.spec, self.block
        )
        return rounded.to(weight.dtype), params


def mean_damping(hessian: Tensor, damping: float) -> float:
    """A share of the largest eigenvalue of H (C, C) as a share of its mean diagonal."""
    mean = float(hessian.diagonal().mean())
    if mean == 0:
        return damping
    return damping * float(torch.linalg.eigvalsh(hessian)[-1]) / mean


def qronos_target(
    weight: Tensor, moments: Moments, factor: OrderedFactor, damping: float
) -> Tensor:
    """T (O, C), the weight that Qronos rounds by GPTQ, of W (O, C) in float64.

    Args:
        damping: share of the mean diagonal, the same that `factor` was made with.
    """
    target = corrected_target(weight, moments, 1.0, damping)  # W* (O, C)
    first = factor.order[0]
    energy = moments.hessian[first, first]
    if energy == 0:  # the input is dead, nothing depends on this column
        return target
    missed = weight @ (moments.cross - moments.hessian)[:, first]  # (O,)
    rounded_at = weight[:, first] + missed / energy  # z (O,)
    neighbours = torch.empty_like(factor.factor[0])
    neighbours[factor.order] = factor.factor[0] / factor.factor[0, 0]  # n (C,), in places of W
    return target - torch.outer(target[:, first] - rounded_at, neighbours)
