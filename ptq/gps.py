"""Gain-Projected Scaling (GPS, section 4.1 of the paper): the per-channel scale that balances both rounding errors.

Setting. Activations have one scale per tensor, weights one per output row; s acts as x' = x / s, W' = W diag(s).
Let k be the channel with the widest activation range. After scaling, the activation step is set by channel k, so every
channel's rounding error dx_i is divided by s_k; the weight step grows by s_k, so every dW_i is multiplied by s_k
(paper, Eq. 10 and Remark 1). With u_i = s_i / s_k, channel i's part of the output error to second order is

    loss_i(u) = u^2 A_i + B_i / u^2,    A_i = sum dx_i^2 sum What_i^2,    B_i = sum x_i^2 sum dW_i^2.

Its derivative vanishes at u^4 = B_i / A_i, where loss_i = 2 sqrt(A_i B_i):

    s_i = s_k (sum x_i^2 sum dW_i^2 / (sum dx_i^2 sum What_i^2))^(1/4),    s_k = sqrt(R_x^k / R_W^k).   (form `squares`)

A widely copied summary prints the reciprocal, u^4 = A_i / B_i, with the same x' = x / s. Its loss is
(A^2 + B^2) / sqrt(A B) >= A + B: never better than no scaling at all. Intuition: a channel with a large activation
error needs a smaller weight, hence a smaller s.

Symbols. x (N, C): inputs over samples and tokens, sink tokens left out. W (O, C): weights that read x; What: rounded;
dW = What - W. dx: rounding error of x under the parameters of channel k. R: range (max - min).

Paper and code. Eq. 16 of the paper (form `eq16`) has sums of absolute values and a square root,
u_i = sqrt(sum |dW_i| sum |x_i| / (sum |W_i| sum |dx_i|)); the released code has the form above, the exact minimiser
of the modelled loss. Before GPS the released code applies SmoothQuant and a symmetric shift; the paper has neither.
A common factor of all s_i changes nothing, so s_k only keeps magnitudes sensible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.numerics import QParams, fake_quant
from ptq.quantizers import calibrated, rounded_weight
from ptq.types import InputTransform, QuantSpec, require

FORMS = ("squares", "eq16")
U_MIN, U_MAX = 2.0**-8, 2.0**4  # bounds of s_i / s_k, reached where one of the errors (nearly) vanishes


@dataclass(frozen=True)
class Energies:
    """Per input channel (C,): A (activation error times weight), B (activation times weight error)."""

    activation_error: Tensor
    weight_error: Tensor
    anchor: int
    anchor_scale: float

    def loss(self, u: Tensor) -> Tensor:
        """Modelled output error per channel for ratios u = s / s_k."""
        return u.pow(2) * self.activation_error + self.weight_error / u.pow(2)


def widest_channel(x: Tensor) -> tuple[int, float]:
    """The channel k of x (N, C) with the widest range, and that range."""
    lo, hi = x.aminmax(dim=0)
    width, index = (hi - lo).max(dim=0)
    return int(index), float(width)


def energies(x: Tensor, weight: Tensor, rounded: Tensor, anchor_params: QParams, levels: int, form: str) -> Energies:
    """Error energies in float64.

    Args:
        x: inputs (N, C). weight, rounded: W and What (O, C).
        anchor_params: activation scale and zero point of the widest channel. levels: of the activation.
    """
    require("method.gps_form", form, FORMS)
    k, width = widest_channel(x)
    dx = (fake_quant(x, anchor_params, levels) - x).double()
    dw, x = (rounded - weight).double(), x.double()
    rows = weight[:, k].max() - weight[:, k].min()
    anchor_scale = float((width / rows).sqrt()) if rows > 0 and width > 0 else 1.0
    if form == "squares":
        a = dx.square().sum(0) * rounded.double().square().sum(0)
        b = x.square().sum(0) * dw.square().sum(0)
    else:
        a = dx.abs().sum(0) * weight.double().abs().sum(0)
        b = x.abs().sum(0) * dw.abs().sum(0)
    return Energies(a, b, k, anchor_scale)


def optimal_ratio(e: Energies, form: str) -> Tensor:
    """u = s / s_k (C,), the minimiser of the modelled loss.

    A channel without any error (a dead activation or a dead weight column whose zeros are rounded to zero) keeps
    u = 1; where only one of the errors vanishes u stops at its bound.
    """
    a, b = e.activation_error, e.weight_error
    tiny = torch.finfo(a.dtype).tiny
    ratio = b.clamp(min=tiny) / a.clamp(min=tiny)
    u = ratio.pow(0.25 if form == "squares" else 0.5).clamp(U_MIN, U_MAX)
    u = torch.where((a <= 0) & (b <= 0), torch.ones_like(u), u)
    u[e.anchor] = 1.0
    return u


def gps(x: Tensor, weight: Tensor, activations: QuantSpec, weights: QuantSpec, form: str = "squares") -> InputTransform:
    """The GPS scale for inputs x (N, C) and stacked weights (O, C).

    Raises:
        ConfigError: unknown form. NonFiniteError: x or weight contain NaN or infinity.
    """
    k, _ = widest_channel(x)
    anchor_params = calibrated(x[:, k], activations.at("tensor"))
    rounded, _ = rounded_weight(weight, weights)
    e = energies(x, weight, rounded, anchor_params, activations.levels, form)
    scale = (e.anchor_scale * optimal_ratio(e, form)).to(x.dtype)
    return InputTransform(scale, scale.new_zeros(scale.shape))
