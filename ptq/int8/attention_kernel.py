"""Attention in integers in one kernel (Triton, CUDA): the formula of `attention.py`.

A program computes the averages of BLOCK_M queries of one head. A weight is rounded after it was
divided by the sum of its row, so the keys are passed twice, BLOCK_N at a time: first for every
row's maximum and sum, then, with the scores computed again, for codes and their product with the
values. To hold whole rows of scores in between would save the second product and exponential, but
Triton's rows are powers of two (512 for 257 keys, 1,024 for 576 or 680), which is about as much
work, and 64 of them do not fit the registers.

Of the corrections for zero points, that of the keys adds the same to all scores of a query, which a
softmax does not see; that of the queries is a float32 added to the integer product; those of
weights and values are integers, with sums over the n keys

    sum (w - w_zero)(v - v_zero) = sum w v - v_zero sum w - w_zero sum v + n w_zero v_zero

which may leave 32 bits on the way, but not in the end, and int32 wraps around.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq.int8 import ops

LOG2_E = tl.constexpr(1.4426950408889634)
ROUNDING_CONSTANT = tl.constexpr(ops.ROUNDING_CONSTANT)
ROUNDING_BITS = tl.constexpr(0x4B400000)  # of that float32


@triton.jit
def _scores(
    queries,
    k,
    mask,
    first_key,
    length,
    rows,
    T,
    k_token,
    mask_token,
    mask_key,
    factor,
    q_zero,
    D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """log2(e) times the scores (BLOCK_M, BLOCK_N) of the keys from `first_key` on.

    They lack a number that is the same for all keys of a query; behind the last key they are -inf.
    """
    keys = first_key + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    present = keys < length
    codes = tl.load(
        k + (keys[:, None] * k_token + channels[None, :]),
        mask=present[:, None] & (channels < D)[None, :],
        other=0,
    )
    correction = -factor * (q_zero * tl.sum(codes.to(tl.int32), axis=1)).to(tl.float32)
    correction = tl.where(present, correction, float("-inf"))
    product = tl.dot(queries, codes.T, out_dtype=tl.int32)
    scores = product.to(tl.float32) * factor + correction[None, :]
    if HAS_MASK:
        # in bounds; predicates take more registers
        row = tl.minimum(rows, T - 1)
        key = tl.minimum(keys, length - 1)
        place = mask + (row[:, None] * mask_token + key[None, :] * mask_key)
        scores += tl.load(place).to(tl.float32) * LOG2_E
    return scores


@triton.jit(do_not_specialize=["S"])  # a constant 1 would count beyond 32 bits
def _attention_kernel(
    q,
    k,
    v,
    mask,
    filled,
    out,
    scales,
    zero_points,
    scale,
    T,
    S,
    H,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    mask_batch,
    mask_head,
    mask_token,
    mask_key,
    D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_FILLED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Arguments named like `q_token` are strides."""
    row_blocks = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // row_blocks
    row_block = tl.program_id(0) % row_blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    q = q + b * q_batch + h * q_head
    k = k + b * k_batch + h * k_head
    v = v + b * v_batch + h * v_head
    mask = mask + b * mask_batch + h * mask_head
    q_zero = tl.load(zero_points)
    w_zero = tl.load(zero_points + 2)
    v_zero = tl.load(zero_points + 3)
    length = S
    if HAS_FILLED:
        length = min(S, tl.load(filled).to(tl.int32))
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    row_inside = rows < T
    channel_inside = channels < D
    queries = tl.load(
        q + (rows[:, None] * q_token + channels[None, :]),
        mask=row_inside[:, None] & channel_inside[None, :],
        other=0,
    )
    factor = tl.load(scales) * scale * LOG2_E

    # first pass: maximum and sum of every row
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first_key in range(0, length, BLOCK_N):
        scores = _scores(
            queries,
            k,
            mask,
            first_key,
            length,
            rows,
            T,
            k_token,
            mask_token,
            mask_key,
            factor,
            q_zero,
            D,
            HAS_MASK,
            BLOCK_D,
            BLOCK_N,
        )
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        # 0 where there was nothing but masked keys so far
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp2(maximum - base) + tl.sum(tl.exp2(scores - base[:, None]), axis=1)
        maximum = new_maximum

    # second pass: codes of the weights, and their product with the values
    steps = 1 / (total * tl.load(scales + 1))  # of the weights' grid, per exponential
    low = (-HALF - w_zero).to(tl.float32)
    high = (HALF - 1 - w_zero).to(tl.float32)
    average = tl.zeros((BLOCK_M, BLOCK_D), tl.int32)
    weight_sums = tl.zeros((BLOCK_M,), tl.int32)
    value_sums = tl.zeros((BLOCK_D,), tl.int32)
    for first_key in range(0, length, BLOCK_N):
        scores = _scores(
            queries,
            k,
            mask,
            first_key,
            length,
            rows,
            T,
            k_token,
            mask_token,
            mask_key,
            factor,
            q_zero,
            D,
            HAS_MASK,
            BLOCK_D,
            BLOCK_N,
        )
        weights = tl.exp2(scores - maximum[:, None]) * steps[:, None]
        limited = tl.minimum(tl.maximum(weights, low), high)
        # the low ones are the codes
        bits = (limited + (ROUNDING_CONSTANT + w_zero.to(tl.float32))).to(tl.int32, bitcast=True)
        keys = first_key + tl.arange(0, BLOCK_N)
        values = tl.load(
            v + (keys[:, None] * v_token + channels[None, :]),
            mask=(keys < length)[:, None] & channel_inside[None, :],
            other=0,
        )
        average = tl.dot(bits.to(tl.int8), values, average, out_dtype=tl.int32)
        weight_sums += tl.sum(bits, axis=1)
        value_sums += tl.sum(values.to(tl.int32), axis=0)
    # keys that are not there have the weight 0, whose code is not 0
    passed = tl.cdiv(length, BLOCK_N) * BLOCK_N
    code_of_zero = tl.minimum(tl.maximum(0, -HALF - w_zero), HALF - 1 - w_zero) + w_zero
    weight_sums -= passed * ROUNDING_BITS + (passed - length) * code_of_zero
    row_correction = length * w_zero * v_zero - v_zero * weight_sums
    average += row_correction[:, None] - (w_zero * value_sums)[None, :]
    result = average.to(tl.float32) * tl.load(scales + 2)
    place = out + ((b * T + rows[:, None]) * H + h) * D + channels[None, :]
    inside = row_inside[:, None] & channel_inside[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)


