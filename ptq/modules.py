"""The quantized counterparts of `models.layers.Linear` and `MatMul`, and how they take their places."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ptq.numerics import QParams
from ptq.quantizers import Passthrough
from ptq.types import InputTransform


class OnlineTransform(nn.Module):
    """x' = (x - shift) / scale computed at run time, where nothing can absorb it."""

    def __init__(self, transform: InputTransform) -> None:
        super().__init__()
        self.register_buffer("scale", transform.scale)
        self.register_buffer("shift", transform.shift)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class QuantLinear(nn.Module):
    """y = Q(x) W^T + b. The weight is rounded once, when it is set; `input` quantizes (or observes) the activation.

    Attributes:
        weight: the rounded weight (O, I). weight_params: its scale and zero point per row, or None while unrounded.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.weight_params: QParams | None = None
        self.transform: OnlineTransform | None = None
        self.input: nn.Module = Passthrough()

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if self.transform is not None:
            x = self.transform(x)
        return F.linear(self.input(x, positions), self.weight, self.bias)


class QuantMatMul(nn.Module):
    """Q(a) @ Q(b). `prepare` quantizes b once, before it enters the KV cache; `forward` finds it quantized."""

    fused = False

    def __init__(self) -> None:
        super().__init__()
        self.a: nn.Module = Passthrough()
        self.b: nn.Module = Passthrough()

    def prepare(self, b: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.b(b, positions)

    def forward(self, a: Tensor, b: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.a(a, positions) @ b


def swap(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)  # a Sequential's children are attributes "0", "1", ... too
