"""Normalised keys, and values, into a cache in one kernel (Triton, CUDA): parts of a product, read
where they lie, go to their slots."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ptq.int8.blocks.attention import HeadNorm
from ptq.int8.codes import UNIT_EPS

SMALLEST_NORM = tl.constexpr(UNIT_EPS)
BLOCK_N = 16  # heads of tokens that a program stores


@triton.jit
def _store_kernel(
    k,
    v,
    weight,
    bias,
    keys,
    values,
    positions,
    count,
    T,
    H,
    S,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    eps,
    D: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Arguments named like `k_token` are strides."""
    # heads of a token lie together where they are read
    own = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = own % H
    t = own // H % T
    b = (own // H // T).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    channel_inside = channels < D
    inside = (own < count)[:, None] & channel_inside[None, :]
    slot = tl.load(positions + t, mask=own < count, other=0)
    place = ((b * H + h) * S + slot)[:, None] * D + channels[None, :]
    value = v + (b * v_batch + h * v_head + t * v_token)[:, None] + channels[None, :]
    tl.store(values + place, tl.load(value, mask=inside, other=0.0), mask=inside)
    key = k + (b * k_batch + h * k_head + t * k_token)[:, None] + channels[None, :]
    x = tl.load(key, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_N, BLOCK_D)
    if NORM == "layer":
        x = tl.where(channel_inside[None, :], x - (tl.sum(x, 1) / D)[:, None], 0.0)
        x *= tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x *= tl.load(weight + channels, mask=channel_inside, other=0.0).to(tl.float32)[None, :]
        x += tl.load(bias + channels, mask=channel_inside, other=0.0).to(tl.float32)[None, :]
    if NORM == "unit":
        x *= (1 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), SMALLEST_NORM))[:, None]
    tl.store(keys + place, x.to(keys.dtype.element_ty), mask=inside)


def launch_store(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, positions: Tensor, norm: HeadNorm
) -> None:
    """`operators.store_keys` on a CUDA device."""
    batch, heads, tokens, channels = k.shape
    count = batch * heads * tokens
    _store_kernel[(triton.cdiv(count, BLOCK_N),)](
        k,
        v,
        k if norm.k_weight is None else norm.k_weight,
        k if norm.k_bias is None else norm.k_bias,
        keys,
        values,
        positions,
        count,
        tokens,
        heads,
        keys.shape[2],
        *k.stride()[:3],
        *v.stride()[:3],
        norm.eps,
        D=channels,
        NORM=norm.kind,
        BLOCK_D=triton.next_power_of_2(channels),
        BLOCK_N=BLOCK_N,
        num_warps=2,
    )
