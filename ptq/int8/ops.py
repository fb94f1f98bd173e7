"""Integer linear layers as operators of PyTorch, for every device: `ar_ptq::int8_linear`, and
`ar_ptq::token_params`, which looks up the scales of tokens.

    y = rs (c w^T) width + ro column - (rs sums) slope + bias         (see `gemm.py` for the
    symbols)

On CUDA both are Triton kernels. On CPUs the product runs on the int8 instructions that PyTorch uses
(`torch._int_mm`), everything else in float32. `reference_linear` computes the product exactly on any
device. The compiler takes an operator as a whole and fuses what makes the codes (norm, modulation,
activation function, rounding) around it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.int8.codes import DynamicCodes
from ptq.numbers import numerics
from ptq.spec import QuantSpec


def reference_product(codes: Tensor, weight: Tensor) -> Tensor:
    """c w^T (M, N), int64, exactly: every partial sum is an integer below 2^53."""
    return (codes.double() @ weight.double().t()).round().long()


def apply_epilogue(
    product: Tensor,
    codes: Tensor,
    rs: Tensor,
    ro: Tensor,
    sums: Tensor | None,
    width: Tensor,
    column: Tensor,
    slope: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y (M, N) from the integer product, in float32."""
    m = len(product)
    t = len(rs)
    rs, ro = (v.repeat(m // t)[:, None] if t > 1 else v for v in (rs, ro))
    y = product.float().mul_(rs).mul_(width)
    y += ro * column
    if slope is not None:
        sums = codes.sum(dim=1, dtype=torch.int32) if sums is None else sums
        y -= sums[:, None].float() * rs * slope
    if bias is not None:
        y += bias.float()
    return y.to(dtype)


def reference_linear(
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
) -> Tensor:
    """What `int8_linear` computes, in plain PyTorch."""
    return apply_epilogue(
        reference_product(codes, weight), codes, rs, ro, sums, width, column, slope, bias, dtype
    )


@torch.library.custom_op("ar_ptq::int8_linear", mutates_args=())
def int8_linear(
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
) -> Tensor:
    """y (M, N) of codes (M, K) and weight (N, K), int8.

    Args:
        rs, ro: (T,) float32, T a divisor of M. sums: (M,) int32, of the rows of codes, or None:
            made here.
        width, column, slope: (N,) float32; slope may be None, for zeros.
    """
    return reference_linear(codes, weight, rs, ro, sums, width, column, slope, bias, dtype)


@int8_linear.register_kernel("cpu")
def _(codes, weight, rs, ro, sums, width, column, slope, bias, dtype):
    product = torch._int_mm(codes.contiguous(), weight.t())
    return apply_epilogue(product, codes, rs, ro, sums, width, column, slope, bias, dtype)


@int8_linear.register_kernel("cuda")
def _(codes, weight, rs, ro, sums, width, column, slope, bias, dtype):
    from ptq.int8 import gemm

    return gemm.launch_linear(
        codes.contiguous(), weight, rs, ro, sums, width, column, slope, bias, dtype
    )


@int8_linear.register_fake
def _(codes, weight, rs, ro, sums, width, column, slope, bias, dtype):
    return codes.new_empty(len(codes), len(weight), dtype=dtype)


# added to a float32 below 2^22 in magnitude it leaves the nearest integer in the low bits
ROUNDS = 1.5 * 2**23


def static_codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Signed codes (..., T, K) int8 of x, with the scales and zero points (T,) or (1,) of its
    tokens.

    round(x / scale) + zero, limited to what the bits hold, for finite x and |zero| < 2^22. Converting instructions are
    slow, so the sum with `ROUNDS` does the rounding (half to even, like `torch.round`), and its bits are the codes.
    x in half precision is multiplied by 1 / scale.
    """
    half = 2 ** (bits - 1)
    scale = scale[:, None]
    zero = zero[:, None]
    steps = x / scale if x.dtype == torch.float32 else x.float() * (1 / scale)
    rounded = steps.clamp(-half - zero, half - 1 - zero) + ROUNDS
    return (rounded.view(torch.int32) + zero.int()).to(torch.int8)


@torch.library.custom_op("ar_ptq::token_params", mutates_args=())
def token_params(table: Tensor, positions: Tensor) -> Tensor:
    """The columns of `table` (R, P) for tokens at `positions` (T,), float32 (R, T); its last is for
    all from there on.

    It is an operator so that the compiler looks them up once a token, and not again for every
    element of x.
    """
    return table[:, positions.clamp(max=table.shape[1] - 1)]


@token_params.register_kernel("cuda")
def _(table, positions):
    from ptq.int8 import row_kernels

    return row_kernels.lookup_columns(table.contiguous(), positions.contiguous())


@token_params.register_fake
def _(table, positions):
    return table.new_empty(len(table), len(positions))


def dynamic_codes(x: Tensor, codes: DynamicCodes) -> tuple[Tensor, Tensor, Tensor]:
    """Signed codes (M, K) of rows x (M, K), their scales and zero points (M,): min-max ranges found
    here."""
    x = x.float()
    spec = QuantSpec(
        codes.bits, codes.symmetric, "token_dynamic", "minmax", include_zero=codes.include_zero
    )
    params = numerics.params_from_range(x.amin(dim=-1), x.amax(dim=-1), spec)
    half = spec.levels // 2
    zero = params.zero_point - half
    return static_codes(x, params.scale, zero, codes.bits), params.scale, zero
