"""Linear layers that run in integers, and how integer modules take the places of simulated ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.int8 import ops
from ptq.int8.attentions import find_attentions
from ptq.int8.blocks.norms import Grid, Modulation, Norm
from ptq.int8.blocks.operators import norm_codes
from ptq.int8.codes import ALIGNMENT, FEW_ROWS, DynamicCodes, LinearCodes, linear_codes
from ptq.int8.epilogue import Epilogue
from ptq.int8.fixed import Fixed
from ptq.modules import QuantLinear, swap_module


class Int8Linear(Fixed):
    """y = Q(x') W^T + (x' A^T) B^T + b with an integer product; the result has the type of x.

    The parts of the class are those of `LinearCodes`. `zero_correction` and `w_offset` are the
    terms of `epilogue.py`, made once in float64. Weights without zero points have no `w_offset`,
    and need no sums of the codes. Codes are made in float32 of any x, and `.bfloat16()` of a whole
    model leaves the layer as it is.

    Attributes:
        one_kernel: codes and their sums are made by one kernel of their own (`blocks/norms.py`),
            for layers that run without a compiler, which would fuse what makes them.
    """

    one_kernel = False

    def __init__(self, codes: LinearCodes) -> None:
        super().__init__()
        weight = codes.weight.centred()
        self.out_features, self.in_features = weight.codes.shape
        self.padding = -self.in_features % ALIGNMENT  # zero codes, which change no sum
        scale = weight.scale.double()  # (O,)
        zero_point = weight.zero_point.double()  # (O,)
        weight_sums = weight.codes.sum(dim=1, dtype=torch.int64).double()  # (O,)
        zero_correction = scale * (self.in_features * zero_point - weight_sums)
        w_offset = (scale * zero_point).float() if weight.zero_point.any() else None
        self.register_buffer("weight", F.pad(weight.codes, (0, self.padding)).contiguous())
        self.register_buffer("w_scale", weight.scale.float())
        self.register_buffer("zero_correction", zero_correction.float())
        self.register_buffer("w_offset", w_offset)
        self.register_buffer("bias", codes.bias)
        self.register_buffer("down", codes.down)
        self.register_buffer("up", codes.up)
        self.transform = codes.transform
        self.sink_shift = codes.sink_shift
        self.bits = codes.input.bits
        self.dynamic: DynamicCodes | None = None
        table: Tensor | None = None  # (3, P): scale, zero point and x_offset by token position
        if isinstance(codes.input, DynamicCodes):
            self.dynamic = codes.input
        else:
            table = codes.input.by_position()
        self.register_buffer("table", table)

    def encode(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The codes int8 of x', and `x_params` and `positions` of its `Epilogue`.

        The codes are (..., T, K), or (M, K) of all rows if ranges are dynamic.
        """
        if self.dynamic is not None:
            return *ops.dynamic_codes(x.flatten(0, -2), self.dynamic), None
        if self.table.shape[1] == 1:
            positions = None  # all tokens share their parameters
        params = self.table if positions is None else ops.token_params(self.table, positions)
        x_scale, zero_point, _ = params  # (T,) or (1,) each
        codes = ops.static_codes(x, x_scale, zero_point, self.bits)
        return codes, self.table, positions

    def epilogue(
        self, x_params: Tensor, positions: Tensor | None, code_sums: Tensor | None
    ) -> Epilogue:
        """The terms that make y of the integer product."""
        return Epilogue(
            x_params,
            positions,
            code_sums,
            self.w_scale,
            self.zero_correction,
            self.w_offset,
            self.bias,
        )

    def encode_rows(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """The codes int8 (M, K) of all rows of x' and their sums (M,), by one kernel."""
        grid = Grid(self.table, positions, self.bits)
        rows = x.flatten(0, -2).contiguous()  # (M, K)
        return norm_codes(rows, Norm(), Modulation(), grid)[1:]

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        dtype = x.dtype
        if self.transform is not None:
            x = self.transform(x)  # in float32, where its scales are
        shifted = x if self.sink_shift is None else self.sink_shift.shift_input(x, positions)
        code_sums = None
        if self.one_kernel and self.dynamic is None:
            codes, code_sums = self.encode_rows(shifted, positions)  # (M, K) and (M,)
            x_params = self.table
            row_positions = positions
        else:
            codes, x_params, row_positions = self.encode(shifted, positions)
        rows = F.pad(codes, (0, self.padding)).flatten(0, -2)  # (M, K)
        if self.w_offset is not None and code_sums is None and len(rows) <= FEW_ROWS:
            # the compiler adds them up while it makes the codes
            code_sums = rows.sum(dim=1, dtype=torch.int32)  # (M,)
        epilogue = self.epilogue(x_params, row_positions, code_sums)
        y = ops.int8_linear(rows, self.weight, *epilogue, dtype)
        y = y.view(*x.shape[:-1], -1)  # (..., T, O)
        if self.sink_shift is not None:
            y = self.sink_shift.restore_output_(y, positions)
        if self.down is None:
            return y
        low_rank = F.linear(x.to(dtype), self.down.to(dtype))  # (..., r)
        return y + F.linear(low_rank, self.up.to(dtype))


def all_codes(model: nn.Module, bits: int) -> dict[str, LinearCodes]:
    """The codes of every quantized linear of a model, by name.

    Raises:
        ConfigError: one has no integer counterpart.
    """
    codes: dict[str, LinearCodes] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            codes[name] = linear_codes(module, bits, name)
    return codes


def make_int8_modules(model: nn.Module, codes: Mapping[str, LinearCodes]) -> dict[str, nn.Module]:
    """Linears that run in integers, and attention wherever that can be (`attention.py`), by
    name."""
    linears = {name: Int8Linear(linear) for name, linear in codes.items()}
    return linears | find_attentions(model)


def to_int8(model: nn.Module, codes: Mapping[str, LinearCodes]) -> None:
    """Put integer modules into the places of the simulated ones."""
    for name, module in make_int8_modules(model, codes).items():
        swap_module(model, name, module)
