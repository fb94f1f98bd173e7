"""Pieces that the kernels of this folder share (Triton)."""

from __future__ import annotations

import triton
import triton.language as tl

from ptq.int8.blocks import gelu
from ptq.int8.codes import ROUNDING_CONSTANT as OF_CODES
from ptq.int8.codes import UNIT_EPS

ROUNDING_CONSTANT = tl.constexpr(OF_CODES)
# the interpreter knows no instructions of a GPU
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

SMALLEST_NORM = tl.constexpr(UNIT_EPS)

# the polynomials of `blocks/gelu.py`
ERF_LIMIT = tl.constexpr(gelu.ERF_LIMIT)
ERF_1, ERF_3, ERF_5 = (tl.constexpr(factor) for factor in gelu.ERF_POLYNOMIAL)
TANH_1, TANH_3 = (tl.constexpr(factor) for factor in gelu.TANH_POLYNOMIAL)


@triton.jit
def table_columns(positions, rows, T, P, HAS_POSITIONS: tl.constexpr):
    """Columns of a table of parameters for rows of tokens, as `epilogue.py` defines them."""
    columns = rows % T
    if HAS_POSITIONS:
        # the last column serves all positions behind it
        columns = tl.minimum(tl.load(positions + columns).to(tl.int32), P - 1)
    return columns


@triton.jit
def inverse_norm(x, eps, NORM: tl.constexpr, D: tl.constexpr):
    """1 / std, or 1 / |x|, of rows x (N, BLOCK_D) float32, which are zero from channel D on."""
    squares = tl.sum(x * x, 1)
    if NORM == "unit":
        return 1 / tl.maximum(tl.sqrt(squares), SMALLEST_NORM)
    mean = tl.sum(x, 1) / D
    return tl.rsqrt(tl.maximum(squares / D - mean * mean, 0.0) + eps)


@triton.jit
def round_codes(steps, zero_point, HALF: tl.constexpr):
    """Codes int8 of float32 `steps` = x / scale: `ops.static_codes` for one block of elements."""
    limited = tl.minimum(tl.maximum(steps, -HALF - zero_point), HALF - 1 - zero_point)
    # the low bits of the sum are the codes
    return (limited + (ROUNDING_CONSTANT + zero_point)).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def approximate_tanh(x):
    """tanh of float32 by the GPU's one instruction for it."""
    if INTERPRETED:
        return 2 * tl.sigmoid(2 * x) - 1
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def approximate_gelu(x, FORM: tl.constexpr):
    """GELU of float32: `gelu.approximate_gelu`."""
    if FORM == "erf":
        limited = tl.minimum(tl.maximum(x, -ERF_LIMIT), ERF_LIMIT)
        square = limited * limited
        argument = limited * (ERF_1 + square * (ERF_3 + square * ERF_5))
    else:
        argument = x * (TANH_1 + TANH_3 * x * x)
    half = 0.5 * x
    return half + half * approximate_tanh(argument)
