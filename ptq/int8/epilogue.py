"""What makes the output of a linear layer of an integer product, in plain PyTorch.

With inputs x (M, K) and weight w (N, K) as codes, scales and zero points per row (`codes.py`)

    x = x_scale (codes - x_zero_point),    w = w_scale (weight - w_zero_point)

the output is

    y = x w^T + bias = x_scale w_scale (codes weight^T)      the integer product (M, N)
                     + x_offset zero_correction              for zero points of x
                     - x_scale code_sums w_offset            for zero points of w
                     + bias

    x_offset        = x_scale x_zero_point
    code_sums       = sum over K of codes                    (M,)
    zero_correction = w_scale (K w_zero_point - sum over K of weight)      (N,)
    w_offset        = w_scale w_zero_point                   (N,)

Parameters of x stand in a table (3, P) of x_scale, x_zero_point and x_offset by position. Row r of
the product is token r mod T, and its column of the table is the position of that token, or the last
column behind the table's end. Without positions it is column r mod P: P = 1 serves parameters per
tensor, and P = M dynamic ones. Kernels read the table themselves, so nothing has to be looked up
before them, and a recorded graph serves all positions.

All corrections are of rank one, so static token-wise parameters cost what per-tensor ones do. The
third term is needed for asymmetric weights only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Epilogue(NamedTuple):
    """The terms of the formula above.

    Attributes:
        x_params: (3, P) float32: x_scale, x_zero_point and x_offset by position.
        positions: (T,) of the tokens, T a divisor of M; or None: P is a divisor of M.
        code_sums: (M,) int32, or None: they are made of the codes where they are needed.
        w_scale, zero_correction: (N,) float32.
        w_offset: (N,) float32, or None: there is no third term.
        bias: (N,), or None.
    """

    x_params: Tensor
    positions: Tensor | None
    code_sums: Tensor | None
    w_scale: Tensor
    zero_correction: Tensor
    w_offset: Tensor | None
    bias: Tensor | None


def exact_product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes weight^T (M, N), int64, exactly: every partial sum is an integer below 2^53."""
    return (codes.double() @ weight.double().t()).round().long()


def apply_epilogue(
    product: Tensor, codes: Tensor, epilogue: Epilogue, dtype: torch.dtype
) -> Tensor:
    """y (M, N) from the integer product (M, N) of codes (M, K), in float32."""
    rows = len(product)
    x_scale, _, x_offset = params_by_row(epilogue.x_params, epilogue.positions, rows)  # (M, 1) each
    y = product.float().mul_(x_scale).mul_(epilogue.w_scale)  # (M, N)
    y += x_offset * epilogue.zero_correction  # (M, 1) times (N,)
    if epilogue.w_offset is not None:
        code_sums = epilogue.code_sums
        if code_sums is None:
            code_sums = codes.sum(dim=1, dtype=torch.int32)  # (M,)
        y -= code_sums[:, None].float() * x_scale * epilogue.w_offset
    if epilogue.bias is not None:
        y += epilogue.bias.float()
    return y.to(dtype)


def params_by_row(x_params: Tensor, positions: Tensor | None, rows: int) -> Tensor:
    """The parameters (3, M, 1) of so many rows, from their table (3, P)."""
    if positions is not None:
        x_params = x_params[:, positions.clamp(max=x_params.shape[1] - 1)]  # (3, T)
    return x_params.repeat(1, rows // x_params.shape[1])[..., None]


def reference_linear(
    codes: Tensor, weight: Tensor, epilogue: Epilogue, dtype: torch.dtype
) -> Tensor:
    """What the operator `int8_linear` computes, on any device."""
    return apply_epilogue(exact_product(codes, weight), codes, epilogue, dtype)
