"""The rounder `gptaq`: GPTQ for the inputs that a weight will see (`rounded_inputs.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptq.numbers.numerics import QParams
from ptq.numbers.quantizers import Clip, fake_quantize_weight
from ptq.options import Settings, setting
from ptq.ranges import Integer, Number
from ptq.recipe import Recipe
from ptq.registry.entries import register_rounder, register_settings
from ptq.staq.positions import compact
from ptq.staq.rounded_inputs import Moments, corrected_target, moments_of, ordered_factor

if TYPE_CHECKING:
    from ptq.staq.inputs import SiteData


@register_settings("gptaq")
@dataclass(frozen=True)
class GPTAQSettings(Settings):
    """Rounding for rounded inputs. `damping`, `block`: as for GPTQ. `correction`: share of the step
    to the weight that is best for rounded inputs."""

    damping: float = setting(0.01, Number(0, 100, above=True))
    block: int = setting(128, Integer(1, 65_536))
    correction: float = setting(0.5, Number(0, 1))


@register_rounder("gptaq", reads="site", integers_only=True)
class InputRounder:
    """The rounder of one site."""

    def __init__(self, recipe: Recipe, data: SiteData) -> None:
        self.recipe = recipe
        self.options = recipe.options.gptaq
        self.moments = centred_moments(data, recipe.bias_correction)
        self.factor = ordered_factor(self.moments.hessian, self.options.damping)

    def __call__(self, weight: Tensor, clip: Clip | None) -> tuple[Tensor, QParams]:
        spec = self.recipe.weights
        target = corrected_target(
            weight, self.moments, self.options.correction, self.options.damping
        )
        params = compact(fake_quantize_weight(target, spec, clip)[1])
        # float64: errors of early columns pass through all later ones
        exact_params = QParams(params.scale.double(), params.zero_point.double())
        rounded = self.factor.round_weight(target.double(), exact_params, spec, self.options.block)
        return rounded.to(weight.dtype), params


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
