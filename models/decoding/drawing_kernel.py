"""The CUDA kernel of `drawing.py` (Triton): a program draws the token of one row.

    guide -> keys -> threshold of top-k -> threshold of top-p -> cumulative sum -> token

A key is an integer that orders as its logit does, so halving a range of keys ends at a logit that
there is. Nothing is fused into a multiply-add: guided logits are those of single operators.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FORMS = {None: 0, "grown": 1, "scaled": 2}


@triton.jit
def _order_key(x):
    """An int32 that orders as the float32 does; both zeros have one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _draw_kernel(
    logits, uniforms, weight, out, temperature, tail,
    positions, ids,       # of a step whose tokens are looked up and written by place
    N, V,                 # rows, codes
    L, offset,            # places of an image; a position less this is a place
    COUNT: tl.constexpr,  # tokens of an image that a step draws; 0: rows stand for themselves
    K: tl.constexpr,      # of top-k; 0: off
    FORM: tl.constexpr,   # of guidance
    TAIL: tl.constexpr,   # whether top-p is on
    BLOCK: tl.constexpr,  # codes, rounded up to a power of two
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # offsets of many rows pass 2^31
    if COUNT > 0:
        image = row // COUNT
        token = tl.load(positions + row % COUNT) - offset
        uniforms += image * L + token
        weight += tl.load(positions) - offset
    else:
        uniforms += row
    code = tl.arange(0, BLOCK)
    there = code < V
    x = tl.load(logits + row * V + code, mask=there, other=0.0).to(tl.float32)
    if FORM > 0:
        uncond = tl.load(logits + (N + row) * V + code, mask=there, other=0.0).to(tl.float32)
        w = tl.load(weight)
        if FORM == 1:
            x = (1 + w).to(tl.float32) * x - w.to(tl.float32) * uncond
        else:
            x = uncond + (x - uncond) * w.to(tl.float32)
    x = x / temperature
    key = _order_key(x)
    largest = tl.max(tl.where(there, key, -0x80000000), axis=0)
    least = tl.min(tl.where(there, key, 0x7FFFFFFF), axis=0)
    kept = there
    low = least.to(tl.int64)
    if K > 0:
        # the largest threshold that K or more codes reach
        high = largest.to(tl.int64) + 1
        while high - low > 1:
            middle = (low + high) >> 1
            reached = tl.sum((there & (key >= middle.to(tl.int32))).to(tl.int32), axis=0)
            low = tl.where(reached >= K, middle, low)
            high = tl.where(reached >= K, high, middle)
            if reached == K:
                high = low + 1  # these are the K largest
        kept = there & (key >= low.to(tl.int32))

    top = tl.max(tl.where(there, x, float("-inf")), axis=0)
    share = tl.exp((x - top).to(tl.float64)).to(tl.float32).to(tl.float64)
    share = tl.where(kept, share, 0.0)  # (BLOCK,), not yet divided by their sum
    if TAIL:
        budget = tail * tl.sum(share, axis=0)
        # the least threshold up to which there is more than the tail may hold
        low = low - 1  # below every code that is left
        high = largest.to(tl.int64)
        while high - low > 1:
            middle = (low + high) >> 1
            below = tl.sum(tl.where(key <= middle.to(tl.int32), share, 0.0), axis=0)
            high = tl.where(below > budget, middle, high)
            low = tl.where(below > budget, low, middle)
        edge = high.to(tl.int32)
        below = tl.sum(tl.where(key < edge, share, 0.0), axis=0)
        tied = kept & (key == edge)
        each = tl.max(tl.where(tied, share, 0.0), axis=0)
        # of logits that tie at the threshold, the first ones may still belong to the tail
        spare = tl.floor((budget - below) / each).to(tl.int32)
        ties = tl.sum(tied.to(tl.int32), axis=0)
        spare = tl.minimum(spare, ties - 1)
        kept = kept & (key >= edge)
        if spare > 0:
            kept = kept & ((key > edge) | (tl.cumsum(tied.to(tl.int32), axis=0) > spare))
        share = tl.where(kept, share, 0.0)

    cumulative = tl.cumsum(share, axis=0)
    place = tl.load(uniforms) * tl.max(cumulative, axis=0)
    drawn = tl.sum((there & (cumulative < place)).to(tl.int32), axis=0)
    drawn = tl.minimum(drawn, V - 1).to(tl.int64)
    tl.store(out + row, drawn)
    if COUNT > 0:
        tl.store(ids + image * L + token, drawn)
        if FORM > 0:  # both branches go on with the same tokens
            tl.store(ids + (N // COUNT + image) * L + token, drawn)


def launch_draw(
    logits: Tensor,
    uniforms: Tensor,
    guidance: str | None,
    weight: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Tensor:
    """`drawing.draw_tokens` for tensors on a CUDA device."""
    out = torch.empty(len(uniforms), dtype=torch.long, device=logits.device)
    settings = guidance, weight, temperature, top_k, top_p
    _launch(logits, uniforms.contiguous(), out, *settings, uniforms, out, 0, 0, 0)
    return out


def launch_draw_next(
    ids: Tensor,
    logits: Tensor,
    positions: Tensor,
    uniforms: Tensor,
    scales: Tensor,
    guided: bool,
    temperature: float,
    offset: int,
) -> Tensor:
    """`drawing.draw_next` for tensors on a CUDA device; `ids` and `uniforms` are contiguous."""
    images, length = uniforms.shape
    count = logits.shape[1]
    out = torch.empty(images, count, dtype=torch.long, device=logits.device)
    settings = "scaled" if guided else None, scales, temperature, 0, 0.0
    predicting = positions[-count:]
    _launch(logits.flatten(0, 1), uniforms, out, *settings, predicting, ids, length, offset, count)
    return out


def _launch(
    logits: Tensor,
    uniforms: Tensor,
    out: Tensor,
    guidance: str | None,
    weight: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    positions: Tensor,
    ids: Tensor,
    length: int,
    offset: int,
    count: int,
) -> None:
    """Fill `out`, and with a `count` the places of `ids` too."""
    rows = out.numel()
    codes = logits.shape[1]
    block = triton.next_power_of_2(codes)
    _draw_kernel[(rows,)](
        logits.contiguous(),
        uniforms,
        weight,
        out,
        float(temperature),
        float(1 - top_p),
        positions,
        ids,
        rows,
        codes,
        length,
        offset,
        COUNT=count,
        K=min(top_k, codes),
        FORM=FORMS[guidance],
        TAIL=top_p > 0,
        BLOCK=block,
        num_warps=4 if block >= 1024 else 1,
        enable_fp_fusion=False,
    )
