"""The integer matrix product with its epilogue in one kernel (Triton, CUDA).

    y = x_scale w_scale (codes weight^T) + x_offset zero_correction - x_scale code_sums w_offset
        + bias

codes (M, K), weight (N, K) int8, y (M, N); `epilogue.py` explains the terms. The scale of a row is
read from the table at its token's position. Code sums come from whoever makes the codes; where they
do not, a pass of its own makes them.

Tiles come in through TMA and, where rows of the output are aligned, leave through it. Programs are
persistent, and the loop over their tiles is one with that over K: the next tile is on its way while
the last one is converted and stored. Two programs share a multiprocessor, so that one multiplies
while the other converts; a tile leaves in two halves, which is what lets both fit.

The first layer of an MLP writes codes instead: those of GELU(y) for the second layer, shifted and
scaled where that layer's input is, and their sums, which the tiles of a row add up. GELU by one
instruction (`blocks/gelu.py`) and rounding cost 44 to 60 us at 25,600 x 1,024 x 4,096 on an H200
(`experiments/results/raw/kernels-h200.json`).

A product of queries, keys and values whose heads have 64 channels, half a tile, leaves what
attention needs of the norms of keys: they are in registers here, and attention would compute them
once for every block of queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ptq.int8.codes import ALIGNMENT, FEW_ROWS, HEAD_CHANNELS
from ptq.int8.epilogue import Epilogue
from ptq.int8.kernel_parts import approximate_gelu, inverse_norm, round_codes, table_columns
from ptq.int8.row_kernels import row_sums

GROUP_M = 8  # tiles along M that run together


@triton.jit
def _store_tile(
    product,
    first_row,
    first_col,
    out_desc,
    out,
    M,
    N,
    T,
    P,
    x_params,
    positions,
    code_sums,
    w_scale,
    zero_correction,
    w_offset,
    bias,
    OUT_T,
    OUT_P,
    out_params,
    out_sums,
    sink_bias,
    sinks,
    out_sink_mean,
    out_sinks,
    out_scale,
    out_shift,
    key_factors,
    key_eps,
    HAS_POSITIONS: tl.constexpr,
    HAS_W_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SINK_BIAS: tl.constexpr,
    HAS_OUT_SINKS: tl.constexpr,
    HAS_OUT_SCALE: tl.constexpr,
    HAS_OUT_SHIFT: tl.constexpr,
    GELU: tl.constexpr,
    HALF: tl.constexpr,
    KEY_NORM: tl.constexpr,
    EVEN: tl.constexpr,
    TMA_STORE: tl.constexpr,
):
    """Write y, or the codes of its GELU, of a part of the product whose first element is at
    (first_row, first_col)."""
    rows = first_row + tl.arange(0, product.shape[0])
    cols = first_col + tl.arange(0, product.shape[1])
    row = rows
    col = cols
    if not EVEN:
        # in bounds; what lies beyond is not stored
        row = rows % M
        col = cols % N
    column = table_columns(positions, row, T, P, HAS_POSITIONS)  # (rows,)
    scale = tl.load(x_params + column)  # (rows,)
    offset = tl.load(x_params + 2 * P + column)  # (rows,)
    # (rows, cols), float32
    y = offset[:, None] * tl.load(zero_correction + col)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + col).to(tl.float32)[None, :]
    if HAS_W_OFFSET:
        scaled_sums = tl.load(code_sums + row).to(tl.float32) * scale
        y -= scaled_sums[:, None] * tl.load(w_offset + col)[None, :]
    y += product.to(tl.float32) * (scale[:, None] * tl.load(w_scale + col)[None, :])
    if GELU == "none":
        result = y.to(out.dtype.element_ty)
        if KEY_NORM != "none":
            # these columns are those of one head; the middle third of all are keys
            width = N // 3
            if (first_col >= width) & (first_col < 2 * width):
                factor = inverse_norm(result.to(tl.float32), key_eps, KEY_NORM, product.shape[1])
                heads = width // product.shape[1]
                head = (first_col - width) // product.shape[1]
                tl.store(key_factors + rows * heads + head, factor, mask=rows < M)
    else:
        if HAS_SINK_BIAS:
            is_sink = tl.load(positions + row % T) < sinks
            y += tl.where(is_sink[:, None], tl.load(sink_bias + col)[None, :], 0.0)
        activated = approximate_gelu(y, GELU)
        if HAS_OUT_SHIFT:
            activated -= tl.load(out_shift + col)[None, :]
        if HAS_OUT_SCALE:
            activated *= 1 / tl.load(out_scale + col)[None, :]
        if HAS_OUT_SINKS:
            is_sink = tl.load(positions + row % T) < out_sinks
            activated -= tl.where(is_sink[:, None], tl.load(out_sink_mean + col)[None, :], 0.0)
        out_column = table_columns(positions, row, OUT_T, OUT_P, HAS_POSITIONS)
        per_step = 1 / tl.load(out_params + out_column)  # (rows,)
        zero_point = tl.load(out_params + OUT_P + out_column)
        result = round_codes(activated * per_step[:, None], zero_point[:, None], HALF)
        counted = result.to(tl.int32)
        if not EVEN:
            counted = tl.where((cols < N)[None, :], counted, 0)
        tl.atomic_add(out_sums + row, tl.sum(counted, 1), mask=rows < M, sem="relaxed")
    if TMA_STORE:
        out_desc.store([first_row, first_col], result)
    else:
        place = out + rows[:, None].to(tl.int64) * N + cols[None, :]
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(place, result, mask=inside)


@triton.jit
def _linear_kernel(
    codes_desc,
    weight_desc,
    out_desc,
    out,
    M,
    N,
    K,
    T,
    P,
    x_params,
    positions,
    code_sums,
    w_scale,
    zero_correction,
    w_offset,
    bias,
    OUT_T,
    OUT_P,
    out_params,
    out_sums,
    sink_bias,
    sinks,
    out_sink_mean,
    out_sinks,
    out_scale,
    out_shift,
    key_factors,
    key_eps,
    HAS_POSITIONS: tl.constexpr,
    HAS_W_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SINK_BIAS: tl.constexpr,
    HAS_OUT_SINKS: tl.constexpr,
    HAS_OUT_SCALE: tl.constexpr,
    HAS_OUT_SHIFT: tl.constexpr,
    GELU: tl.constexpr,
    HALF: tl.constexpr,
    KEY_NORM: tl.constexpr,
    EVEN: tl.constexpr,
    TMA_STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # tiles that share rows of codes and of the weight run together, for the L2 cache
    group_tiles = GROUP_M * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        group_first = tile // group_tiles * GROUP_M
        group_height = min(tiles_m - group_first, GROUP_M)
        m = (group_first + tile % group_tiles % group_height) * BLOCK_M
        n = tile % group_tiles // group_height * BLOCK_N
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for k in range(0, K, BLOCK_K):
            codes = codes_desc.load([m, k])
            weight = weight_desc.load([n, k])
            product = tl.dot(codes, weight.T, product, out_dtype=tl.int32)
        halves = tl.reshape(product, (BLOCK_M, 2, BLOCK_N // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        for half in tl.static_range(2):
            _store_tile(
                left if half == 0 else right,
                m,
                n + half * (BLOCK_N // 2),
                out_desc,
                out,
                M,
                N,
                T,
                P,
                x_params,
                positions,
                code_sums,
                w_scale,
                zero_correction,
                w_offset,
                bias,
                OUT_T,
                OUT_P,
                out_params,
                out_sums,
                sink_bias,
                sinks,
                out_sink_mean,
                out_sinks,
                out_scale,
                out_shift,
                key_factors,
                key_eps,
                HAS_POSITIONS,
                HAS_W_OFFSET,
                HAS_BIAS,
                HAS_SINK_BIAS,
                HAS_OUT_SINKS,
                HAS_OUT_SCALE,
                HAS_OUT_SHIFT,
                GELU,
                HALF,
                KEY_NORM,
                EVEN,
                TMA_STORE,
            )


class Encoding(NamedTuple):
    """How a result leaves as codes of its GELU.

    Attributes:
        out_params: scales and zero points of the codes by position (3, P).
        out_sums: (M,) int32, zero: where their sums are added up.
        sink_bias: (N,), added to the result at positions below `sinks`; or None.
        out_shift: (N,), taken off GELU's result; or None.
        out_scale: (N,), what it is divided by then; or None.
        out_sink_mean: (N,), taken off last, at positions below `out_sinks`; or None.
        form: of GELU, or "none": no codes.
        bits: of the codes.
    """

    out_params: Tensor
    out_sums: Tensor
    sink_bias: Tensor | None = None
    sinks: int = 0
    out_sink_mean: Tensor | None = None
    out_sinks: int = 0
    out_scale: Tensor | None = None
    out_shift: Tensor | None = None
    form: str = "none"
    bits: int = 8


class KeyFactors(NamedTuple):
    """What of the norms of keys a product of queries, keys and values leaves for attention.

    Attributes:
        values: (M, H) float32, written: 1 / std or 1 / |k| of every head's key.
        kind: "layer" or "unit" (`blocks/attention.py`), or "none".
        eps: of LayerNorm.
    """

    values: Tensor
    kind: str = "none"
    eps: float = 0.0


@dataclass(frozen=True)
class Tiling:
    """Tile sizes, pipeline stages, warps, and programs per multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    programs: int = 1


