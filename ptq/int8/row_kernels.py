"""Small kernels around the integer product (Triton, CUDA): parameters of tokens, and sums of codes;
see `ops.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _columns(table, positions, out, P, T, R: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < T
    position = tl.minimum(tl.load(positions + token, mask=inside), P - 1)
    for r in tl.static_range(R):
        tl.store(out + r * T + token, tl.load(table + r * P + position, mask=inside), mask=inside)


def lookup_columns(table: Tensor, positions: Tensor) -> Tensor:
    """`ops.token_params` in one kernel, for a decoding step needs it once a layer; both arguments
    contiguous."""
    (r, p), t = table.shape, len(positions)
    out = table.new_empty(r, t)
    _columns[(triton.cdiv(t, 256),)](table, positions, out, p, t, r, 256)
    return out


@triton.jit
def _row_sums(codes, out, M, K, BM: tl.constexpr, BK: tl.constexpr):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    total = tl.zeros((BM, BK), dtype=tl.int32)
    for k in range(0, K, BK):
        col = k + tl.arange(0, BK)
        place = codes + row[:, None].to(tl.int64) * K + col[None, :]
        total += tl.load(place, mask=(row < M)[:, None] & (col < K)[None, :], other=0).to(tl.int32)
    tl.store(out + row, tl.sum(total, 1), mask=row < M)


def row_sums(codes: Tensor) -> Tensor:
    """Sums of the rows of contiguous codes (M, K), int32 (M,)."""
    m, k = codes.shape
    out = torch.empty(m, dtype=torch.int32, device=codes.device)
    _row_sums[(triton.cdiv(m, 4),)](codes, out, m, k, 4, 1024)
    return out
