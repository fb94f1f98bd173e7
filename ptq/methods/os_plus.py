"""Outlier Suppression+ (Wei et al., 2023): centre channels, shrink those beyond a threshold t.

    shift_j = (max_j + min_j) / 2,   h_j = (max_j - min_j) / 2,
    s_j = max(1, h_j / t),           x' = (x - shift) / s

so that every channel of x' lies in [-t, t] and channels within the threshold are left alone. The
threshold is the one of a grid with the least output error

    t = argmin E || f(x) - f^(Q_t(x'), Q(W diag(s))) ||^2

(Q_t has one range [-t, t] per tensor, Q a min-max range per row) at the site's probe (`probe.py`):
the attention output before the projection for qkv, silu(gate) * up for a gated MLP, the linear's
own output otherwise. With a = max_j h_j the grid goes from a down to `floor` * a, in `steps`
thresholds, or one per 0.5 where activations are large.

Official code and paper. The grid is ModelTC/Outlier_Suppression_Plus' but for its end, 1.0 for OPT
and 0.1 for LLaMA: where a is smaller no threshold is tried and nothing is scaled, so here the end
is relative to a. As there, shift and threshold are found on some of the calibration rows, and
ranges on all of them; the fine-tuning of the scale is left out, as in PTQ4ARVG's Table 7. The
official objective knows LLMs only; the probe runs the model's own mask, norms of queries and keys,
and rotary embedding. Where sink tokens are left out they do not count for shift and range, and
reach f^ unrounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ptq.methods.probe import Judge
from ptq.methods.solver import Problem
from ptq.numbers.numerics import params_from_range
from ptq.numbers.quantizers import StaticQuantizer, fake_quantize_weight, run_time_quantizer
from ptq.options import COUNT, Settings, setting
from ptq.ranges import Flag, Number
from ptq.registry.entries import FORMATS, register_settings, register_transform
from ptq.transform import InputTransform

SPACING = 0.5  # largest distance of neighbouring thresholds


@register_settings("os_plus")
@dataclass(frozen=True)
class OSPlusSettings(Settings):
    """Outlier Suppression+: the search for the clipping threshold.

    Attributes:
        floor: smallest threshold tried, relative to the largest shifted magnitude (the authors'
            absolute floors leave the grid empty where activations are small).
        steps: thresholds tried at least; one per 0.5 where activations are large.
        rows: calibration rows that shift and threshold are found on.
        spread: they lie evenly over all, as the recipe has it; otherwise they are the first, as
            with the authors' one batch, and conditional ones, since selectors keep their order. (An
            option at its default is no part of a run's hash, so this one stays.)
    """

    floor: float = setting(0.02, Number(0, 1, above=True, below=True))
    steps: int = setting(100, COUNT)
    rows: int = setting(16, COUNT)
    spread: bool = setting(False, Flag())


def channel_midpoints(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and half width (C,) of channels that span lo .. hi (C,)."""
    return (lo + hi) / 2, (hi - lo) / 2


def threshold_grid(largest: float, floor: float, steps: int) -> list[float]:
    """The grid for a largest half width, downwards; empty if that is 0.

    Args:
        floor: the last threshold over the largest half width.
        steps: how many thresholds at least.
    """
    if not largest > 0:
        return []
    count = max(steps, int(largest / SPACING))
    return torch.linspace(largest, floor * largest, count, dtype=torch.float64).tolist()


def suppression_step(shift: Tensor, half: Tensor, threshold: float) -> InputTransform:
    """The step for channels of half width `half` (C,) around `shift` (C,)."""
    return InputTransform((half / threshold).clamp(min=1), shift)


@register_transform("os_plus", step=20)
class OSPlus:
    """Keeps nothing of the stream: all is found on the rows that the judge records."""

    streams = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def solve(self) -> InputTransform:
        options = self.problem.recipe.options.os_plus
        judge = self.problem.probe(options.rows, options.spread)
        lows = []
        highs = []
        for x in judge.inputs:
            if x.numel():  # without its sink tokens an input may be empty
                extrema = x.flatten(0, -2).aminmax(dim=0)  # (C,) each
                lows.append(extrema.min)
                highs.append(extrema.max)
        lo = torch.stack(lows).amin(0)  # (C,)
        hi = torch.stack(highs).amax(0)  # (C,)
        shift, half = channel_midpoints(lo, hi)
        grid = threshold_grid(float(half.max()), options.floor, options.steps)
        if not grid:
            return InputTransform(torch.ones_like(shift), shift)
        losses: list[Tensor] = []
        for threshold in grid:
            step = suppression_step(shift, half, threshold)
            losses.append(self.loss(judge, step, threshold))
        best = grid[int(torch.stack(losses).argmin())]
        return suppression_step(shift, half, best)

    def loss(self, judge: Judge, step: InputTransform, threshold: float) -> Tensor:
        """The output error () with inputs rounded in [-threshold, threshold]."""
        recipe = self.problem.recipe
        weight = step.on_weight(self.problem.weight)  # (O, C)
        rounded, _ = fake_quantize_weight(weight, replace(recipe.weights, range="minmax"))
        return judge(step, rounded, self.quantizer(threshold))

    def quantizer(self, threshold: float) -> nn.Module:
        """What rounds inputs in [-threshold, threshold]; blocks follow their own magnitudes."""
        spec = self.problem.recipe.activations
        if not spec.is_rounded or FORMATS[spec.format].block is not None:
            return run_time_quantizer(spec)
        spec = spec.at("tensor")
        end = self.problem.weight.new_tensor([threshold])  # (1,)
        return StaticQuantizer(spec, params_from_range(-end, end, spec))
