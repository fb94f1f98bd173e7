"""Residual, norm, modulation, rounding and sums of codes in one kernel (Triton, CUDA): the formula
of `norms.py`.

A program holds one row. Nothing is written but the stream, the codes and their sum, so time is that
of the bytes: 81 us on an H200 at 25,600 rows of 1,024 channels and a modulation by token
(`experiments/results/raw/kernels-h200.json`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.int8.blocks.norms import Branch, Grid, Modulation, Norm
from ptq.int8.kernel_parts import round_codes, table_columns

WARPS = 2  # of a program; up to 2,048 channels four take longer


@triton.jit
def _load_channels(values, channels, inside, HAS_VALUES: tl.constexpr, DEFAULT: tl.constexpr):
    """A vector (BLOCK_C,) float32, or what it is if it is not there."""
    if HAS_VALUES:
        return tl.load(values + channels, mask=inside, other=0.0).to(tl.float32)
    return tl.full(channels.shape, DEFAULT, tl.float32)


@triton.jit
def _load_rows(values, row, rows_each, count, stride, channels, inside):
    """The part (BLOCK_C,) of a modulation that belongs to a row."""
    own = tl.minimum(row // rows_each, count - 1).to(tl.int64)
    return tl.load(values + own * stride + channels, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _norm_codes_kernel(
    x,
    weight,
    bias,
    scale,
    shift,
    kappa,
    x_params,
    positions,
    sink_mean,
    branch,
    gate,
    product_params,
    code_sums,
    w_scale,
    zero_correction,
    w_offset,
    product_bias,
    stream,
    codes,
    sums,
    C,
    T,
    P,
    PRODUCT_T,
    PRODUCT_P,
    part_stride,
    eps,
    sinks,
    modulation_each,
    modulation_count,
    scale_row,
    shift_row,
    gate_each,
    gate_count,
    gate_row,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_KAPPA: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_W_OFFSET: tl.constexpr,
    HAS_PRODUCT_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Arguments named like `scale_row` are strides; PARTS is 0 if the branch is no integers."""
    row = tl.program_id(0)
    first = row.to(tl.int64) * C
    channels = tl.arange(0, BLOCK_C)
    inside = channels < C
    # first, as one look-up waits for the other
    column = table_columns(positions, row, T, P, HAS_POSITIONS)
    x_scale = tl.load(x_params + column)
    zero_point = tl.load(x_params + P + column)
    value = tl.load(x + first + channels, mask=inside, other=0.0).to(tl.float32)
    # all that is read is asked for before anything waits
    norm_weight = _load_channels(weight, channels, inside, HAS_WEIGHT, 1.0)
    norm_bias = _load_channels(bias, channels, inside, HAS_BIAS, 0.0)
    one = _load_channels(kappa, channels, inside, HAS_KAPPA, 1.0)
    each = modulation_each
    count = modulation_count
    if HAS_SCALE:
        own_scale = _load_rows(scale, row, each, count, scale_row, channels, inside)
    if HAS_SHIFT:
        own_shift = _load_rows(shift, row, each, count, shift_row, channels, inside)

    if HAS_BRANCH:
        if PARTS == 0:
            added = tl.load(branch + first + channels, mask=inside, other=0.0).to(tl.float32)
        else:
            product = tl.load(branch + first + channels, mask=inside, other=0)
            for part in tl.static_range(1, PARTS):
                place = branch + part * part_stride + first + channels
                product += tl.load(place, mask=inside, other=0)
            own = table_columns(positions, row, PRODUCT_T, PRODUCT_P, HAS_POSITIONS)
            product_scale = tl.load(product_params + own)
            offset = tl.load(product_params + 2 * PRODUCT_P + own)
            added = offset * tl.load(zero_correction + channels, mask=inside, other=0.0)
            added += _load_channels(product_bias, channels, inside, HAS_PRODUCT_BIAS, 0.0)
            if HAS_W_OFFSET:
                scaled_sum = tl.load(code_sums + row).to(tl.float32) * product_scale
                added -= scaled_sum * tl.load(w_offset + channels, mask=inside, other=0.0)
            w_step = tl.load(w_scale + channels, mask=inside, other=0.0)
            added += product.to(tl.float32) * (product_scale * w_step)
        if HAS_GATE:
            added *= _load_rows(gate, row, gate_each, gate_count, gate_row, channels, inside)
        rounded = (value + added).to(stream.dtype.element_ty)
        tl.store(stream + first + channels, rounded, mask=inside)
        value = rounded.to(tl.float32)

    if NORM == "layer":
        value = tl.where(inside, value - tl.sum(value, 0) / C, 0.0)
    if NORM == "silu":
        value = value * tl.sigmoid(value)
    elif NORM != "none":
        value = value * tl.rsqrt(tl.sum(value * value, 0) / C + eps)
    if HAS_WEIGHT:
        value *= norm_weight
    if HAS_BIAS:
        value += norm_bias
    if HAS_SCALE:
        value *= one + own_scale
    if HAS_SHIFT:
        value += own_shift
    if HAS_SINKS:
        is_sink = tl.load(positions + row % T) < sinks
        mean = tl.load(sink_mean + channels, mask=inside, other=0.0)
        value -= tl.where(is_sink, mean, 0.0)

    rounded_codes = round_codes(value * (1 / x_scale), zero_point, HALF)
    tl.store(codes + first + channels, rounded_codes, mask=inside)
    total = tl.sum(tl.where(inside, rounded_codes.to(tl.int32), 0), 0)
    tl.store(sums + row, total)