def launch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    filled: Tensor | None,
    scales: Tensor,
    zero_points: Tensor,
    scale: float,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """The average of values (B, T, H, D) on a CUDA device.

    The arguments are those of `attention.int8_attention`.
    """
    batch, heads, tokens, channels = q.shape
    keys = k.shape[2]
    q, k, v = (codes if codes.stride(-1) == 1 else codes.contiguous() for codes in (q, k, v))
    out = torch.empty(batch, tokens, heads, channels, dtype=dtype, device=q.device)
    unread = q  # stands in for tensors that the kernel does not read
    mask_strides = (0, 0, 0, 0)
    if mask is not None:
        mask = mask.expand(batch, heads, tokens, keys)
        mask_strides = mask.stride()
    block_m = 16 if tokens <= 16 else 64
    block_d = max(32, triton.next_power_of_2(channels))
    programs = triton.cdiv(tokens, block_m) * batch * heads
    _attention_kernel[(programs,)](
        q,
        k,
        v,
        unread if mask is None else mask,
        unread if filled is None else filled,
        out,
        scales,
        zero_points,
        scale,
        tokens,
        keys,
        heads,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *mask_strides,
        D=channels,
        HAS_MASK=mask is not None,
        HAS_FILLED=filled is not None,
        HALF=2 ** (bits - 1),
        BLOCK_D=block_d,
        BLOCK_M=block_m,
        BLOCK_N=64 if block_d <= 64 else 32,  # as many keys as the registers hold
        num_warps=4,
        num_stages=3,
    )
    return out
