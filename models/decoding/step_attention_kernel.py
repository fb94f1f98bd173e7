"""The CUDA kernel of `step_attention.py` (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["S"])  # it changes from step to step
def _attention_kernel(
    q, k, v, mask, filled, out, scale,
    T, S, H,          # queries, keys, heads
    qb, qh, qt,       # strides: batch, head, token
    kb, kh, kt,
    vb, vh, vt,
    mb, mh, mt, ms,
    D: tl.constexpr,  # channels of a head
    MASK: tl.constexpr, FILLED: tl.constexpr,  # whether these are given
    BT: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,  # tile: queries, channels, keys
):  # fmt: skip
    b = (tl.program_id(0) // H).to(tl.int64)  # offsets of a large batch pass 2^31
    h = (tl.program_id(0) % H).to(tl.int64)
    q = q + b * qb + h * qh
    k = k + b * kb + h * kh
    v = v + b * vb + h * vh
    mask = mask + b * mb + h * mh
    length = S
    if FILLED:
        length = min(S, tl.load(filled).to(tl.int32))
    rows = tl.arange(0, BT)
    channels = tl.arange(0, BD)
    inside = rows < T
    fits = channels < D
    queries = tl.load(
        q + (rows[:, None] * qt + channels[None, :]),
        mask=inside[:, None] & fits[None, :],
        other=0.0,
    )
    queries = queries.to(tl.float32) * (scale * LOG2_E)  # (BT, BD); in base 2, for exp2 below
    top = tl.full((BT,), float("-inf"), tl.float32)  # the largest score so far
    total = tl.zeros((BT,), tl.float32)  # sum of the weights so far
    average = tl.zeros((BT, BD), tl.float32)
    for first in range(0, length, BN):
        keys = first + tl.arange(0, BN)
        there = keys < length
        wanted = there[:, None] & fits[None, :]
        key = tl.load(k + (keys[:, None] * kt + channels[None, :]), mask=wanted, other=0.0).to(
            tl.float32
        )
        value = tl.load(v + (keys[:, None] * vt + channels[None, :]), mask=wanted, other=0.0).to(
            tl.float32
        )
        scores = tl.sum(queries[:, None, :] * key[None, :, :], axis=2)  # (BT, BN)
        if MASK:
            seen = mask + (rows[:, None] * mt + keys[None, :] * ms)
            scores += (
                tl.load(seen, mask=inside[:, None] & there[None, :], other=0.0).to(tl.float32)
                * LOG2_E
            )
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but masked keys so far
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)  # sums so far are relative to the maximum so far
        average = average * shrink[:, None] + tl.sum(
            weights[:, :, None] * value[None, :, :], axis=1
        )
        total = total * shrink + tl.sum(weights, axis=1)
        top = higher
    place = out + ((b * T + rows[:, None]) * H + h) * D + channels[None, :]
    tl.store(
        place,
        (average / total[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None] & fits[None, :],
    )


def launch_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, filled: Tensor | None
) -> Tensor:
    """The average of values (B, T, H, D); the arguments are those of `step_attention`, on a CUDA
    device."""
    (batch, heads, tokens, channels), keys = q.shape, k.shape[2]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(batch, tokens, heads, channels, dtype=q.dtype, device=q.device)
    seen = q if mask is None else mask.expand(batch, heads, tokens, keys)
    queries = triton.next_power_of_2(tokens)
    width = triton.next_power_of_2(channels)
    _attention_kernel[(batch * heads,)](
        q,
        k,
        v,
        seen,
        q if filled is None else filled,
        out,
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
        BT=queries,
        BD=width,
        BN=16,
        num_warps=1,
    )
    return out
