"""SmoothQuant (Xiao et al., 2023): move the range of activation channels into the weights.

    s_j = max |x_j|^alpha / max_o |W_oj|^(1 - alpha),   x' = x / s,   W' = W diag(s)

The weight's maximum runs over all linears that read the activation.
"""

from __future__ import annotations

from torch import Tensor

from ptq.types import InputTransform


def smoothquant(x: Tensor, weight: Tensor, alpha: float = 0.5, floor: float = 1e-6) -> InputTransform:
    """The scale for inputs x (N, C) and stacked weights (O, C). Both maxima are at least `floor`."""
    activation = x.abs().amax(dim=0).clamp(min=floor)
    scale = activation.pow(alpha) / weight.abs().amax(dim=0).clamp(min=floor).pow(1 - alpha)
    return InputTransform(scale, scale.new_zeros(scale.shape))
