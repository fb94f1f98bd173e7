"""Attention of many queries in half precision, from the product before to the codes for the one
behind, in one kernel (Triton, CUDA): the formula of `attention.py`.

A program computes BLOCK_M queries of one head with an online softmax (flash attention). Keys enter
the matrix units as they lie, in half precision, though they are to be normalised: of

    q . norm(k) = sum_d q_d (w_d (k_d - mean k) / std k + b_d)

b adds the same to all scores of a query, which a softmax does not see; w goes to the query; and the
mean comes off the query in place of the key, since sum_d a_d (k_d - mean k) is the sum of
(a_d - mean a) k_d. What is left for a key is one factor, 1 / std k, or 1 / |k| for unit vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.int8.blocks.attention import HeadNorm
from ptq.int8.blocks.norms import Grid
from ptq.int8.kernel_parts import inverse_norm, round_codes, table_columns

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _add_keys(
    first_key,
    query,
    k,
    v,
    factors,
    mask,
    largest,
    total,
    average,
    rows,
    T,
    S,
    H,
    k_token,
    v_token,
    mask_token,
    mask_key,
    eps,
    D: tl.constexpr,
    NORM: tl.constexpr,
    NORM_KEYS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALL_SEEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Largest scores, sums of weights and averages of values with the keys from `first_key` on.

    ALL_SEEN: all of them are there, and no query comes before one.
    """
    keys = first_key + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    k_place = k + keys[:, None] * k_token + channels[None, :]
    v_place = v + keys[:, None] * v_token + channels[None, :]
    if ALL_SEEN and BLOCK_D == D:
        key = tl.load(k_place)  # (BLOCK_N, BLOCK_D)
        value = tl.load(v_place)
    else:
        inside = (keys < S)[:, None] & (channels < D)[None, :]
        key = tl.load(k_place, mask=inside, other=0.0)
        value = tl.load(v_place, mask=inside, other=0.0)
    scores = tl.dot(query, key.T)  # (BLOCK_M, BLOCK_N)
    if HAS_FACTORS:
        scores *= tl.load(factors + keys * H, mask=keys < S, other=0.0)[None, :]
    elif NORM_KEYS:
        scores *= inverse_norm(key.to(tl.float32), eps, NORM, D)[None, :]
    if HAS_MASK:
        # in bounds; what lies behind the last key is taken out below
        row = tl.minimum(rows, T - 1)
        column = tl.minimum(keys, S - 1)
        place = mask + row[:, None] * mask_token + column[None, :] * mask_key
        scores += tl.load(place).to(tl.float32) * LOG2_E
    if not ALL_SEEN:
        seen = (keys < S)[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= rows[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    base = new_largest
    if HAS_MASK:
        # a row that has seen no key yet
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(largest - base)
    total = total * shrink + tl.sum(weights, 1)
    average = tl.dot(weights.to(v.dtype.element_ty), value, average * shrink[:, None])
    return new_largest, total, average


@triton.jit
def _attention_codes_kernel(
    q,
    k,
    v,
    mask,
    q_weight,
    q_bias,
    k_weight,
    head_scale,
    key_factors,
    x_params,
    positions,
    sink_mean,
    codes,
    sums,
    scale,
    eps,
    sinks,
    T,
    S,
    H,
    POSITIONS_T,
    P,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    mask_token,
    mask_key,
    D: tl.constexpr,
    NORM: tl.constexpr,
    NORM_KEYS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_HEAD_SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Arguments named like `q_token` are strides."""
    row_blocks = tl.cdiv(T, BLOCK_M)
    row_block = tl.program_id(0) % row_blocks
    b = (tl.program_id(0) // row_blocks // H).to(tl.int64)
    h = tl.program_id(0) // row_blocks % H
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    row_inside = rows < T
    channel_inside = channels < D
    inside = row_inside[:, None] & channel_inside[None, :]

    # queries, with all that normalised keys would have brought but their lengths
    q_place = q + b * q_batch + h * q_head + rows[:, None] * q_token + channels[None, :]
    query = tl.load(q_place, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_D)
    if NORM == "layer":
        mean = tl.sum(query, 1) / D
        query = tl.where(channel_inside[None, :], query - mean[:, None], 0.0)
        query *= tl.rsqrt(tl.sum(query * query, 1) / D + eps)[:, None]
        weight = tl.load(q_weight + channels, mask=channel_inside, other=0.0).to(tl.float32)
        bias = tl.load(q_bias + channels, mask=channel_inside, other=0.0).to(tl.float32)
        query = query * weight[None, :] + bias[None, :]
        if NORM_KEYS:
            key_weight = tl.load(k_weight + channels, mask=channel_inside, other=0.0)
            query *= key_weight.to(tl.float32)[None, :]
            query = tl.where(channel_inside[None, :], query - (tl.sum(query, 1) / D)[:, None], 0.0)
    if NORM == "unit":
        query *= inverse_norm(query, eps, NORM, D)[:, None]
    factor = scale * LOG2_E
    if HAS_HEAD_SCALE:
        factor *= tl.load(head_scale + h).to(tl.float32)
    query = (query * factor).to(k.dtype.element_ty)

    # of the keys so far: largest score, sum of weights, and average times that sum
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    average = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    key_factors += b * S * H + h
    # keys in whole steps that all of these queries see, and then the others
    end = S
    seen_by_all = S // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(S, (row_block + 1) * BLOCK_M)
        seen_by_all = tl.minimum(seen_by_all, row_block * BLOCK_M // BLOCK_N * BLOCK_N)
    for stage in tl.static_range(2):
        first = 0 if stage == 0 else seen_by_all
        last = seen_by_all if stage == 0 else end
        for first_key in range(first, last, BLOCK_N):
            largest, total, average = _add_keys(
                first_key,
                query,
                k,
                v,
                key_factors,
                mask,
                largest,
                total,
                average,
                rows,
                T,
                S,
                H,
                k_token,
                v_token,
                mask_token,
                mask_key,
                eps,
                D,
                NORM,
                NORM_KEYS,
                HAS_FACTORS,
                CAUSAL,
                HAS_MASK,
                stage == 0,
                BLOCK_D,
                BLOCK_N,
            )

    column = table_columns(positions, rows, POSITIONS_T, P, HAS_POSITIONS)  # (BLOCK_M,)
    average = average * (1 / total)[:, None]  # (BLOCK_M, BLOCK_D)
    if HAS_SINKS:
        is_sink = tl.load(positions + rows % POSITIONS_T) < sinks
        mean = tl.load(sink_mean + h * D + channels, mask=channel_inside, other=0.0)
        average -= tl.where(is_sink[:, None], mean[None, :], 0.0)
    per_step = 1 / tl.load(x_params + column)
    zero_point = tl.load(x_params + P + column)
    rounded = round_codes(average * per_step[:, None], zero_point[:, None], HALF)
    token = b * T + rows
    tl.store(codes + (token[:, None] * H + h) * D + channels[None, :], rounded, mask=inside)
    counted = tl.where(channel_inside[None, :], rounded.to(tl.int32), 0)
    tl.atomic_add(sums + token, tl.sum(counted, 1), mask=row_inside, sem="relaxed")


class Tiling(NamedTuple):
    """Queries of a program, keys of a step of its loop, warps, and stages of the pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def choose_tiling(tokens: int, causal: bool, normalise_keys: bool) -> Tiling:
    """The fastest tiling for so many queries, measured on an H200.

    Args:
        normalise_keys: the kernel does, without factors from the product before.
    """
    padded = triton.cdiv(tokens, 64) * 64
    # of a causal row block the keys behind it are skipped: smaller ones skip more
    block_m = 64 if causal or padded < triton.cdiv(tokens, 128) * 128 else 128
    if tokens < 64:
        block_m = max(16, triton.next_power_of_2(tokens))
    block_n = 32 if normalise_keys and not causal else 64
    return Tiling(block_m, block_n, warps=4, stages=3)


def launch_attention_codes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm: HeadNorm,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    grid: Grid,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """`operators.attention_codes` on a CUDA device."""
    batch, heads, tokens, channels = q.shape
    keys = k.shape[2]
    codes = torch.empty(batch * tokens, heads * channels, dtype=torch.int8, device=q.device)
    sums = torch.zeros(batch * tokens, dtype=torch.int32, device=q.device)
    columns = grid.x_params.shape[1]
    if mask is not None:
        mask = mask.view(mask.shape[-2:]).expand(tokens, keys)
    normalise_keys = norm.keys and norm.kind != "none"
    has_factors = normalise_keys and norm.factors is not None
    here = normalise_keys and not has_factors
    block_m, block_n, warps, stages = tiling or choose_tiling(tokens, causal, here)
    unread = q  # stands in for tensors that the kernel does not read
    pointers = (
        mask,
        norm.q_weight,
        norm.q_bias,
        norm.k_weight,
        norm.head_scale,
        norm.factors,
        grid.x_params,
        grid.positions,
        grid.sink_mean,
    )
    _attention_codes_kernel[(triton.cdiv(tokens, block_m) * batch * heads,)](
        q,
        k,
        v,
        *(unread if pointer is None else pointer for pointer in pointers),
        codes,
        sums,
        scale,
        norm.eps,
        grid.sinks,
        tokens,
        keys,
        heads,
        columns if grid.positions is None else len(grid.positions),
        columns,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *((0, 0) if mask is None else mask.stride()),
        D=channels,
        NORM=norm.kind,
        NORM_KEYS=normalise_keys,
        HAS_FACTORS=has_factors,
        HAS_HEAD_SCALE=norm.head_scale is not None,
        CAUSAL=causal,
        HAS_MASK=mask is not None,
        HAS_POSITIONS=grid.positions is not None,
        HAS_SINKS=grid.sink_mean is not None,
        HALF=2 ** (grid.bits - 1),
        BLOCK_D=max(16, triton.next_power_of_2(channels)),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
    return codes, sums