def _rows_each(values: Tensor | None, rows: int) -> tuple[int, int, int]:
    """Of a modulation (G, C): rows of the stream that read the same row of it, G, and its
    stride."""
    if values is None:
        return 1, 1, 0
    return max(1, rows // len(values)), len(values), values.stride(0)


def launch_norm_codes(
    x: Tensor, norm: Norm, modulation: Modulation, grid: Grid, branch: Branch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`operators.norm_codes` on a CUDA device."""
    rows, channels = x.shape
    value = None if branch is None else branch.value
    gate = None if branch is None else branch.gate
    epilogue = None if branch is None else branch.epilogue
    stream = x if branch is None else torch.empty_like(x)
    codes = torch.empty_like(x, dtype=torch.int8)
    sums = torch.empty(rows, dtype=torch.int32, device=x.device)
    columns = grid.x_params.shape[1]
    tokens = columns if grid.positions is None else len(grid.positions)
    scale_each, scale_count, scale_row = _rows_each(modulation.scale, rows)
    shift_each, shift_count, shift_row = _rows_each(modulation.shift, rows)
    gate_each, gate_count, gate_row = _rows_each(gate, rows)
    product = (None,) * 6
    product_columns = 1
    if epilogue is not None:
        product_params, _, *terms = epilogue
        product = (product_params, *terms)
        product_columns = product_params.shape[1]
    pointers = (
        norm.weight,
        norm.bias,
        modulation.scale,
        modulation.shift,
        modulation.kappa,
        grid.x_params,
        grid.positions,
        grid.sink_mean,
        value,
        gate,
        *product,
    )
    _norm_codes_kernel[(rows,)](
        x,
        *(x if pointer is None else pointer for pointer in pointers),  # x stands in, unread
        stream,
        codes,
        sums,
        channels,
        tokens,
        columns,
        product_columns if grid.positions is None else tokens,
        product_columns,
        rows * channels,
        norm.eps,
        grid.sinks,
        max(scale_each, shift_each),
        max(scale_count, shift_count),
        scale_row,
        shift_row,
        gate_each,
        gate_count,
        gate_row,
        NORM=norm.kind,
        HAS_WEIGHT=norm.weight is not None,
        HAS_BIAS=norm.bias is not None,
        HAS_SCALE=modulation.scale is not None,
        HAS_SHIFT=modulation.shift is not None,
        HAS_KAPPA=modulation.kappa is not None,
        HAS_POSITIONS=grid.positions is not None,
        HAS_SINKS=grid.sink_mean is not None,
        HAS_BRANCH=branch is not None,
        HAS_GATE=gate is not None,
        PARTS=0 if epilogue is None else len(value),
        HAS_W_OFFSET=epilogue is not None and epilogue.w_offset is not None,
        HAS_PRODUCT_BIAS=epilogue is not None and epilogue.bias is not None,
        HALF=2 ** (grid.bits - 1),
        BLOCK_C=triton.next_power_of_2(channels),
        num_warps=WARPS,
    )
    return stream, codes, sums
