"""Attention of a decoding step's one to four queries in one pass over the KV cache (Triton, CUDA).

    softmax(scale q k^T + mask) v

The library's kernels make tiles of 64 queries; for one query of float32 they take five times as
long as this one, which is not much more than reading the keys and values
(`experiments/results/raw/step-attention-h200.json`). A program reads those of one head once, keeps
the running maximum and sum of every query, and multiplies outside of the matrix units, which one
query would not fill.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES = 4  # of a step, at most


@torch.library.custom_op("ar_ptq::step_attention", mutates_args=())
def step_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, filled: Tensor | None
) -> Tensor:
    """The average of values (B, T, H, D).

    Args:
        q: (B, H, T, D), T up to `QUERIES`.
        k, v: (B, H, S, D), of the same type as q, float32 or half precision.
        mask: additive, broadcastable to (B, H, T, S), or None.
        filled: (1,), how many keys there are; the others count as absent. None if all are there.
    """
    scores = (q @ k.transpose(-2, -1)).float() * scale  # (B, H, T, S)
    if mask is not None:
        scores = scores + mask
    if filled is not None:
        absent = torch.arange(k.shape[2], device=k.device) >= filled  # (S,)
        scores = scores.masked_fill(absent, float("-inf"))
    return (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2).contiguous()


@step_attention.register_kernel("cuda")
def _(q, k, v, scale, mask, filled):
    from models.decoding import step_attention_kernel

    return step_attention_kernel.launch_attention(q, k, v, scale, mask, filled)


@step_attention.register_fake
def _(q, k, v, scale, mask, filled):
    batch, heads, tokens, channels = q.shape
    return q.new_empty(batch, tokens, heads, channels)


def attend_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    filled: Tensor | None,
    positions: Tensor | None = None,
) -> Tensor:
    """`step_attention` as `models.layers.attend` wants it: (B, H, T, D)."""
    return step_attention(q, k, v, scale, mask, filled).transpose(1, 2)
