"""Gain-Projected Scaling (GPS, section 4.1 of the paper): the scale per channel that balances the
rounding errors of activations and weights.

Setting. Activations have one quantization scale per tensor, weights one per output row; the scale s
of GPS acts as x' = x / s, W' = W diag(s). Let k be the channel with the widest activation range.
After scaling, the activation step is set by channel k, so every channel's rounding error dx_i is
divided by s_k; the weight step grows by s_k, so every dW_i is multiplied by s_k (paper, Eq. 10 and
Remark 1). With u_i = s_i / s_k, channel i's part of the output error to second order is

    loss_i(u) = u^2 A_i + B_i / u^2,    A_i = sum dx_i^2 sum Wq_i^2,    B_i = sum x_i^2 sum dW_i^2.

Its derivative vanishes at u^4 = B_i / A_i, where loss_i = 2 sqrt(A_i B_i):

    s_i = s_k (sum x_i^2 sum dW_i^2 / (sum dx_i^2 sum Wq_i^2))^(1/4)       (form `squares`)
    s_k = sqrt(R_x^k / R_W^k)

A widely copied summary prints the reciprocal, u^4 = A_i / B_i, with the same x' = x / s. Its loss
is (A^2 + B^2) / sqrt(A B) >= A + B: never better than no scaling at all. Intuition: a channel with
a large activation error needs a smaller weight, hence a smaller s.

Symbols. x (N, C): inputs over samples and tokens, sink tokens left out. W (O, C): weights that read
x; Wq: the same, rounded; dW = Wq - W. dx: rounding error of x under the parameters of channel k.
Sums with the index i run over the N values of channel i or over the O weights of column i.
R: range (max - min), R_x of inputs, R_W of weights.

Paper and code. Eq. 16 of the paper (form `eq16`) has sums of absolute values and a square root,
u_i = sqrt(sum |dW_i| sum |x_i| / (sum |W_i| sum |dx_i|)); the released code has the form above, the
exact minimiser of the modelled loss. Before GPS the released code applies SmoothQuant and a
symmetric shift; the paper has neither. A common factor of all s_i changes nothing, so s_k only
keeps magnitudes sensible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.methods.solver import Problem
from ptq.numbers.numerics import QParams, fake_quantize
from ptq.numbers.observers import Observer
from ptq.numbers.quantizers import choose_qparams, fake_quantize_weight
from ptq.options import GPS_FORMS
from ptq.registry.entries import register_transform
from ptq.spec import QuantSpec, require
from ptq.transform import InputTransform

# bounds of s_i / s_k, reached where one of the errors (nearly) vanishes
U_MIN = 2.0**-8
U_MAX = 2.0**4


@dataclass(frozen=True)
class Energies:
    """Error energies of every input channel, and the scale of the widest one.

    Attributes:
        activation_error: A (C,), of activation errors times weights.
        weight_error: B (C,), of activations times weight errors.
        anchor: k, the channel with the widest activation range.
        anchor_scale: s_k.
    """

    activation_error: Tensor
    weight_error: Tensor
    anchor: int
    anchor_scale: float

    def loss(self, u: Tensor) -> Tensor:
        """Modelled output error (C,) for ratios u = s / s_k (C,)."""
        return u.pow(2) * self.activation_error + self.weight_error / u.pow(2)


def widest_range(lo: Tensor, hi: Tensor) -> tuple[int, float]:
    """The channel with the widest range, of lower and upper ends (C,), and the width."""
    width, channel = (hi - lo).max(dim=0)
    return int(channel), float(width)


def widest_channel(x: Tensor) -> tuple[int, float]:
    """The channel of x (N, C) with the widest range, and the width."""
    return widest_range(*x.aminmax(dim=0))


def error_sums(x: Tensor, params: QParams, levels: int, form: str) -> Tensor:
    """Sums over the N rows of x (N, C) and of its rounding error under `params`.

    Returns:
        (2, C) in float64, of squares or, for the form `eq16`, of magnitudes.
    """
    dx = (fake_quantize(x, params, levels) - x).double()  # (N, C)
    x = x.double()
    if form == "squares":
        magnitudes = (x.square(), dx.square())
    else:
        magnitudes = (x.abs(), dx.abs())
    return torch.stack([part.sum(0) for part in magnitudes])


def error_energies(
    x: Tensor, weight: Tensor, rounded: Tensor, anchor_params: QParams, levels: int, form: str
) -> Energies:
    """Error energies in float64.

    Args:
        x: inputs (N, C).
        weight, rounded: W and Wq (O, C).
        anchor_params: activation scale and zero point of the widest channel.
        levels: of the activation.
    """
    sums = error_sums(x, anchor_params, levels, form)
    anchor, width = widest_channel(x)
    return energies_from_sums(sums, weight, rounded, anchor, width, form)


def energies_from_sums(
    sums: Tensor, weight: Tensor, rounded: Tensor, anchor: int, width: float, form: str
) -> Energies:
    """Error energies from the sums of `error_sums` (2, C), the widest channel, and its width.

    Raises:
        ConfigError: unknown form.
    """
    require("method.gps_form", form, GPS_FORMS)
    weight_width = weight[:, anchor].max() - weight[:, anchor].min()  # ()
    # a channel or a weight column without extent has no step to balance
    anchor_scale = 1.0
    if weight_width > 0 and width > 0:
        anchor_scale = float((width / weight_width).sqrt())

    x_sums, dx_sums = sums  # (C,) each
    dw = (rounded - weight).double()  # (O, C)
    if form == "squares":
        activation_error = dx_sums * rounded.double().square().sum(0)
        weight_error = x_sums * dw.square().sum(0)
    else:
        activation_error = dx_sums * weight.double().abs().sum(0)
        weight_error = x_sums * dw.abs().sum(0)
    return Energies(activation_error, weight_error, anchor, anchor_scale)


def optimal_ratio(e: Energies, form: str) -> Tensor:
    """u = s / s_k (C,), the minimiser of the modelled loss.

    A channel without any error (a dead activation or a dead weight column whose zeros are rounded
    to zero) keeps u = 1; where only one of the errors vanishes u stops at its bound.
    """
    a = e.activation_error
    b = e.weight_error
    tiny = torch.finfo(a.dtype).tiny
    exponent = 0.25 if form == "squares" else 0.5
    u = (b.clamp(min=tiny) / a.clamp(min=tiny)).pow(exponent).clamp(U_MIN, U_MAX)  # (C,)
    without_error = (a <= 0) & (b <= 0)
    u = torch.where(without_error, torch.ones_like(u), u)
    u[e.anchor] = 1.0  # s_k / s_k
    return u


def transform_from_energies(e: Energies, form: str, dtype: torch.dtype) -> InputTransform:
    """The scale s = s_k u (C,) of the smallest modelled loss; nothing is shifted."""
    scale = (e.anchor_scale * optimal_ratio(e, form)).to(dtype)
    return InputTransform(scale, scale.new_zeros(scale.shape))


def gps_transform(
    x: Tensor, weight: Tensor, activations: QuantSpec, weights: QuantSpec, form: str = "squares"
) -> InputTransform:
    """The GPS scale for inputs x (N, C) and stacked weights (O, C).

    Raises:
        ConfigError: unknown form.
        NonFiniteError: x or weight contain NaN or infinity.
    """
    anchor, _ = widest_channel(x)
    anchor_params = choose_qparams(x[:, anchor], activations.at("tensor"))
    rounded, _ = fake_quantize_weight(weight, weights)
    e = error_energies(x, weight, rounded, anchor_params, activations.levels, form)
    return transform_from_energies(e, form, x.dtype)


@register_transform("gps", step=50, integers_only=True)
class GPS:
    """GPS on inputs that stream, of which a few numbers per channel stay.

    The first pass over the calibration rows finds the widest channel, the next ones (as many as an
    observer needs) its scale and zero point, the last one the sums of `error_sums` under these.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        # what each pass leaves to the next
        self.extrema: tuple[Tensor, Tensor] | None = None  # (C,) each
        self.anchor = 0
        self.width = 0.0
        self.observer: Observer | None = None  # of the anchor channel
        self.params: QParams | None = None
        self.sums: Tensor | None = None  # (2, C)

    def update(self, x: Tensor) -> None:
        if self.params is not None:
            self._add_sums(x.flatten(0, -2))
        elif self.observer is not None:
            self.observer(x[..., self.anchor])
        elif x.numel():  # without its sink tokens a part may be empty
            self._stretch_extrema(x.flatten(0, -2))

    def _stretch_extrema(self, x: Tensor) -> None:
        """The first pass: smallest and largest value of every channel of x (N, C)."""
        lo, hi = x.aminmax(dim=0)  # (C,) each
        if self.extrema is not None:
            lo = torch.minimum(self.extrema[0], lo)
            hi = torch.maximum(self.extrema[1], hi)
        self.extrema = (lo, hi)

    def _add_sums(self, x: Tensor) -> None:
        """The last pass: sums over the rows of x (N, C)."""
        recipe = self.problem.recipe
        sums = error_sums(x, self.params, recipe.activations.levels, recipe.gps_form)
        self.sums = sums if self.sums is None else self.sums + sums

    def end_pass(self) -> bool:
        if self.params is not None:
            return True
        if self.observer is None:
            self.anchor, self.width = widest_range(*self.extrema)
            self.observer = Observer(
                self.problem.recipe.activations.at("tensor"),
                rows=self.problem.rows,
                name=self.problem.site.name,
            )
            return False
        if self.observer.end_pass():
            self.params = self.observer.params()
        return False

    def solve(self) -> InputTransform:
        recipe = self.problem.recipe
        weight = self.problem.weight
        rounded, _ = fake_quantize_weight(weight, recipe.weights)
        form = recipe.gps_form
        e = energies_from_sums(self.sums, weight, rounded, self.anchor, self.width, form)
        return transform_from_energies(e, form, weight.dtype)
