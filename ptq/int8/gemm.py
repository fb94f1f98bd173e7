"""The integer matrix product with everything that follows it in one kernel (Triton, CUDA).

    y = rs (c w^T) width + ro column - (rs sums) slope + bias         c (M, K), w (N, K) int8, y (M,
    N)

With activation x = sx (c - zx) and weight sw (w - zw), in the notation of `codes.py`:

    rs = sx, ro = sx zx       per token: row r of the product is token r mod T, so T = 1 serves
                              per-tensor parameters, T tokens a sequence static token-wise ones, and
                              T = M dynamic ones
    width = sw                per output channel column = sw (K zw - sum w), slope = sw zw, sums =
    sum c per row: the corrections for the two zero points

All corrections are of rank one, so static token-wise parameters cost what per-tensor ones do. The
last term is needed for asymmetric weights only (zw != 0). Sums of few rows come from whoever makes
the codes; those of many rows are made here, in a pass of their own, which costs less than summing
in the kernel that makes the codes.

Tiles come in through TMA and, where rows of the output are aligned, leave through it. Programs are
persistent, and the
loop over their tiles is one with that over K: the next tile is on its way while the last one is
converted and stored. Two programs share a multiprocessor, so that one multiplies while the other
converts; a tile leaves in two halves, which
is what lets both fit. An activation function in here would keep the matrix units waiting: GELU and
its rounding cost more than the pass over memory that they save (25,600 x 1,024 x 4,096 on an H100:
.25 ms as it was with one program, .39 ms with tanh and .49 ms with erf).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ptq.int8.codes import FEW_ROWS
from ptq.int8.row_kernels import row_sums

ALIGNMENT = 16  # bytes; TMA asks for it of every row


@triton.jit
def _finish(
    product,
    c,
    out,
    m,
    n,
    M,
    N,
    T,
    rs,
    ro,
    sums,
    width,
    column,
    slope,
    bias,
    SUMS: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    TMA_OUT: tl.constexpr,
):
    """Write y of a part of the product, whose first element is at (m, n)."""
    rows = m + tl.arange(0, product.shape[0])
    cols = n + tl.arange(0, product.shape[1])
    row = rows
    col = cols
    if not EVEN:
        # in bounds; what lies beyond is not stored
        row = rows % M
        col = cols % N
    scale = tl.load(rs + row % T)
    y = tl.load(ro + row % T)[:, None] * tl.load(column + col)[None, :]
    if BIAS:
        y += tl.load(bias + col).to(tl.float32)[None, :]
    if SUMS:
        y -= (tl.load(sums + row).to(tl.float32) * scale)[:, None] * tl.load(slope + col)[None, :]
    y += product.to(tl.float32) * (scale[:, None] * tl.load(width + col)[None, :])
    if TMA_OUT:
        c.store([m, n], y.to(out.dtype.element_ty))
    else:
        place = out + rows[:, None].to(tl.int64) * N + cols[None, :]
        tl.store(place, y.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit
def _kernel(
    a,
    b,
    c,
    out,
    M,
    N,
    K,
    T,
    rs,
    ro,
    sums,
    width,
    column,
    slope,
    bias,
    SUMS: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    TMA_OUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    along_m = tl.cdiv(M, BM)
    along_n = tl.cdiv(N, BN)
    # tiles that share rows of `a` and columns of `b` run together, for the L2 cache
    span = GROUP * along_n
    for tile in tl.range(tl.program_id(0), along_m * along_n, PROGRAMS, flatten=True):
        first = tile // span * GROUP
        height = min(along_m - first, GROUP)
        m = (first + tile % span % height) * BM
        n = tile % span // height * BN
        total = tl.zeros((BM, BN), dtype=tl.int32)
        for k in range(0, K, BK):
            total = tl.dot(a.load([m, k]), b.load([n, k]).T, total, out_dtype=tl.int32)
        left, right = tl.split(tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1)))
        _finish(
            left,
            c,
            out,
            m,
            n,
            M,
            N,
            T,
            rs,
            ro,
            sums,
            width,
            column,
            slope,
            bias,
            SUMS,
            BIAS,
            EVEN,
            TMA_OUT,
        )
        _finish(
            right,
            c,
            out,
            m,
            n + BN // 2,
            M,
            N,
            T,
            rs,
            ro,
            sums,
            width,
            column,
            slope,
            bias,
            SUMS,
            BIAS,
            EVEN,
            TMA_OUT,
        )


@dataclass(frozen=True)
class Tiling:
    """Tile sizes, pipeline stages, warps, and programs per multiprocessor."""

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int
    programs: int = 1


def choose_tiling(m: int, n: int, k: int, dtype: torch.dtype) -> Tiling:
    """The fastest tiling for a product of these sizes: of many rows as measured on an H200 (that of
    float32 was not timed), of few, as decoding steps have, on an H100.
    """
    if m > FEW_ROWS:  # of float32 tiles shared memory does not hold two
        return (
            Tiling(128, 128, 128, 3, 8)
            if dtype == torch.float32
            else Tiling(128, 128, 128, 3, 4, 2)
        )
    return Tiling(64, 32, 256, 4, 4, 4) if k > 2 * n else Tiling(64, 128, 128, 4, 4, 2)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_linear(
    codes: Tensor,
    weight: Tensor,
    rs: Tensor,
    ro: Tensor,
    sums: Tensor | None,
    width: Tensor,
    column: Tensor,
    slope: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    tiles: Tiling | None = None,
) -> Tensor:
    """y (M, N) of type `dtype`; the arguments are those of the formula above, contiguous, on a CUDA
    device.

    Without `slope` there is no last term; with it, `sums` that are not given are made.

    Raises:
        ValueError: K is no multiple of 16.
    """
    (m, k), n = codes.shape, len(weight)
    if k % ALIGNMENT:
        raise ValueError(f"K: {k} is no multiple of {ALIGNMENT}")
    t = tiles or choose_tiling(m, n, k, dtype)
    out = torch.empty(m, n, dtype=dtype, device=codes.device)
    by_tma = n * out.element_size() % ALIGNMENT == 0
    number = triton.cdiv(m, t.bm) * triton.cdiv(n, t.bn)
    programs = min(t.programs * _multiprocessors(codes.device), number)
    if slope is not None and sums is None:
        sums = row_sums(codes)
    none = codes  # stands in for what is not read
    rest = (none if part is None else part for part in (sums, width, column, slope, bias))
    _kernel[(programs,)](
        TensorDescriptor.from_tensor(codes, [t.bm, t.bk]),
        TensorDescriptor.from_tensor(weight, [t.bn, t.bk]),
        TensorDescriptor.from_tensor(out, [t.bm, t.bn // 2]) if by_tma else none,
        out,
        m,
        n,
        k,
        len(rs),
        rs,
        ro,
        *rest,
        SUMS=slope is not None,
        BIAS=bias is not None,
        EVEN=m % t.bm == 0 and n % t.bn == 0,
        TMA_OUT=by_tma,
        BM=t.bm,
        BN=t.bn,
        BK=t.bk,
        GROUP=8,
        PROGRAMS=programs,
        num_stages=t.stages,
        num_warps=t.warps,
    )
    return out
