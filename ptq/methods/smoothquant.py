"""SmoothQuant (Xiao et al., 2023): move the range of activation channels into the weights.

    s_j = max |x_j|^alpha / max_o |W_oj|^(1 - alpha),   x' = x / s,   W' = W diag(s)

The weight's maximum runs over all linears that read the activation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.methods.solver import Problem
from ptq.registry.entries import register_transform
from ptq.transform import InputTransform

FLOOR = 1e-6  # of both maxima


def smoothing_step(
    peaks: Tensor, weight: Tensor, alpha: float = 0.5, beta: float | None = None
) -> InputTransform:
    """The scale peaks^alpha / max |W|^beta.

    Args:
        peaks: the largest |x| per channel, (C,).
        weight: stacked weights (O, C).
        beta: 1 - alpha if None (SVDQuant's grid has others).
    """
    if beta is None:
        beta = 1 - alpha
    weight_peaks = weight.abs().amax(dim=0)  # (C,)
    scale = peaks.clamp(min=FLOOR).pow(alpha) / weight_peaks.clamp(min=FLOOR).pow(beta)
    return InputTransform(scale, scale.new_zeros(scale.shape))


def smoothquant_step(x: Tensor, weight: Tensor, alpha: float = 0.5) -> InputTransform:
    """The scale for inputs x (N, C) and stacked weights (O, C)."""
    return smoothing_step(x.abs().amax(dim=0), weight, alpha)


class Peaks:
    """The part of a solver that needs one pass for the largest |x| per channel, `peaks` (C,)."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.weight = problem.weight
        self.peaks = problem.weight.new_zeros(problem.weight.shape[1])

    def update(self, x: Tensor) -> None:
        if x.numel():
            part_peaks = x.abs().flatten(0, -2).amax(dim=0)  # (C,)
            self.peaks = torch.maximum(self.peaks, part_peaks)

    def end_pass(self) -> bool:
        return True


@register_transform("smoothquant", step=10)
class SmoothQuant(Peaks):
    """Smoothing by the recipe's alpha."""

    def solve(self) -> InputTransform:
        return smoothing_step(self.peaks, self.weight, self.problem.recipe.alpha)
