"""Attention with numerators in one kernel (Triton, CUDA): the formula of `numerators.py`.

A program computes the averages of BM queries of one head and passes the keys twice, BN at a time:
first for the maximum of every row's scores, then, with the scores computed again, for the codes of
the numerators, their sums and their product with the values. The first pass takes no exponential
and no sum, the second no division.

Codes of numerators are 0 .. 2^b - 1 and stored signed, c' = c - 2^(b-1), so that

    sum c (cv - zv) = sum c' cv + 2^(b-1) sum cv - zv sum c          over the keys

Keys that are not there have the score -inf, hence the numerator 0, and values whose codes are 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores(
    queries,
    query_sums,
    query_scale,
    query_zero,
    k,
    key_scale,
    key_zero,
    mask,
    first,
    length,
    last,
    rows,
    T,
    kt,
    mt,
    ms,
    sinks,
    drop,
    D: tl.constexpr,
    MASK: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """log2(e) times the scores (BM, BN) of the keys from `first` on, less the logarithm of their
    key weights; -inf behind the last key."""
    keys = first + tl.arange(0, BN)
    channels = tl.arange(0, BD)
    there = keys < length
    codes = tl.load(
        k + (keys[:, None] * kt + channels[None, :]),
        mask=there[:, None] & (channels < D)[None, :],
        other=0,
    )
    place = tl.minimum(keys, last)
    scale = tl.load(key_scale + place)
    zero = tl.load(key_zero + place).to(tl.int32)
    sums = tl.sum(codes.to(tl.int32), axis=1)
    product = tl.dot(queries, codes.T, out_dtype=tl.int32)
    product -= query_zero[:, None] * sums[None, :] + query_sums[:, None] * zero[None, :]
    scores = product.to(tl.float32) * query_scale[:, None] * scale[None, :]
    if MASK:
        # in bounds; predicates take more registers
        row = tl.minimum(rows, T - 1)
        key = tl.minimum(keys, length - 1)
        scores += tl.load(mask + (row[:, None] * mt + key[None, :] * ms)).to(tl.float32) * LOG2_E
    column = tl.where(there, tl.where(keys < sinks, -drop, 0.0), float("-inf"))
    return scores + column[None, :]


@triton.jit(do_not_specialize=["S", "P", "sinks"])  # a constant 1 would count beyond 32 bits
def _kernel(
    q,
    k,
    v,
    mask,
    filled,
    out,
    queries_at,
    keys_at,
    values_at,
    key_weights,
    scale,
    sinks,
    T,
    S,
    P,
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
    query_scale = tl.load(queries_at + h * T + rows, mask=inside, other=0.0) * (scale * LOG2_E)
    query_zero = tl.load(queries_at + (H + h) * T + rows, mask=inside, other=0.0).to(tl.int32)
    # sum (cq - zq) over the channels
    query_sums = tl.sum(queries.to(tl.int32), axis=1) - D * query_zero
    key_scale = keys_at + h * P
    key_zero = keys_at + (H + h) * P
    value_scale = tl.load(values_at + h)
    value_zero = tl.load(values_at + H + h).to(tl.int32)
    weight = tl.load(key_weights + h)
    drop = tl.log2(weight)

    top = tl.full((BM,), float("-inf"), tl.float32)
    for first in range(0, length, BN):
        scores = _scores(
            queries, query_sums, query_scale, query_zero, k, key_scale, key_zero, mask, first,
            length, P - 1, rows, T, kt, mt, ms, sinks, drop, D, MASK, BD, BN,
        )  # fmt: skip
        top = tl.maximum(top, tl.max(scores, axis=1))

    average = tl.zeros((BM, BD), tl.int32)
    total = tl.zeros((BM,), tl.int32)  # of all codes
    of_sinks = tl.zeros((BM,), tl.int32)
    value_sums = tl.zeros((BD,), tl.int32)
    for first in range(0, length, BN):
        scores = _scores(
            queries, query_sums, query_scale, query_zero, k, key_scale, key_zero, mask, first,
            length, P - 1, rows, T, kt, mt, ms, sinks, drop, D, MASK, BD, BN,
        )  # fmt: skip
        # half to even, as torch.round
        steps = tl.exp2(scores - top[:, None]) * (2 * HALF - 1)
        numerators = ((steps + 12582912.0) - 12582912.0).to(tl.int32)
        keys = first + tl.arange(0, BN)
        total += tl.sum(numerators, axis=1)
        of_sinks += tl.sum(tl.where((keys < sinks)[None, :], numerators, 0), axis=1)
        there = (keys < length)[:, None] & fits[None, :]
        codes = tl.load(v + (keys[:, None] * vt + channels[None, :]), mask=there, other=0)
        average = tl.dot((numerators - HALF).to(tl.int8), codes, average, out_dtype=tl.int32)
        value_sums += tl.sum(codes.to(tl.int32), axis=0)
    average += HALF * value_sums[None, :] - (value_zero * total)[:, None]
    mass = (total - of_sinks).to(tl.float32) + weight * of_sinks.to(tl.float32)
    found = average.to(tl.float32) * value_scale / mass[:, None]
    place = out + ((b * T + rows[:, None]) * H + h) * D + channels[None, :]
    tl.store(place, found.to(out.dtype.element_ty), mask=inside[:, None] & fits[None, :])


def launch_numerators(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    filled: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    key_weights: Tensor,
    sinks: int,
    scale: float,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """The average of values (B, T, H, D); the arguments are those of `numerators.int8_numerators`,
    on a CUDA device."""
    batch, heads, tokens, channels = q.shape
    count = k.shape[2]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(batch, tokens, heads, channels, dtype=dtype, device=q.device)
    seen = q if mask is None else mask.expand(batch, heads, tokens, count)
    rows = 16 if tokens <= 16 else 64
    width = max(32, triton.next_power_of_2(channels))
    _kernel[(triton.cdiv(tokens, rows) * batch * heads,)](
        q,
        k,
        v,
        seen,
        q if filled is None else filled,
        out,
        queries.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        key_weights,
        scale,
        sinks,
        tokens,
        count,
        keys.shape[2],
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
        BM=rows,
        BN=64 if width <= 64 else 32,
        num_warps=4,
        num_stages=3,
    )
    return out
