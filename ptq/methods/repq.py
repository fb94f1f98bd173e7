"""RepQ-ViT's reparameterisation (Li et al., 2023): channels apart in calibration, then as one.

With a step d_j and a zero point z_j for every channel j,

    d = mean_j d_j,   z = round(mean_j z_j),
    s_j = d_j / d,    shift_j = s_j d z - d_j z_j,    x' = (x - shift) / s,

the one quantizer (d, z) of x' does to every channel what (d_j, z_j) did to x: the lower end of the
channel's range, -z_j d_j, goes to -z d and its step to d. All of the spread between channels moves
into the weights, as in SmoothQuant with alpha 1; they are rounded afterwards. (d, z) is the site's
quantizer and is not calibrated again, except under static token-wise quantization.

A scale solved before it cancels: with x / c in place of x every d_j becomes d_j / c_j, and the two
steps together give d_j over another mean. A common factor of the scale changes nothing, so
SmoothQuant and then RepQ quantizes a model as RepQ alone does (a test states it). Table 6 of
PTQ4ARVG prints FID 33.79 for RepQ* and 7.43 for SQ -> RepQ*; how it composes the two is not stated,
and cannot be this.

Symbols. (d_j, z_j): asymmetric parameters per channel by the recipe's range rule, over all
calibration tokens.

Official code (zkkli/RepQ-ViT) and here. There 32 images calibrate; here, as in PTQ4ARVG's Table 7,
the whole set. There z is not an integer; any z gives the same result, since the shift makes up for
it, and here it is rounded and kept within the codes, for integer arithmetic. s_j is bounded by
`lowest` .. `highest`. A channel that never changes has no step: it is left out of both
means, keeps s_j = 1 and is shifted to 0; in the official code it makes s_j vanish. The other half
of RepQ-ViT is the format of attention weights, `log_sqrt2` in `ptq/numbers/formats.py`. "RepQ*" in
PTQ4ARVG's tables is this method on its four families.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ptq.methods.shift import per_channel
from ptq.methods.solver import Problem
from ptq.numbers.numerics import QParams
from ptq.numbers.observers import Observer
from ptq.options import Settings, setting
from ptq.ranges import Number
from ptq.registry.entries import register_settings, register_transform
from ptq.spec import ConfigError
from ptq.transform import InputTransform


@register_settings("repq")
@dataclass(frozen=True)
class RepQSettings(Settings):
    """RepQ-ViT's scale reparameterisation.

    Attributes:
        lowest, highest: bounds of a channel's scale over the mean scale.
    """

    lowest: float = setting(1e-3, Number(0, 1e12, above=True))
    highest: float = setting(1e3, Number(0, 1e12, above=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lowest > self.highest:
            raise ConfigError(
                f"method.options.repq.lowest: {self.lowest} is not at most {self.highest}, "
                "the highest"
            )


def effective_params(params: QParams, lo: Tensor, hi: Tensor, levels: int) -> QParams:
    """Per-channel parameters whose range is within the extrema lo, hi (C,); a constant channel gets
    the step 0.

    The range rule gives a range without extent an arbitrary step, also where only rare values lie
    outside of it.
    """
    step = (hi - lo) / (levels - 1)  # (C,)
    too_wide = params.scale > step * 1.001  # beyond rounding
    scale = torch.where(too_wide, step, params.scale)
    zero_point = torch.round(-lo / step)
    zero_point = torch.where(too_wide & (step > 0), zero_point, params.zero_point)
    return QParams(scale, zero_point)


def shared_quantizer(
    params: QParams, values: Tensor, levels: int, settings: RepQSettings
) -> tuple[InputTransform, QParams]:
    """The transform after which one quantizer serves all channels, and its parameters (1,).

    Args:
        params: per channel (C,), the step 0 where the channel is constant.
        values: (C,), lower end of every channel; of a constant one its value.
    """
    steps = params.scale.double()  # d_j
    zeros = params.zero_point.double()  # z_j
    live = params.scale > 0  # (C,)
    if bool(live.any()):
        step = steps[live].mean()
        zero = zeros[live].mean()
    else:
        step = steps.new_ones(())
        zero = steps.new_zeros(())
    zero = zero.round().clamp(0, levels - 1)
    scale = torch.where(live, (steps / step).clamp(settings.lowest, settings.highest), 1.0)  # (C,)
    shift = torch.where(live, scale * step * zero - steps * zeros, values.double())
    dtype = params.scale.dtype
    transform = InputTransform(scale.to(dtype), shift.to(dtype))
    return transform, QParams(step.to(dtype)[None], zero.to(dtype)[None])


@register_transform("repq", step=30, integers_only=True)
class RepQ:
    """Observes every channel's range and extrema."""

    def __init__(self, problem: Problem) -> None:
        self.recipe = problem.recipe
        spec = replace(per_channel(self.recipe.activations), include_zero=False)
        self.observer = Observer(spec, rows=problem.rows, name=problem.site.name)
        self.lo = problem.weight.new_full(problem.weight.shape[1:], torch.inf)
        self.hi = -self.lo

    def update(self, x: Tensor) -> None:
        self.observer(x)
        if x.numel():
            lo, hi = x.flatten(0, -2).aminmax(dim=0)  # (C,) each
            self.lo = torch.minimum(self.lo, lo)
            self.hi = torch.maximum(self.hi, hi)

    def end_pass(self) -> bool:
        return self.observer.end_pass()

    @cached_property
    def _solved(self) -> tuple[InputTransform, QParams]:
        levels = self.recipe.activations.levels
        params = effective_params(self.observer.params(), self.lo, self.hi, levels)
        return shared_quantizer(params, self.lo, levels, self.recipe.options.repq)

    def solve(self) -> InputTransform:
        return self._solved[0]

    def input_params(self) -> QParams:
        return self._solved[1]
