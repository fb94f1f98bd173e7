"""Integer linear layers as operators of PyTorch, for every device.

    ar_ptq::int8_linear     the product of codes with its epilogue (`epilogue.py` has the formula)
    ar_ptq::token_params    scales and zero points of tokens, looked up by position

On CUDA both are Triton kernels. On CPUs the product runs on the int8 instructions that PyTorch uses
(`torch._int_mm`), everything else in float32. On other devices `reference_linear` computes the
product exactly. The compiler takes an operator as a whole and fuses what makes the codes (norm,
modulation, activation function, rounding) around it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.int8.codes import ROUNDING_CONSTANT, DynamicCodes
from ptq.int8.epilogue import Epilogue, apply_epilogue, reference_linear
from ptq.numbers import numerics
from ptq.spec import QuantSpec


@torch.library.custom_op("ar_ptq::int8_linear", mutates_args=())
def int8_linear(
    codes: Tensor,
    weight: Tensor,
    x_params: Tensor,
    positions: Tensor | None,
    code_sums: Tensor | None,
    w_scale: Tensor,
    zero_correction: Tensor,
    w_offset: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y (M, N) of codes (M, K) and weight (N, K), int8.

    The arguments from `x_params` to `bias` are the fields of an `Epilogue`.
    """
    epilogue = Epilogue(x_params, positions, code_sums, w_scale, zero_correction, w_offset, bias)
    return reference_linear(codes, weight, epilogue, dtype)


@int8_linear.register_kernel("cpu")
def _linear_on_cpu(codes, weight, *terms_and_dtype):
    *terms, dtype = terms_and_dtype
    product = torch._int_mm(codes.contiguous(), weight.t())  # (M, N)
    return apply_epilogue(product, codes, Epilogue(*terms), dtype)


@int8_linear.register_kernel("cuda")
def _linear_on_cuda(codes, weight, *terms_and_dtype):
    from ptq.int8 import gemm  # Triton is there with CUDA only

    *terms, dtype = terms_and_dtype
    return gemm.launch_linear(codes.contiguous(), weight, Epilogue(*terms), dtype)


@int8_linear.register_fake
def _linear_outline(codes, weight, *terms_and_dtype):
    return codes.new_empty(len(codes), len(weight), dtype=terms_and_dtype[-1])


def static_codes(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Signed codes (..., T, K) int8 of x, with the parameters (T,) or (1,) of its tokens, or (H, T)
    of its heads and tokens.

    They are round(x / scale) + zero_point, limited to what the bits hold, for finite x and
    |zero_point| < 2^22. Converting instructions are slow, so the sum with `ROUNDING_CONSTANT` does
    the rounding (half to even, like `torch.round`), and its bits are the codes. x in half precision
    is multiplied by 1 / scale.
    """
    half = 2 ** (bits - 1)
    scale = scale[..., None]  # (T, 1)
    zero_point = zero_point[..., None]  # (T, 1)
    steps = x / scale if x.dtype == torch.float32 else x.float() * (1 / scale)
    # clamped first, so that the sum is within reach of the trick
    rounded = steps.clamp(-half - zero_point, half - 1 - zero_point) + ROUNDING_CONSTANT
    return (rounded.view(torch.int32) + zero_point.int()).to(torch.int8)


@torch.library.custom_op("ar_ptq::token_params", mutates_args=())
def token_params(table: Tensor, positions: Tensor) -> Tensor:
    """The columns of `table` (R, P) for tokens at `positions` (T,), float32 (R, T).

    The last column is for all positions from there on. This is an operator so that the compiler
    looks parameters up once a token, and not again for every element of x.
    """
    return table[:, positions.clamp(max=table.shape[1] - 1)]


def entry_at(table: Tensor, position: Tensor) -> Tensor:
    """The entries (...) of a table (..., P) at one position (1,), as `token_params` looks them
    up."""
    return table[..., position.clamp(max=table.shape[-1] - 1)][..., 0]


@token_params.register_kernel("cuda")
def _params_on_cuda(table, positions):
    from ptq.int8 import row_kernels  # Triton is there with CUDA only

    return row_kernels.lookup_columns(table.contiguous(), positions.contiguous())


@token_params.register_fake
def _params_outline(table, positions):
    return table.new_empty(len(table), len(positions))


def dynamic_codes(x: Tensor, codes: DynamicCodes) -> tuple[Tensor, Tensor]:
    """Signed codes (M, K) of rows x (M, K), and the parameters (3, M) of their ranges, as
    `Epilogue.x_params` has them."""
    x = x.float()
    spec = QuantSpec(
        codes.bits, codes.symmetric, "token_dynamic", "minmax", include_zero=codes.include_zero
    )
    params = numerics.params_from_range(x.amin(dim=-1), x.amax(dim=-1), spec)  # (M,)
    zero_point = params.zero_point - spec.levels // 2  # of signed codes
    codes_of_x = static_codes(x, params.scale, zero_point, codes.bits)
    return codes_of_x, torch.stack((params.scale, zero_point, params.scale * zero_point))