def choose_tiling(m: int, n: int, k: int, dtype: torch.dtype) -> Tiling:
    """The fastest tiling for a product of these sizes.

    That for many rows was measured on an H200 (`experiments/results/raw/gemm-h200.json`; float32
    was not timed), those for few rows, as decoding steps have, on an H100.
    """
    if m > FEW_ROWS:
        if dtype == torch.float32:  # shared memory does not hold two such tiles of the output
            return Tiling(128, 128, 128, stages=3, warps=8)
        return Tiling(128, 128, 128, stages=3, warps=4, programs=2)
    if k > 2 * n:
        return Tiling(64, 32, 256, stages=4, warps=4, programs=4)
    return Tiling(64, 128, 128, stages=4, warps=4, programs=2)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_linear(
    codes: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    dtype: torch.dtype,
    tiling: Tiling | None = None,
) -> Tensor:
    """y (M, N) of type `dtype`; all tensors are contiguous and on a CUDA device.

    Raises:
        ValueError: K is no multiple of 16.
    """
    out = torch.empty(len(codes), len(weight), dtype=dtype, device=codes.device)
    _launch(codes, weight, epilogue, out, tiling)
    return out


def launch_linear_keys(
    codes: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    dtype: torch.dtype,
    heads: int,
    kind: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y (M, 3 C) and the factors (M, H) of its keys: `operators.int8_linear_keys` on a CUDA device.

    Raises:
        ValueError: K is no multiple of 16, or a head has not the channels of half a tile.
    """
    out = torch.empty(len(codes), len(weight), dtype=dtype, device=codes.device)
    factors = torch.empty(len(codes), heads, dtype=torch.float32, device=codes.device)
    if len(weight) != 3 * heads * HEAD_CHANNELS:
        raise ValueError(f"heads: {len(weight)} outputs are no {heads} of {HEAD_CHANNELS} channels")
    _launch(codes, weight, epilogue, out, None, keys=KeyFactors(factors, kind, eps))
    return out, factors


def launch_linear_gelu(
    codes: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    out_params: Tensor,
    form: str,
    bits: int,
    sink_bias: Tensor | None = None,
    sinks: int = 0,
    out_sink_mean: Tensor | None = None,
    out_sinks: int = 0,
    out_scale: Tensor | None = None,
    out_shift: Tensor | None = None,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes (M, N) of GELU(y) and their sums (M,): `operators.int8_linear_gelu` on a CUDA device.

    Raises:
        ValueError: K is no multiple of 16.
    """
    out = torch.empty(len(codes), len(weight), dtype=torch.int8, device=codes.device)
    out_sums = torch.zeros(len(codes), dtype=torch.int32, device=codes.device)
    shifts = (sink_bias, sinks, out_sink_mean, out_sinks, out_scale, out_shift)
    encoding = Encoding(out_params, out_sums, *shifts, form, bits)
    _launch(codes, weight, epilogue, out, tiling, encoding)
    return out, out_sums


def _launch(
    codes: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    out: Tensor,
    tiling: Tiling | None,
    encoding: Encoding | None = None,
    keys: KeyFactors | None = None,
) -> None:
    """Fill `out`, with codes if there is an `encoding`."""
    m, k = codes.shape
    n = len(weight)
    if k % ALIGNMENT:
        raise ValueError(f"K: {k} is no multiple of {ALIGNMENT}")
    tiling = tiling or choose_tiling(m, n, k, out.dtype)
    tma_store = n * out.element_size() % ALIGNMENT == 0
    tiles = triton.cdiv(m, tiling.block_m) * triton.cdiv(n, tiling.block_n)
    programs = min(tiling.programs * _multiprocessors(codes.device), tiles)
    if epilogue.w_offset is not None and epilogue.code_sums is None:
        epilogue = epilogue._replace(code_sums=row_sums(codes))
    unread = codes  # stands in for tensors that the kernel does not read
    columns = epilogue.x_params.shape[1]
    tokens = columns if epilogue.positions is None else len(epilogue.positions)
    encoding = encoding or Encoding(unread, unread)
    keys = keys or KeyFactors(unread)
    out_columns = encoding.out_params.shape[-1]
    half_tile = [tiling.block_m, tiling.block_n // 2]
    _linear_kernel[(programs,)](
        TensorDescriptor.from_tensor(codes, [tiling.block_m, tiling.block_k]),
        TensorDescriptor.from_tensor(weight, [tiling.block_n, tiling.block_k]),
        TensorDescriptor.from_tensor(out, half_tile) if tma_store else unread,
        out,
        m,
        n,
        k,
        tokens,
        columns,
        *(unread if term is None else term for term in epilogue),
        out_columns if epilogue.positions is None else tokens,
        out_columns,
        encoding.out_params,
        encoding.out_sums,
        unread if encoding.sink_bias is None else encoding.sink_bias,
        encoding.sinks,
        unread if encoding.out_sink_mean is None else encoding.out_sink_mean,
        encoding.out_sinks,
        unread if encoding.out_scale is None else encoding.out_scale,
        unread if encoding.out_shift is None else encoding.out_shift,
        keys.values,
        keys.eps,
        HAS_POSITIONS=epilogue.positions is not None,
        HAS_W_OFFSET=epilogue.w_offset is not None,
        HAS_BIAS=epilogue.bias is not None,
        HAS_SINK_BIAS=encoding.sink_bias is not None,
        HAS_OUT_SINKS=encoding.out_sink_mean is not None,
        HAS_OUT_SCALE=encoding.out_scale is not None,
        HAS_OUT_SHIFT=encoding.out_shift is not None,
        GELU=encoding.form,
        HALF=2 ** (encoding.bits - 1),
        KEY_NORM=keys.kind,
        EVEN=m % tiling.block_m == 0 and n % tiling.block_n == 0,
        TMA_STORE=tma_store,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        GROUP_M=GROUP_M,
        PROGRAMS=programs,
        num_stages=tiling.stages,
        num_warps=tiling.warps,
    )
