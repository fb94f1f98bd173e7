"""Small kernels around the integer product (Triton, CUDA): parameters of tokens, and sums of
codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_TOKENS = 256  # that a program looks up
BLOCK_M = 4  # rows that a program sums
BLOCK_K = 1024  # codes of a row that it reads at once


@triton.jit
def _columns_kernel(table, positions, out, P, T, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < T
    # the last column serves all positions behind it
    position = tl.minimum(tl.load(positions + token, mask=inside), P - 1)
    for row in tl.static_range(ROWS):
        value = tl.load(table + row * P + position, mask=inside)
        tl.store(out + row * T + token, value, mask=inside)


def lookup_columns(table: Tensor, positions: Tensor) -> Tensor:
    """`ops.token_params` in one kernel, since a decoding step needs it once a layer.

    Both arguments are contiguous.
    """
    rows, columns = table.shape
    tokens = len(positions)
    out = table.new_empty(rows, tokens)
    programs = triton.cdiv(tokens, BLOCK_TOKENS)
    _columns_kernel[(programs,)](table, positions, out, columns, tokens, rows, BLOCK_TOKENS)
    return out


@triton.jit
def _row_sums_kernel(codes, out, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        col = k + tl.arange(0, BLOCK_K)
        # offsets of many rows pass 2^31
        place = codes + row[:, None].to(tl.int64) * K + col[None, :]
        inside = (row < M)[:, None] & (col < K)[None, :]
        total += tl.load(place, mask=inside, other=0).to(tl.int32)
    tl.store(out + row, tl.sum(total, 1), mask=row < M)


def row_sums(codes: Tensor) -> Tensor:
    """Sums of the rows of contiguous codes (M, K), int32 (M,)."""
    m, k = codes.shape
    out = torch.empty(m, dtype=torch.int32, device=codes.device)
    _row_sums_kernel[(triton.cdiv(m, BLOCK_M),)](codes, out, m, k, BLOCK_M, BLOCK_K)
    return out
