"""The kernels of whole blocks as operators of PyTorch, for every device.

    ar_ptq::norm_codes          from the residual stream to the next product's codes (`norms.py`)
    ar_ptq::int8_linear_gelu    a product whose result leaves as codes of its GELU (`gelu.py`)
    ar_ptq::int8_linear_keys    a product that leaves the norms of its keys too
    ar_ptq::attention_codes     from queries, keys and values to codes of their average
                                (`attention.py`)
    ar_ptq::store_keys          keys, normalised, and values into a cache

On CUDA they are Triton kernels, elsewhere their plain PyTorch references.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.int8 import ops
from ptq.int8.blocks.attention import (
    HeadNorm,
    normalise_heads,
    reference_attention_codes,
)
from ptq.int8.blocks.gelu import approximate_gelu
from ptq.int8.blocks.norms import (
    Branch,
    Grid,
    Modulation,
    Norm,
    at_sinks,
    reference_norm_codes,
)
from ptq.int8.codes import UNIT_EPS
from ptq.int8.epilogue import Epilogue, params_by_row, reference_linear


@torch.library.custom_op("ar_ptq::norm_codes", mutates_args=())
def norm_codes_operator(
    x: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    kappa: Tensor | None,
    x_params: Tensor,
    positions: Tensor | None,
    bits: int,
    sink_mean: Tensor | None,
    sinks: int,
    branch: Tensor | None,
    gate: Tensor | None,
    product_params: Tensor | None,
    code_sums: Tensor | None,
    w_scale: Tensor | None,
    zero_correction: Tensor | None,
    w_offset: Tensor | None,
    product_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`norm_codes` with its arguments one by one.

    The stream is empty where there is no branch: an operator returns none of its arguments.
    """
    arguments = (
        weight,
        bias,
        eps,
        scale,
        shift,
        kappa,
        x_params,
        positions,
        bits,
        sink_mean,
        sinks,
    )
    product = (product_params, code_sums, w_scale, zero_correction, w_offset, product_bias)
    stream, codes, sums = reference_norm_codes(
        *name_arguments(x, norm, *arguments, branch, gate, *product)
    )
    return x.new_empty(0) if branch is None else stream, codes, sums


@norm_codes_operator.register_kernel("cuda")
def _norm_codes_on_cuda(x, *arguments):
    from ptq.int8.blocks import norm_kernel  # Triton is there with CUDA only

    named = name_arguments(x, *arguments)
    stream, codes, sums = norm_kernel.launch_norm_codes(*named)
    return x.new_empty(0) if named[-1] is None else stream, codes, sums


@norm_codes_operator.register_fake
def _norm_codes_outline(x, *arguments):
    branch = name_arguments(x, *arguments)[-1]
    stream = x.new_empty(0) if branch is None else torch.empty_like(x)
    return stream, torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x), dtype=torch.int32)


def name_arguments(x: Tensor, *arguments) -> tuple[Tensor, Norm, Modulation, Grid, Branch | None]:
    """The operator's arguments as those of `norm_codes`."""
    norm = Norm(*arguments[:4])
    modulation = Modulation(*arguments[4:7])
    grid = Grid(*arguments[7:12])
    value, gate, product_params, *terms = arguments[12:]
    if value is None:
        return x, norm, modulation, grid, None
    if product_params is None:
        return x, norm, modulation, grid, Branch(value, gate)
    epilogue = Epilogue(product_params, grid.positions, *terms)
    return x, norm, modulation, grid, Branch(value, gate, epilogue)


