"""Attention in integers in one kernel (Triton, CUDA): the formula of `attention.py`.

A program computes the averages of BM queries of one head. A weight is rounded after it was divided
by the sum of its
row, so the keys are passed twice, BN at a time: first for every row's maximum and sum, then, with
the scores computed again, for codes and their product with the values. To hold whole rows of scores
in between would save the second product and exponential, but Triton's rows are powers of two (512
for 257 keys, 1,024 for 576 or 680), which is about as much work, and 64 of them do not fit the
registers.

Of the corrections for zero points, the keys' adds the same to all scores of a query, which a
softmax does not see; the queries' is a float32 added to the integer product; those of weights and
values are integers, with sums over the n keys

    sum (cw - zw)(cv - zv) = sum cw cv - zv sum cw - zw sum cv + n zw zv

which may leave 32 bits on the way, but not in the end, and int32 wraps around.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
ROUNDS = tl.constexpr(12582912.0)  # 1.5 * 2^23, as in `ops.py`
ROUNDS_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _scores(
    queries,
    k,
    mask,
    first,
    length,
    rows,
    T,
    kt,
    mt,
    ms,
    factor,
    zq,
    D: tl.constexpr,
    MASK: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """log2(e) times the scores (BM, BN) of the keys from `first` on, but for a number that is the
    same for all keys of a query; -inf behind the last key."""
    keys = first + tl.arange(0, BN)
    channels = tl.arange(0, BD)
    there = keys < length
    codes = tl.load(
        k + (keys[:, None] * kt + channels[None, :]),
        mask=there[:, None] & (channels < D)[None, :],
        other=0,
    )
    column = tl.where(
        there, -factor * (zq * tl.sum(codes.to(tl.int32), axis=1)).to(tl.float32), float("-inf")
    )
    scores = tl.dot(queries, codes.T, out_dtype=tl.int32).to(tl.float32) * factor + column[None, :]
    if MASK:
        # in bounds; predicates take more registers
        row = tl.minimum(rows, T - 1)
        key = tl.minimum(keys, length - 1)
        scores += tl.load(mask + (row[:, None] * mt + key[None, :] * ms)).to(tl.float32) * LOG2_E
    return scores


@triton.jit(do_not_specialize=["S"])  # a constant 1 would count beyond 32 bits
def _kernel(
    q,
    k,
    v,
    mask,
    filled,
    out,
    scales,
    zeros,
    scale,
    T,
    S,
    H,
    qb,
    qh,
    qt,
    kb,
    kh,
    kt,
    vb,
    vh,
    vt,
    mb,
    mh,
    mt,
    ms,
    D: tl.constexpr,
    MASK: tl.constexpr,
    FILLED: tl.constexpr,
    HALF: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    blocks = tl.cdiv(T, BM)
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    q = q + b * qb + h * qh
    k = k + b * kb + h * kh
    v = v + b * vb + h * vh
    mask = mask + b * mb + h * mh
    zq = tl.load(zeros)
    zw = tl.load(zeros + 2)
    zv = tl.load(zeros + 3)
    length = S
    if FILLED:
        length = min(S, tl.load(filled).to(tl.int32))
    rows = block * BM + tl.arange(0, BM)
    channels = tl.arange(0, BD)
    inside = rows < T
    fits = channels < D
    queries = tl.load(
        q + (rows[:, None] * qt + channels[None, :]), mask=inside[:, None] & fits[None, :], other=0
    )
    factor = tl.load(scales) * scale * LOG2_E

    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for first in range(0, length, BN):
        scores = _scores(
            queries, k, mask, first, length, rows, T, kt, mt, ms, factor, zq, D, MASK, BD, BN
        )
        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but masked keys so far
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(scores - base[:, None]), axis=1)
        top = higher

    steps = 1 / (total * tl.load(scales + 1))  # of the weights' grid, per exponential
    low = (-HALF - zw).to(tl.float32)
    high = (HALF - 1 - zw).to(tl.float32)
    average = tl.zeros((BM, BD), tl.int32)
    weighed = tl.zeros((BM,), tl.int32)
    values = tl.zeros((BD,), tl.int32)
    for first in range(0, length, BN):
        scores = _scores(
            queries, k, mask, first, length, rows, T, kt, mt, ms, factor, zq, D, MASK, BD, BN
        )
        rounded = tl.minimum(tl.maximum(tl.exp2(scores - top[:, None]) * steps[:, None], low), high)
        # the low ones are the codes
        bits = (rounded + (ROUNDS + zw.to(tl.float32))).to(tl.int32, bitcast=True)
        keys = first + tl.arange(0, BN)
        there = (keys < length)[:, None] & fits[None, :]
        codes = tl.load(v + (keys[:, None] * vt + channels[None, :]), mask=there, other=0)
        average = tl.dot(bits.to(tl.int8), codes, average, out_dtype=tl.int32)
        weighed += tl.sum(bits, axis=1)
        values += tl.sum(codes.to(tl.int32), axis=0)
    # keys that are not there have the weight 0, whose code is not 0
    passed = tl.cdiv(length, BN) * BN
    weighed -= passed * ROUNDS_BITS + (passed - length) * (
        tl.minimum(tl.maximum(0, -HALF - zw), HALF - 1 - zw) + zw
    )
    average += (length * zw * zv - zv * weighed)[:, None] - (zw * values)[None, :]
    found = average.to(tl.float32) * tl.load(scales + 2)
    place = out + ((b * T + rows[:, None]) * H + h) * D + channels[None, :]
    tl.store(place, found.to(out.dtype.element_ty), mask=inside[:, None] & fits[None, :])


def launch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    filled: Tensor | None,
    scales: Tensor,
    zeros: Tensor,
    scale: float,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """The average of values (B, T, H, D); the arguments are those of `attention.int8_attention`, on
    a CUDA device."""
    (batch, heads, tokens, channels), keys = q.shape, k.shape[2]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(batch, tokens, heads, channels, dtype=dtype, device=q.device)
    seen = q if mask is None else mask.expand(batch, heads, tokens, keys)
    bm = 16 if tokens <= 16 else 64
    width = max(32, triton.next_power_of_2(channels))
    _kernel[(triton.cdiv(tokens, bm) * batch * heads,)](
        q,
        k,
        v,
        seen,
        q if filled is None else filled,
        out,
        scales,
        zeros,
        scale,
        tokens,
        keys,
        heads,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *((0,) * 4 if mask is None else seen.stride()),
        D=channels,
        MASK=mask is not None,
        FILLED=filled is not None,
        HALF=2 ** (bits - 1),
        # as much as the registers hold
        BD=width,
        BM=bm,
        BN=64 if width <= 64 else 32,
        num_warps=4,
        num_stages=3,
    )
    return out
