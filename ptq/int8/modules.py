"""Linear layers that run in integers, and how they and attention in integers take the places of
simulated ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.int8 import ops
from ptq.int8.attention import find_attentions
from ptq.int8.codes import FEW_ROWS, DynamicCodes, InputCodes, LinearCodes, linear_codes
from ptq.int8.fixed import Fixed
from ptq.modules import QuantLinear, swap_module

ALIGNMENT = 16  # inputs are padded with zero codes to a multiple of it, which changes no sum


class Int8Linear(Fixed):
    """y = Q(x') W^T + (x' A^T) B^T + b with an integer product; the result has the type of x.

    The parts of the class are those of `LinearCodes`; `column` and `slope` are the corrections of
    `gemm.py`, made once in float64; weights without zero points have no slope, and need no sums of
    the codes. Codes are made in float32 of any x, and `.bfloat16()` of a whole model leaves the
    layer as it is.
    """

    def __init__(self, codes: LinearCodes) -> None:
        super().__init__()
        w = codes.weight.centred()
        self.in_features = w.codes.shape[1]
        self.out_features = w.codes.shape[0]
        self.padding = -self.in_features % ALIGNMENT
        scale = w.scale.double()
        zero = w.zero.double()
        sums = w.codes.sum(dim=1, dtype=torch.int64).double()
        self.register_buffer("weight", F.pad(w.codes, (0, self.padding)).contiguous())
        self.register_buffer("width", w.scale.float())
        self.register_buffer("column", (scale * (self.in_features * zero - sums)).float())
        self.register_buffer("slope", (scale * zero).float() if w.zero.any() else None)
        self.register_buffer("bias", codes.bias)
        self.register_buffer("down", codes.down)
        self.register_buffer("up", codes.up)
        self.transform = codes.transform
        self.dynamic = codes.input if isinstance(codes.input, DynamicCodes) else None
        static = codes.input if isinstance(codes.input, InputCodes) else None
        self.bits = codes.input.bits
        self.register_buffer("table", None if static is None else static.by_position())

    def encode(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes int8 of x' (..., T, K), or of its rows (M, K) if they are dynamic, and rs and ro
        (T,) or (M,) of `gemm.py`, float32; (1,) if all tokens share them."""
        if self.dynamic is not None:
            codes, scale, zero = ops.dynamic_codes(x.flatten(0, -2), self.dynamic)
            return codes, scale, scale * zero
        shared = self.table.shape[1] == 1
        scale, zero, offset = self.table if shared else ops.token_params(self.table, positions)
        return ops.static_codes(x, scale, zero, self.bits), scale, offset

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        dtype = x.dtype
        if self.transform is not None:
            x = self.transform(x)  # in float32, where its scales are
        codes, scale, offset = self.encode(x, positions)
        rows = F.pad(codes, (0, self.padding)).flatten(0, -2)
        few = self.slope is not None and len(rows) <= FEW_ROWS
        # the compiler adds them up while it makes the codes
        sums = rows.sum(dim=1, dtype=torch.int32) if few else None
        y = ops.int8_linear(
            rows,
            self.weight,
            scale,
            offset,
            sums,
            self.width,
            self.column,
            self.slope,
            self.bias,
            dtype,
        )
        y = y.view(*x.shape[:-1], -1)
        if self.down is None:
            return y
        return y + F.linear(F.linear(x.to(dtype), self.down.to(dtype)), self.up.to(dtype))


def all_codes(model: nn.Module, bits: int) -> dict[str, LinearCodes]:
    """The codes of every quantized linear of a model, by name.

    Raises:
        ConfigError: one has no integer counterpart.
    """
    return {
        name: linear_codes(m, bits, name)
        for name, m in model.named_modules()
        if isinstance(m, QuantLinear)
    }


def make_int8_modules(model: nn.Module, codes: Mapping[str, LinearCodes]) -> dict[str, nn.Module]:
    """By name, linears that run in integers, and attention in integers wherever that can be
    (`attention.py`)."""
    return {name: Int8Linear(linear) for name, linear in codes.items()} | find_attentions(model)


def to_int8(model: nn.Module, codes: Mapping[str, LinearCodes]) -> None:
    """Put all these modules into their places."""
    for name, module in make_int8_modules(model, codes).items():
        swap_module(model, name, module)
