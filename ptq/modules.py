"""The quantized counterparts of `models.layers.Linear` and `MatMul`, and how they take their
places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from ptq.numbers.numerics import QParams
from ptq.numbers.quantizers import Passthrough
from ptq.transform import InputTransform, Rotation


class OnlineTransform(nn.Module):
    """What runs at run time in front of a quantizer: x' = ((x - shift) / scale) R, each part only
    where it is needed.

    Args:
        transform: its scale and shift count unless they are `folded` already.
    """

    def __init__(self, transform: InputTransform, folded: bool = False) -> None:
        super().__init__()
        diagonal = not folded and not transform.is_diagonal_identity()
        self.register_buffer("scale", transform.scale if diagonal else None)
        self.register_buffer(
            "shift", transform.shift if diagonal and bool(transform.shift.any()) else None
        )
        self.rotation = transform.rotation

    @property
    def needed(self) -> bool:
        return self.scale is not None or self.rotation is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.shift is not None:
            x = x - self.shift
        if self.scale is not None:
            x = x / self.scale
        return x if self.rotation is None else self.rotation(x)


class QuantLinear(nn.Module):
    """y = Q(x') W^T + (x' A^T) B^T + b. The weight is rounded once; `input` quantizes (or observes)
    the activation.

    Attributes:
        weight: W (O, I), once rounded with `weight_params`, its scale and zero point per row (None
            while unrounded).
        transform: makes x' of x; None where that is folded. down, up: A (r, I) and B (O, r), or
            None.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.register_buffer("down", None)
        self.register_buffer("up", None)
        self.weight_params: QParams | None = None
        self.transform: OnlineTransform | None = None
        self.input: nn.Module = Passthrough()

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if self.transform is not None:
            x = self.transform(x)
        y = F.linear(self.input(x, positions), self.weight, self.bias)
        return y if self.down is None else y + F.linear(F.linear(x, self.down), self.up)


class QuantMatMul(nn.Module):
    """Q(a) @ Q(b). `prepare` quantizes b once, before it enters the KV cache; `forward` finds it
    quantized.

    Args:
        rotation: R of Q(q R) @ Q(k R)^T, the product of queries with keys: `prepare` gets k,
            `forward` k^T.
    """

    fused = False
    attention = None

    def __init__(self, rotation: Rotation | None = None) -> None:
        super().__init__()
        self.rotation = rotation
        self.a: nn.Module = Passthrough()
        self.b: nn.Module = Passthrough()

    def prepare(self, b: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.b(b if self.rotation is None else self.rotation(b), positions)

    def forward(self, a: Tensor, b: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.a(a if self.rotation is None else self.rotation(a), positions) @ b


def swap_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    # a Sequential's children are attributes "0", "1", ... too
    setattr(model.get_submodule(parent), child, new)


@contextmanager
def replaced_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, these modules stand in the places of the submodules of their names."""
    originals = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            swap_module(model, name, module)
        yield
    finally:
        for name, module in originals.items():
            swap_module(model, name, module)
