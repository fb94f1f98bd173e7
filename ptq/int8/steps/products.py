"""The integer products of a decoding step: few rows, so what counts is how fast weights come in.

    values   y (B, N) of `epilogue.py`, in the residual's number format
    parts    the product itself, int32 (P, B, N), of P ranges of K; their sum is exact in any order
    codes    those of GELU(y) (`blocks/gelu.py`), for the product behind it, with their sums

Tiles are small and K may be split, so that there are programs for all multiprocessors. Scales are
those of the step's position, which every program looks up. `reference_values` and `reference_codes`
are the same in plain PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ptq.int8.blocks import gelu
from ptq.int8.epilogue import Epilogue, reference_linear
from ptq.int8.kernel_parts import approximate_gelu, round_codes
from ptq.int8.ops import entry_at, static_codes

VALUES = tl.constexpr(0)
PARTS = tl.constexpr(1)
CODES = tl.constexpr(2)
LARGE_WEIGHT = 2**22  # codes


@dataclass(frozen=True)
class StepLinear:
    """A linear layer of a step.

    Attributes:
        weight: codes (N, K) int8.
        table: scale, zero point and their product of the input by position, float32 (3, P); the
            last position's serve all from there on.
        w_scale, zero_correction, bias: (N,) float32, see `epilogue.py`.
        w_offset: (N,) float32, or None where weights have no zero points.
        bits: of the input's codes.
        input_scale, input_shift: (K,) float32, what the input is divided by before it becomes
            codes, and what is taken off before that; or None.
    """

    weight: Tensor
    table: Tensor
    w_scale: Tensor
    zero_correction: Tensor
    w_offset: Tensor | None
    bias: Tensor
    bits: int
    input_scale: Tensor | None = None
    input_shift: Tensor | None = None

    def epilogue(self, code_sums: Tensor, position: Tensor) -> Epilogue:
        """The terms of the output at a position (1,), of codes with these sums (B,)."""
        return Epilogue(
            self.table,
            position,
            code_sums,
            self.w_scale,
            self.zero_correction,
            self.w_offset,
            self.bias,
        )


class Tiling(NamedTuple):
    """Tile sizes, the number of ranges that K is split into, pipeline stages and warps."""

    block_m: int
    block_n: int
    block_k: int
    parts: int = 1
    stages: int = 4
    warps: int = 4


def choose_tiling(rows: int, n: int, k: int, split: bool) -> Tiling:
    """The fastest tiling measured on an H200 for 200 rows, of RAR-B's to RAR-XXL's products.

    A weight of few codes is read fast whatever the tiles are, so there are many; of a large one
    they are high, as every tile of rows reads it again.
    """
    is_large = n * k > LARGE_WEIGHT and rows > 64
    block_m = 128 if is_large else 64
    parts = 1
    if split and is_large:
        parts = 3
    elif split:
        parts = 2 if k < 2 * n else 4
    return Tiling(block_m, 64, 128, parts)


@triton.jit
def _product_kernel(
    codes_desc,
    weight_desc,
    out,
    out_sums,
    code_sums,
    position_at,
    table,
    w_scale,
    zero_correction,
    w_offset,
    bias,
    next_table,
    next_scale,
    next_shift,
    M,
    N,
    K_PART,
    P,
    NEXT_P,
    OUTPUT: tl.constexpr,
    HAS_W_OFFSET: tl.constexpr,
    HAS_NEXT_SCALE: tl.constexpr,
    HAS_NEXT_SHIFT: tl.constexpr,
    GELU: tl.constexpr,
    HALF: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tiles_m * tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    # tiles of the same weight run together
    m = tile % tiles_m * BLOCK_M
    n = tile // tiles_m * BLOCK_N
    rows = m + tl.arange(0, BLOCK_M)
    cols = n + tl.arange(0, BLOCK_N)
    row_inside = rows < M
    col_inside = cols < N
    if OUTPUT != PARTS:
        # what no kernel of the step writes is there already
        position = tl.load(position_at).to(tl.int32)
        entry = table + tl.minimum(position, P - 1)
        scale = tl.load(entry)
        row_scale = scale * tl.load(w_scale + cols, mask=col_inside, other=0.0)
        offset = tl.load(entry + 2 * P)
        row_bias = offset * tl.load(zero_correction + cols, mask=col_inside, other=0.0)
        row_bias += tl.load(bias + cols, mask=col_inside, other=0.0)
        if HAS_W_OFFSET:
            row_slope = scale * tl.load(w_offset + cols, mask=col_inside, other=0.0)
        if OUTPUT == CODES:
            next_entry = next_table + tl.minimum(position, NEXT_P - 1)
            step = tl.load(next_entry)
            next_zero = tl.load(next_entry + NEXT_P)
            if HAS_NEXT_SCALE:
                step *= tl.load(next_scale + cols, mask=col_inside, other=1.0)
            inverse = 1.0 / step + tl.zeros((BLOCK_N,), dtype=tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(part * K_PART, (part + 1) * K_PART, BLOCK_K):
        codes = codes_desc.load([m, k])
        weight = weight_desc.load([n, k])
        product = tl.dot(codes, weight.T, product, out_dtype=tl.int32)
    place = rows[:, None] * N + cols[None, :]
    inside = row_inside[:, None] & col_inside[None, :]
    if OUTPUT == PARTS:
        tl.store(out + part * M * N + place, product, mask=inside)
    else:
        y = product.to(tl.float32) * row_scale[None, :] + row_bias[None, :]
        if HAS_W_OFFSET:
            sums = tl.load(code_sums + rows, mask=row_inside, other=0).to(tl.float32)
            y -= sums[:, None] * row_slope[None, :]
        if OUTPUT == VALUES:
            tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)
        else:
            hidden = approximate_gelu(y, GELU)
            if HAS_NEXT_SHIFT:
                hidden -= tl.load(next_shift + cols, mask=col_inside, other=0.0)[None, :]
            hidden = round_codes(hidden * inverse[None, :], next_zero, HALF)
            tl.store(out + place, hidden, mask=inside)
            hidden_sums = tl.sum(tl.where(inside, hidden.to(tl.int32), 0), axis=1)
            tl.atomic_add(out_sums + rows, hidden_sums, mask=row_inside, sem="relaxed")


def _launch(
    linear: StepLinear,
    codes: Tensor,
    code_sums: Tensor,
    position: Tensor,
    out: Tensor,
    output: tl.constexpr,
    tiling: Tiling,
    early: bool,
    following: StepLinear | None = None,
    out_sums: Tensor | None = None,
    form: str = "erf",
) -> None:
    rows = len(codes)
    n, k = linear.weight.shape
    tiles = triton.cdiv(rows, tiling.block_m) * triton.cdiv(n, tiling.block_n)
    blocks_k = triton.cdiv(k, tiling.block_k)
    unread = linear.bias  # stands in for tensors that the kernel does not read
    next_table = unread
    next_scale = None
    next_shift = None
    if following is not None:
        next_table = following.table
        next_scale = following.input_scale
        next_shift = following.input_shift
    _product_kernel[(tiles * tiling.parts,)](
        TensorDescriptor.from_tensor(codes, [tiling.block_m, tiling.block_k]),
        TensorDescriptor.from_tensor(linear.weight, [tiling.block_n, tiling.block_k]),
        out,
        out if out_sums is None else out_sums,
        code_sums,
        position,
        linear.table,
        linear.w_scale,
        linear.zero_correction,
        unread if linear.w_offset is None else linear.w_offset,
        linear.bias,
        next_table,
        unread if next_scale is None else next_scale,
        unread if next_shift is None else next_shift,
        rows,
        n,
        triton.cdiv(blocks_k, tiling.parts) * tiling.block_k,
        linear.table.shape[1],
        next_table.shape[-1],
        OUTPUT=output.value,
        HAS_W_OFFSET=linear.w_offset is not None,
        HAS_NEXT_SCALE=next_scale is not None,
        HAS_NEXT_SHIFT=next_shift is not None,
        GELU=form,
        HALF=128 if following is None else 2 ** (following.bits - 1),
        EARLY=early,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        num_stages=tiling.stages,
        num_warps=tiling.warps,
        **({"launch_pdl": True} if early else {}),
    )


def product_values(
    linear: StepLinear,
    codes: Tensor,
    code_sums: Tensor,
    position: Tensor,
    dtype: torch.dtype,
    early: bool = False,
    tiling: Tiling | None = None,
) -> Tensor:
    """y (B, N) of type `dtype` of codes (B, K) with these sums (B,), at a position (1,)."""
    out = torch.empty(len(codes), len(linear.weight), dtype=dtype, device=codes.device)
    tiling = tiling or choose_tiling(len(codes), *linear.weight.shape, split=False)
    _launch(linear, codes, code_sums, position, out, VALUES, tiling, early)
    return out


def product_parts(
    linear: StepLinear, codes: Tensor, early: bool = False, tiling: Tiling | None = None
) -> Tensor:
    """The integer product of codes (B, K), int32 (P, B, N), to be summed over the P parts."""
    tiling = tiling or choose_tiling(len(codes), *linear.weight.shape, split=True)
    shape = (tiling.parts, len(codes), len(linear.weight))
    out = torch.empty(shape, dtype=torch.int32, device=codes.device)
    unread = linear.bias
    _launch(linear, codes, unread, unread, out, PARTS, tiling, early)
    return out


def product_codes(
    linear: StepLinear,
    following: StepLinear,
    form: str,
    codes: Tensor,
    code_sums: Tensor,
    out_sums: Tensor,
    position: Tensor,
    early: bool = False,
    tiling: Tiling | None = None,
) -> Tensor:
    """Codes (B, N) of GELU(y), of this form, for the layer `following`; their sums are added to
    `out_sums` (B,), int32."""
    out = torch.empty(len(codes), len(linear.weight), dtype=torch.int8, device=codes.device)
    tiling = tiling or choose_tiling(len(codes), *linear.weight.shape, split=False)
    _launch(
        linear, codes, code_sums, position, out, CODES, tiling, early, following, out_sums, form
    )
    return out


def reference_values(
    linear: StepLinear, codes: Tensor, code_sums: Tensor, position: Tensor, dtype: torch.dtype
) -> Tensor:
    """What `product_values` computes, in plain PyTorch."""
    return reference_linear(codes, linear.weight, linear.epilogue(code_sums, position), dtype)


def reference_codes(
    linear: StepLinear,
    following: StepLinear,
    form: str,
    codes: Tensor,
    code_sums: Tensor,
    position: Tensor,
) -> Tensor:
    """The codes that `product_codes` makes, in plain PyTorch."""
    y = reference_values(linear, codes, code_sums, position, torch.float32)  # (B, N)
    hidden = gelu.approximate_gelu(y, form)
    if following.input_shift is not None:
        hidden = hidden - following.input_shift
    if following.input_scale is not None:
        hidden = hidden / following.input_scale
    scale, zero_point, _ = entry_at(following.table, position)[:, None]  # (1,) each
    return static_codes(hidden, scale, zero_point, following.bits)
