"""The CUDA kernel of `embedding.py` (Triton): a program makes the input of one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _embed_kernel(
    ids, positions, tokens, own, following, out,
    L, C,                    # tokens of a row, channels
    SUM_TYPE: tl.constexpr,  # number format of a sum, before it is rounded
    BLOCK_C: tl.constexpr,   # channels, rounded up to a power of two
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK_C)
    inside = channels < C
    position = tl.load(positions)
    token = tl.load(ids + row * L + position - 2)
    x = tl.load(tokens + token * C + channels, mask=inside, other=0.0)
    place = tl.load(own + position * C + channels, mask=inside, other=0.0)
    target = tl.load(following + (position + 1) * C + channels, mask=inside, other=0.0)
    x = (x.to(SUM_TYPE) + place.to(SUM_TYPE)).to(out.dtype.element_ty)
    x = (x.to(SUM_TYPE) + target.to(SUM_TYPE)).to(out.dtype.element_ty)
    tl.store(out + row * C + channels, x, mask=inside)


def launch_embed(
    ids: Tensor, positions: Tensor, tokens: Tensor, own: Tensor, following: Tensor
) -> Tensor:
    """`embedding.embed_token` for tensors on a CUDA device."""
    rows, length = ids.shape
    channels = tokens.shape[1]
    out = torch.empty(rows, 1, channels, dtype=tokens.dtype, device=tokens.device)
    is_double = tokens.dtype == torch.float64
    _embed_kernel[(rows,)](
        ids.contiguous(),
        positions,
        tokens.contiguous(),
        own.contiguous(),
        following.contiguous(),
        out,
        length,
        channels,
        SUM_TYPE=tl.float64 if is_double else tl.float32,
        BLOCK_C=triton.next_power_of_2(channels),
    )
    return out
