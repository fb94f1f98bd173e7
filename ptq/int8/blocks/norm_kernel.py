"""Residual, norm, modulation, rounding and sums of codes in one kernel (Triton, CUDA): the formula
of `norms.py`.

A program holds one row. Nothing is written but the stream, the codes and their sum, so time is that
of the bytes: 81 us on an H200 at 25,600 rows of 1,024 channels and a modulation by token. Rows
whose channels are no power of two come in two pieces: 79 us in place of 87 at 1,280 channels
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
MIN_PIECE = 64  # channels: fewer leave lanes of two warps without any


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
def _add_branch(
    channels,
    x,
    branch,
    gate,
    product_params,
    code_sums,
    w_scale,
    zero_correction,
    w_offset,
    product_bias,
    stream,
    row,
    product_column,
    C,
    PRODUCT_P,
    part_stride,
    gate_each,
    gate_count,
    gate_row,
    HAS_BRANCH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_W_OFFSET: tl.constexpr,
    HAS_PRODUCT_BIAS: tl.constexpr,
):
    """Some channels of the stream with its branch, float32, written if there is one; zero behind
    the last channel."""
    inside = channels < C
    place = row.to(tl.int64) * C + channels
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        if PARTS == 0:
            added = tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
        else:
            product = tl.load(branch + place, mask=inside, other=0)
            for part in tl.static_range(1, PARTS):
                product += tl.load(branch + part * part_stride + place, mask=inside, other=0)
            product_scale = tl.load(product_params + product_column)
            offset = tl.load(product_params + 2 * PRODUCT_P + product_column)
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
        tl.store(stream + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    return value


@triton.jit
def _write_codes(
    value,
    channels,
    weight,
    bias,
    scale,
    shift,
    kappa,
    positions,
    sink_mean,
    codes,
    row,
    x_scale,
    zero_point,
    C,
    T,
    sinks,
    modulation_each,
    modulation_count,
    scale_row,
    shift_row,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_KAPPA: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Write the codes of some channels, which are normalised, and return their sum."""
    inside = channels < C
    each = modulation_each
    count = modulation_count
    if HAS_WEIGHT:
        value *= _load_channels(weight, channels, inside, True, 1.0)
    if HAS_BIAS:
        value += _load_channels(bias, channels, inside, True, 0.0)
    if HAS_SCALE:
        gain = _load_channels(kappa, channels, inside, HAS_KAPPA, 1.0)
        gain += _load_rows(scale, row, each, count, scale_row, channels, inside)
        value *= gain
    if HAS_SHIFT:
        value += _load_rows(shift, row, each, count, shift_row, channels, inside)
    if HAS_SINKS:
        is_sink = tl.load(positions + row % T) < sinks
        mean = tl.load(sink_mean + channels, mask=inside, other=0.0)
        value -= tl.where(is_sink, mean, 0.0)
    rounded = round_codes(value * (1 / x_scale), zero_point, HALF)
    tl.store(codes + row.to(tl.int64) * C + channels, rounded, mask=inside)
    return tl.sum(tl.where(inside, rounded.to(tl.int32), 0), 0)


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
    HEAD: tl.constexpr,
    REST: tl.constexpr,
):
    """Arguments named like `scale_row` are strides; PARTS is 0 if the branch is no integers.

    The row is held in two pieces, of HEAD channels and of REST: one piece would be a power of two
    high, and 1,280 channels would cost what 2,048 do.
    """
    row = tl.program_id(0)
    # first, as one look-up waits for the other
    column = table_columns(positions, row, T, P, HAS_POSITIONS)
    x_scale = tl.load(x_params + column)
    zero_point = tl.load(x_params + P + column)
    product_column = 0
    if PARTS > 0:
        product_column = table_columns(positions, row, PRODUCT_T, PRODUCT_P, HAS_POSITIONS)

    channels = tl.arange(0, HEAD)
    value = _add_branch(
        channels, x, branch, gate, product_params, code_sums, w_scale, zero_correction, w_offset,
        product_bias, stream, row, product_column, C, PRODUCT_P, part_stride, gate_each, gate_count,
        gate_row, HAS_BRANCH, HAS_GATE, PARTS, HAS_W_OFFSET, HAS_PRODUCT_BIAS,
    )  # fmt: skip
    if REST > 0:
        others = HEAD + tl.arange(0, REST)
        other = _add_branch(
            others, x, branch, gate, product_params, code_sums, w_scale, zero_correction, w_offset,
            product_bias, stream, row, product_column, C, PRODUCT_P, part_stride, gate_each,
            gate_count, gate_row, HAS_BRANCH, HAS_GATE, PARTS, HAS_W_OFFSET, HAS_PRODUCT_BIAS,
        )  # fmt: skip

    if NORM == "silu":
        value = value * tl.sigmoid(value)
        if REST > 0:
            other = other * tl.sigmoid(other)
    if NORM == "layer":
        total = tl.sum(value, 0)
        if REST > 0:
            total += tl.sum(other, 0)
        value = tl.where(channels < C, value - total / C, 0.0)
        if REST > 0:
            other = tl.where(others < C, other - total / C, 0.0)
    if NORM == "layer" or NORM == "rms":
        squares = tl.sum(value * value, 0)
        if REST > 0:
            squares += tl.sum(other * other, 0)
        factor = tl.rsqrt(squares / C + eps)
        value *= factor
        if REST > 0:
            other *= factor

    code_sum = _write_codes(
        value, channels, weight, bias, scale, shift, kappa, positions, sink_mean, codes, row,
        x_scale, zero_point, C, T, sinks, modulation_each, modulation_count, scale_row, shift_row,
        HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT, HAS_KAPPA, HAS_SINKS, HALF,
    )  # fmt: skip
    if REST > 0:
        code_sum += _write_codes(
            other, others, weight, bias, scale, shift, kappa, positions, sink_mean, codes, row,
            x_scale, zero_point, C, T, sinks, modulation_each, modulation_count, scale_row,
            shift_row, HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT, HAS_KAPPA, HAS_SINKS, HALF,
        )  # fmt: skip
    tl.store(sums + row, code_sum)


def split_channels(channels: int) -> tuple[int, int]:
    """Sizes of the two pieces of a row, powers of two that hold so many channels; the second is 0
    if one is no larger than both."""
    whole = triton.next_power_of_2(channels)
    head = whole // 2
    rest = max(MIN_PIECE, triton.next_power_of_2(channels - head))
    return (head, rest) if head + rest < whole else (whole, 0)


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
    head, rest = split_channels(channels)
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
        HEAD=head,
        REST=rest,
        num_warps=WARPS,
    )
    return stream, codes, sums
