"""The rounder `gptaq`: GPTQ for the inputs that a weight will see, in two forms.

The layer gets a = Q(x) where x was meant. With H = sum a a^T and C = sum x a^T over the calibration
tokens, the output error sum |W x - Wq a|^2 differs by a constant from that of GPTQ for the weight
W* = W C H^-1. GPTAQ (Li et al., 2025, arXiv 2504.02692) builds on that. Let U be GPTQ's factor,
H^-1 = U^T U, and rows and columns count from 1.

`form=target`, STAQ's: round a weight on the way to W* by GPTQ (`rounded_inputs.py`).

`form=columns`, the paper's: every column brings a residual of its own, w_i (x_i - a_i), which the
columns still to come make up for, as they do for the rounding error of column i:

    D = C - H = sum (x - a) a^T        P = correction (triu(D U^T, 1)) U
    for column i:   e = (w_i - Q(w_i)) / U_ii,     w_j <- w_j - e U_ij + w_i P_ij   for all j > i

Row i of P is D_i,j>i times the inverse of H without its first i rows and columns, which is what the
columns j > i need to match w_i (x_i - a_i) best. Column 1 never moves, unlike in `target`.

This is GPTQ, too. Write v_i for column i when its turn comes, N = diag(U)^-1 U - 1 and q for the
rounded columns; both N and P are strictly upper triangular. The updates add up to
v = w - (v - q) N + v P, and with R = (1 - P)^-1 to

    v (1 + N R) = w R + q N R

which is GPTQ of the weight w R with the factor 1 + N R in place of U. Nothing but target and factor
changes, and no loop of its own is needed.

The authors' code (Intelligent-Computing-Lab-Yale/GPTAQ, `fake_quant/gptaq_utils.py`) multiplies P
by alpha = .25. A comment there speaks of how the sums are collected, but both have the same factor,
and the paper's formula has none: `correction=1` is the paper, `correction=.25` the code. It also
rounds columns as they come; `order=true` takes them by falling diagonal of H, as its option
actorder does. Its dead inputs have their weights set to zero, here they are rounded to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptq.numbers.grouping import params_by_column
from ptq.numbers.numerics import QParams
from ptq.numbers.quantizers import Clip, choose_weight_qparams
from ptq.options import Settings, setting
from ptq.ranges import Flag, Integer, Number, Word
from ptq.recipe import Recipe
from ptq.registry.entries import register_rounder, register_settings
from ptq.rounding import gptq_round
from ptq.spec import QuantSpec
from ptq.staq.positions import compact
from ptq.staq.rounded_inputs import (
    Moments,
    OrderedFactor,
    corrected_target,
    moments_of,
    ordered_factor,
)

if TYPE_CHECKING:
    from ptq.staq.inputs import SiteData


@register_settings("gptaq")
@dataclass(frozen=True)
class GPTAQSettings(Settings):
    """Rounding for rounded inputs.

    Attributes:
        damping, block: as for GPTQ.
        correction: share of the step to the weight that is best for rounded inputs; of
            `columns`, the factor of P.
        form: `target` (STAQ's) or `columns` (the paper's).
        order: of `columns`: take columns by falling diagonal of H. `target` always does.
    """

    damping: float = setting(0.01, Number(0, 100, above=True))
    block: int = setting(128, Integer(1, 65_536))
    correction: float = setting(0.5, Number(0, 1))
    form: str = setting("target", Word("target", "columns"))
    order: bool = setting(False, Flag())


@register_rounder("gptaq", reads="site", integers_only=True)
class InputRounder:
    """The rounder of one site."""

    def __init__(self, recipe: Recipe, data: SiteData) -> None:
        self.recipe = recipe
        self.options = recipe.options.gptaq
        if self.options.form == "columns":
            self.moments = plain_moments(data, recipe)
            self.factor = ordered_factor(
                self.moments.hessian, self.options.damping, self.options.order
            )
        else:
            self.moments = centred_moments(data, recipe.bias_correction)
            self.factor = ordered_factor(self.moments.hessian, self.options.damping)

    def __call__(self, weight: Tensor, clip: Clip | None) -> tuple[Tensor, QParams]:
        spec = self.recipe.weights
        if self.options.form == "columns":
            params = choose_weight_qparams(weight, spec, clip)
            rounded = round_by_columns(
                weight.double(),
                self.moments,
                self.factor,
                exact_params(params, spec, weight),
                spec,
                correction=self.options.correction,
                block=self.options.block,
            )
            return rounded.to(weight.dtype), params
        target = corrected_target(
            weight, self.moments, self.options.correction, self.options.damping
        )
        params = compact(choose_weight_qparams(target, spec, clip))
        rounded = self.factor.round_weight(
            target.double(), exact_params(params, spec, weight), spec, self.options.block
        )
        return rounded.to(weight.dtype), params


def exact_params(params: QParams, spec: QuantSpec, weight: Tensor) -> QParams:
    """The same in float64: errors of early columns pass through all later ones. Parameters of
    groups become those (C, O) of the columns of the weight (O, C), which may be taken in any order.
    """
    exact = QParams(params.scale.double(), params.zero_point.double())
    return params_by_column(exact, spec, weight) if spec.granularity == "group" else exact


def round_by_columns(
    weight: Tensor,
    moments: Moments,
    factor: OrderedFactor,
    params: QParams,
    spec: QuantSpec,
    *,
    correction: float = 1.0,
    block: int = 128,
) -> Tensor:
    """A weight W (O, C), float64, on the grid of `params`, rounded by GPTAQ's `columns`.

    Args:
        params: (O,), or (C, O) of every column its own.
    """
    order = factor.order
    if params.scale.dim() == 2:
        params = params[order]
    u = factor.factor  # (C, C)
    difference = (moments.cross - moments.hessian)[order][:, order]  # D (C, C)
    feedback = correction * (difference @ u.t()).triu(1) @ u  # P (C, C)
    identity = torch.eye(len(u), dtype=u.dtype, device=u.device)
    spread = torch.linalg.solve_triangular(
        identity - feedback, identity, upper=True, unitriangular=True
    )  # R (C, C)
    neighbours = u / u.diagonal()[:, None] - identity  # N (C, C)
    rounded = torch.empty_like(weight)
    rounded[:, order] = gptq_round(
        weight[:, order] @ spread, identity + neighbours @ spread, params, spec, block
    )
    return rounded


def plain_moments(data: SiteData, recipe: Recipe) -> Moments:
    """H and C of a site as the papers have them: all tokens count alike, no mean is taken off.

    Sinks are left out where the recipe leaves them out of its statistics, as for GPTQ.
    """
    exact = data.exact
    rounded = data.rounded
    if data.shift is not None:
        exact = torch.where(data.is_sink[:, None], exact - data.shift, exact)
    if recipe.exclude_sinks:
        kept = ~data.is_sink
        exact = exact[kept]
        rounded = rounded[kept]
    return moments_of(exact, rounded, torch.ones_like(exact[:, 0]))


def centred_moments(data: SiteData, corrects_bias: bool) -> Moments:
    """H and C of a site. Means that a bias will make up for are taken off first."""
    exact = data.exact
    rounded = data.rounded
    if data.shift is not None and not corrects_bias:
        exact = torch.where(data.is_sink[:, None], exact - data.shift, exact)
    if corrects_bias:
        exact = centred(exact, data)
        rounded = centred(rounded, data)
    return moments_of(exact, rounded, data.token_weights)


def centred(x: Tensor, data: SiteData) -> Tensor:
    """x (N, C) without the mean over the tokens, or over the shifted sinks and over the rest."""
    rest_mean, sink_mean = data.means(x)
    if sink_mean is None:
        return x - rest_mean.to(x.dtype)
    mean = torch.where(data.is_sink[:, None], sink_mean.to(x.dtype), rest_mean.to(x.dtype))
    return x - mean
