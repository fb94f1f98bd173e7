"""The quantized counterparts of `models.layers.Linear` and `MatMul`, and how they take their
places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from ptq.numbers.numerics import QParams
from ptq.numbers.quantizers import Passthrough
from ptq.spec import QuantSpec
from ptq.staq.sink_shift import SinkShift
from ptq.transform import InputTransform, Rotation


class OnlineTransform(nn.Module):
    """What runs at run time in front of a quantizer: x' = ((x - shift) / scale) R, each part only
    where it is needed.

    Args:
        transform: its scale and shift count unless they are `folded` already.
    """

    def __init__(self, transform: InputTransform, folded: bool = False) -> None:
        super().__init__()
        has_scale = not folded and not transform.is_diagonal_identity()
        has_shift = has_scale and bool(transform.shift.any())
        self.register_buffer("scale", transform.scale if has_scale else None)  # (C,)
        self.register_buffer("shift", transform.shift if has_shift else None)  # (C,)
        self.rotation = transform.rotation

    @property
    def needed(self) -> bool:
        """Whether it changes anything."""
        return self.scale is not None or self.rotation is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.shift is not None:
            x = x - self.shift
        if self.scale is not None:
            x = x / self.scale
        if self.rotation is not None:
            x = self.rotation(x)
        return x


class QuantLinear(nn.Module):
    """y = Q(x') W^T + (x' A^T) B^T + b.

    Attributes:
        weight: W (O, I), rounded once.
        weight_params: scale and zero point of every row, or of its groups; None while W is
            unrounded.
        weight_spec: how it is rounded, or left as it is; None: not decided yet.
        transform: makes x' of x; None where all of that is folded.
        sink_shift: what is taken off the input at sink tokens, and given back to the output; None
            if nothing is.
        input: quantizes (or observes) the activation.
        down, up: A (r, I) and B (O, r), or None.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.register_buffer("down", None)
        self.register_buffer("up", None)
        self.sink_shift: SinkShift | None = None
        self.weight_params: QParams | None = None
        self.weight_spec: QuantSpec | None = None
        self.transform: OnlineTransform | None = None
        self.input: nn.Module = Passthrough()

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if self.transform is not None:
            x = self.transform(x)
        seen = x if self.sink_shift is None else self.sink_shift.shift_input(x, positions)
        y = F.linear(self.input(seen, positions), self.weight, self.bias)  # (..., O)
        if self.sink_shift is not None:
            y = self.sink_shift.restore_output(y, positions)
        if self.down is not None:
            # the branch reads the unquantized x'
            y = y + F.linear(F.linear(x, self.down), self.up)
        return y


class QuantMatMul(nn.Module):
    """Q(a) @ Q(b). `prepare` quantizes b once, before it enters the KV cache; `forward` finds it
    quantized.

    Args:
        rotation: R of Q(q R) @ Q(k R)^T, the product of queries with keys: `prepare` gets k,
            `forward` k^T.
    """

    # what is quantized cannot run inside `scaled_dot_product_attention`
    fused = False
    # a kernel of its own has only the product in integers (`int8/attention.py`)
    attention = None
    # why there can be none
    simulated: str | None = None

    def __init__(self, rotation: Rotation | None = None) -> None:
        super().__init__()
        self.rotation = rotation
        self.a: nn.Module = Passthrough()
        self.b: nn.Module = Passthrough()

    def prepare(self, b: Tensor, positions: Tensor | None = None) -> Tensor:
        if self.rotation is not None:
            b = self.rotation(b)
        return self.b(b, positions)

    def forward(self, a: Tensor, b: Tensor, positions: Tensor | None = None) -> Tensor:
        if self.rotation is not None:
            a = self.rotation(a)
        return self.a(a, positions) @ b


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