def norm_codes(
    x: Tensor, norm: Norm, modulation: Modulation, grid: Grid, branch: Branch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The stream after `branch`, and the codes of its normalised and modulated rows.

    Args:
        x: the residual stream (M, C), contiguous.
        branch: with integer parts, the positions of its epilogue are those of `grid`.

    Returns:
        The stream (M, C), x itself without a branch; codes (M, C) int8; sums of their rows (M,)
        int32.
    """
    value = gate = None
    product = (None,) * 6  # terms of an epilogue without its positions
    if branch is not None:
        value = branch.value
        gate = branch.gate
        if branch.epilogue is not None:
            x_params, _, *terms = branch.epilogue
            product = (x_params, *terms)
    stream, codes, sums = norm_codes_operator(x, *norm, *modulation, *grid, value, gate, *product)
    return x if branch is None else stream, codes, sums


def reference_linear_gelu(
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
) -> tuple[Tensor, Tensor]:
    """What `int8_linear_gelu` computes, in plain PyTorch."""
    y = reference_linear(codes, weight, epilogue, torch.float32)  # (M, N)
    if sink_bias is not None:
        y = y + at_sinks(sink_bias, sinks, epilogue.positions, len(y))
    activated = approximate_gelu(y, form)
    if out_shift is not None:
        activated = activated - out_shift
    if out_scale is not None:
        activated = activated * (1 / out_scale)
    if out_sink_mean is not None:
        activated = activated - at_sinks(out_sink_mean, out_sinks, epilogue.positions, len(y))
    # (M, 1) each
    scale, zero_point, _ = params_by_row(out_params, epilogue.positions, len(y))
    steps = activated * (1 / scale)
    out = ops.static_codes(steps, torch.ones_like(scale[:, 0]), zero_point[:, 0], bits)
    return out, out.sum(dim=1, dtype=torch.int32)


@torch.library.custom_op("ar_ptq::int8_linear_gelu", mutates_args=())
def int8_linear_gelu(
    codes: Tensor,
    weight: Tensor,
    x_params: Tensor,
    positions: Tensor | None,
    code_sums: Tensor | None,
    w_scale: Tensor,
    zero_correction: Tensor,
    w_offset: Tensor | None,
    bias: Tensor | None,
    out_params: Tensor,
    form: str,
    bits: int,
    sink_bias: Tensor | None = None,
    sinks: int = 0,
    out_sink_mean: Tensor | None = None,
    out_sinks: int = 0,
    out_scale: Tensor | None = None,
    out_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The codes (M, N) int8 of GELU(y), y (M, N) that of `ops.int8_linear`, and their sums (M,).

    Args:
        out_params: (3, P) of the linear layer that reads the codes, at the same positions.
        form: of GELU, "erf" or "tanh".
        bits: of the codes.
        sink_bias: (N,), added to y at positions below `sinks`; or None.
        out_shift: (N,), taken off GELU(y); or None.
        out_scale: (N,), what it is divided by then; or None.
        out_sink_mean: (N,), taken off last, at positions below `out_sinks`; or None.
    """
    epilogue = Epilogue(x_params, positions, code_sums, w_scale, zero_correction, w_offset, bias)
    shifts = (sink_bias, sinks, out_sink_mean, out_sinks, out_scale, out_shift)
    return reference_linear_gelu(codes, weight, epilogue, out_params, form, bits, *shifts)


@int8_linear_gelu.register_kernel("cuda")
def _linear_gelu_on_cuda(codes, weight, *arguments):
    from ptq.int8 import gemm

    terms = len(Epilogue._fields)
    epilogue = Epilogue(*arguments[:terms])
    return gemm.launch_linear_gelu(codes, weight, epilogue, *arguments[terms:])


@int8_linear_gelu.register_fake
def _linear_gelu_outline(codes, weight, *arguments):
    rows = len(codes)
    out = codes.new_empty(rows, len(weight))
    return out, codes.new_empty(rows, dtype=torch.int32)


def reference_linear_keys(
    codes: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    dtype: torch.dtype,
    heads: int,
    kind: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """What `int8_linear_keys` computes, in plain PyTorch."""
    y = reference_linear(codes, weight, epilogue, dtype)  # (M, 3 C)
    _, keys, _ = y.float().unflatten(1, (3, heads, -1)).unbind(1)  # (M, H, D)
    if kind == "unit":
        return y, 1 / keys.norm(dim=-1).clamp(min=UNIT_EPS)
    return y, torch.rsqrt(keys.var(dim=-1, correction=0) + eps)


@torch.library.custom_op("ar_ptq::int8_linear_keys", mutates_args=())
def int8_linear_keys(
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
    heads: int,
    kind: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y (M, 3 C) of `ops.int8_linear`, queries, keys and values, and what normalises the keys.

    Args:
        heads: H, of `gemm.HEAD_CHANNELS` channels.
        kind: of the keys' norm, "layer" or "unit". eps: of LayerNorm.

    Returns:
        y, and `HeadNorm.factors` (M, H).
    """
    epilogue = Epilogue(x_params, positions, code_sums, w_scale, zero_correction, w_offset, bias)
    return reference_linear_keys(codes, weight, epilogue, dtype, heads, kind, eps)


@int8_linear_keys.register_kernel("cuda")
def _linear_keys_on_cuda(codes, weight, *arguments):
    from ptq.int8 import gemm

    terms = len(Epilogue._fields)
    return gemm.launch_linear_keys(codes, weight, Epilogue(*arguments[:terms]), *arguments[terms:])


@int8_linear_keys.register_fake
def _linear_keys_outline(codes, weight, *arguments):
    *_, dtype, heads, kind, eps = arguments
    y = codes.new_empty(len(codes), len(weight), dtype=dtype)
    return y, codes.new_empty(len(codes), heads, dtype=torch.float32)


@torch.library.custom_op("ar_ptq::attention_codes", mutates_args=())
def attention_codes_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: float,
    head_scale: Tensor | None,
    normalise_keys: bool,
    key_factors: Tensor | None,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    x_params: Tensor,
    positions: Tensor | None,
    bits: int,
    sink_mean: Tensor | None,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    """`attention_codes` with its arguments one by one."""
    norm = HeadNorm(
        kind, q_weight, q_bias, k_weight, k_bias, eps, head_scale, normalise_keys, key_factors
    )
    grid = Grid(x_params, positions, bits, sink_mean, sinks)
    return reference_attention_codes(q, k, v, norm, scale, causal, mask, grid)


@attention_codes_operator.register_kernel("cuda")
def _attention_codes_on_cuda(q, k, v, *arguments):
    from ptq.int8.blocks import attention_kernel

    terms = len(HeadNorm._fields)
    scale, causal, mask, *grid = arguments[terms:]
    return attention_kernel.launch_attention_codes(
        q, k, v, HeadNorm(*arguments[:terms]), scale, causal, mask, Grid(*grid)
    )


@attention_codes_operator.register_fake
def _attention_codes_outline(q, *arguments):
    batch, heads, tokens, channels = q.shape
    codes = q.new_empty(batch * tokens, heads * channels, dtype=torch.int8)
    return codes, q.new_empty(batch * tokens, dtype=torch.int32)


def attention_codes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm: HeadNorm,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    """Attention's average as codes (B T, H D) int8, and their sums (B T,).

    Args:
        q: (B, H, T, D). k, v: (B, H, S, D). Of half precision, with any strides but in the last
            dimension; parts of one product are not copied.
        causal: query t sees keys 0 .. t; without it all, or what `mask` lets it see.
        mask: additive, (T, S) with any leading ones, or None.
        grid: of the layer that reads the codes.
    """
    return attention_codes_operator(q, k, v, *norm, scale, causal, mask, *grid)


@torch.library.custom_op("ar_ptq::store_keys", mutates_args=("keys", "values"))
def store_keys_operator(
    keys: Tensor,
    values: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    kind: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    """`store_keys` with its arguments one by one."""
    keys.index_copy_(2, positions, normalise_heads(k.float(), kind, weight, bias, eps).to(k.dtype))
    values.index_copy_(2, positions, v)


@store_keys_operator.register_kernel("cuda")
def _store_keys_on_cuda(keys, values, k, v, positions, kind, weight, bias, eps):
    from ptq.int8.blocks import keys_kernel

    norm = HeadNorm(kind, k_weight=weight, k_bias=bias, eps=eps)
    keys_kernel.launch_store(keys, values, k, v, positions, norm)


def store_keys(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, positions: Tensor, norm: HeadNorm
) -> None:
    """Write k, normalised per head, and v (B, H, T, D) into a cache.

    Args:
        keys, values: the cache, (B, H, S, D), contiguous.
        k, v: of any strides but in the last dimension.
        positions: slots of the tokens, (T,).
    """
    terms = norm.kind, norm.k_weight, norm.k_bias, norm.eps
    store_keys_operator(keys, values, k, v, positions, *terms)
