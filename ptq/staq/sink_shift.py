"""Sink shift: massive activations of sink tokens are constants, and constants need no codes.

A sink token's input has a few channels a hundred times larger than all others. No step serves both,
neither one per tensor nor one per token. But these values hardly depend on the image, and what is
left of them when their mean over calibration rows is subtracted is ordinary: largest magnitudes go
from 43 to 3.7 and from 51 to 0.7 on MAR's twin, from 190 to 7 on RAR's. So at positions t < sinks

    y_t = Wq Q(x_t - mu) + b + c,       mu (C,) = mean of x over the sink tokens,    c (O,) = W mu

and elsewhere y_t = Wq Q(x_t) + b as always. Without rounding nothing changes. One mu serves all
sinks of a model, which is nearly as good as one each. It costs C + O numbers a linear, a vector
subtracted at 1 to 8 positions, and another bias row there; in RAR's decoding that is the prefix
alone. With bias correction (`rounded_inputs.py`) the bias row c also takes what rounding moved the
sinks' mean output by.

The massive channel also leaves the reach of the weights' rounding: W mu is computed with W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq.options import SITES, Settings, setting
from ptq.registry.entries import register_settings


@register_settings("sink_shift")
@dataclass(frozen=True)
class SinkShiftSettings(Settings):
    """The sites whose sink tokens are shifted."""

    sites: tuple[str, ...] = setting(("qkv", "fc1", "fc2"), SITES)


class SinkShift(nn.Module):
    """What one linear does to its sink tokens.

    Args:
        mean: mu (C,). bias: c (O,). sinks: positions below this one are sinks.
    """

    def __init__(self, mean: Tensor, bias: Tensor, sinks: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("bias", bias)
        self.sinks = sinks

    def shift_input(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, T, C) at positions (T,) without the mean of the sinks."""
        return x - self._at_sinks(self.mean, positions)

    def restore_output(self, y: Tensor, positions: Tensor) -> Tensor:
        """y (B, T, O) with the bias of the sinks, in the number format of y."""
        return (y + self._at_sinks(self.bias, positions)).to(y.dtype)

    def restore_output_(self, y: Tensor, positions: Tensor) -> Tensor:
        """The same in place, at ascending positions: then only the first tokens of a call can be
        sinks."""
        first = min(self.sinks, y.shape[1])
        y[:, :first] += self._at_sinks(self.bias, positions[:first]).to(y.dtype)
        return y

    def _at_sinks(self, vector: Tensor, positions: Tensor) -> Tensor:
        """The vector at sinks, zero elsewhere: (T, C)."""
        is_sink = positions < self.sinks
        return torch.where(is_sink[:, None], vector, torch.zeros_like(vector))
