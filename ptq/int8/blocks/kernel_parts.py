"""Pieces that the kernels of this folder share (Triton)."""

from __future__ import annotations

import triton
import triton.language as tl

from ptq.int8 import ops

ROUNDING_CONSTANT = tl.constexpr(ops.ROUNDING_CONSTANT)


@triton.jit
def table_columns(positions, rows, T, P, HAS_POSITIONS: tl.constexpr):
    """Columns of a table of parameters for rows of tokens, as `epilogue.py` defines them."""
    columns = rows % T
    if HAS_POSITIONS:
        # the last column serves all positions behind it
        columns = tl.minimum(tl.load(positions + columns).to(tl.int32), P - 1)
    return columns


@triton.jit
def round_codes(steps, zero_point, HALF: tl.constexpr):
    """Codes int8 of float32 `steps` = x / scale: `ops.static_codes` for one block of elements."""
    limited = tl.minimum(tl.maximum(steps, -HALF - zero_point), HALF - 1 - zero_point)
    # the low bits of the sum are the codes
    return (limited + (ROUNDING_CONSTANT + zero_point)).to(tl.int32, bitcast=True).to(tl.int8)
