"""Normalised keys for a cache in one kernel (Triton, CUDA): `attention.normalise_heads` of a part
of a product, read where it lies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.int8.blocks.attention import UNIT_EPS, HeadNorm

SMALLEST_NORM = tl.constexpr(UNIT_EPS)
BLOCK_N = 16  # heads of tokens that a program normalises


@triton.jit
def _keys_kernel(
    keys,
    weight,
    bias,
    out,
    count,
    T,
    H,
    key_batch,
    key_head,
    key_token,
    eps,
    D: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Arguments named like `key_token` are strides."""
    # heads of a token lie together where they are read
    own = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = own % H
    t = own // H % T
    b = (own // H // T).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    channel_inside = channels < D
    inside = (own < count)[:, None] & channel_inside[None, :]
    place = keys + (b * key_batch + h * key_head + t * key_token)[:, None] + channels[None, :]
    key = tl.load(place, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_N, BLOCK_D)
    if NORM == "layer":
        mean = tl.sum(key, 1) / D
        key = tl.where(channel_inside[None, :], key - mean[:, None], 0.0)
        key *= tl.rsqrt(tl.sum(key * key, 1) / D + eps)[:, None]
        key *= tl.load(weight + channels, mask=channel_inside, other=0.0).to(tl.float32)[None, :]
        key += tl.load(bias + channels, mask=channel_inside, other=0.0).to(tl.float32)[None, :]
    else:
        key *= (1 / tl.maximum(tl.sqrt(tl.sum(key * key, 1)), SMALLEST_NORM))[:, None]
    own_out = ((b * H + h) * T + t) * D
    result = key.to(out.dtype.element_ty)
    tl.store(out + own_out[:, None] + channels[None, :], result, mask=inside)


def launch_keys(keys: Tensor, norm: HeadNorm) -> Tensor:
    """`operators.normalise_keys` on a CUDA device."""
    batch, heads, tokens, channels = keys.shape
    out = torch.empty(keys.shape, dtype=keys.dtype, device=keys.device)
    count = batch * heads * tokens
    _keys_kernel[(triton.cdiv(count, BLOCK_N),)](
        keys,
        keys if norm.k_weight is None else norm.k_weight,
        keys if norm.k_bias is None else norm.k_bias,
        out,
        count,
        tokens,
        heads,
        *keys.stride()[:3],
        norm.eps,
        D=channels,
        NORM=norm.kind,
        BLOCK_D=triton.next_power_of_2(channels),
        BLOCK_N=BLOCK_N,
        num_warps=2,
    )
    return out
