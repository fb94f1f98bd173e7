"""Attention in half precision between two integer products (`operators.attention_codes`):

    q, k  = per head: LayerNorm, or unit vectors and a scale of the head, or as they are
    o     = softmax(scale q k^T + mask) v
    codes = those of o for the projection that reads it, and their sums over all heads

Queries, keys and values are read where the product before left them, or keys and values from a
cache, where they were normalised already. On CUDA it is one kernel (`attention_kernel.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq.int8 import ops
from ptq.int8.blocks.norms import Grid, at_sinks
from ptq.int8.codes import UNIT_EPS
from ptq.int8.epilogue import params_by_row


class HeadNorm(NamedTuple):
    """What happens to queries and keys of a head before their product.

    Attributes:
        kind: "layer": LayerNorm over the channels of a head; "unit": unit vectors; "none".
        q_weight, q_bias, k_weight, k_bias: (D,) of the LayerNorms.
        eps: of the LayerNorms.
        head_scale: (H,), on unit queries; or None.
        keys: whether the keys are still to be normalised.
        factors: (B T, H) float32, 1 / std or 1 / |k| of keys that are; None: to be computed.
    """

    kind: str = "none"
    q_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_weight: Tensor | None = None
    k_bias: Tensor | None = None
    eps: float = 0.0
    head_scale: Tensor | None = None
    keys: bool = True
    factors: Tensor | None = None


def normalise_heads(
    x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Queries or keys x (B, H, T, D) float32, normalised."""
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight.float(), bias.float(), eps)
    return F.normalize(x, dim=-1, eps=UNIT_EPS) if kind == "unit" else x


def reference_attention_codes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm: HeadNorm,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    """What `operators.attention_codes` computes, in plain PyTorch and float32."""
    batch, heads, tokens, channels = q.shape
    q = normalise_heads(q.float(), norm.kind, norm.q_weight, norm.q_bias, norm.eps)
    k = k.float()
    if norm.keys:
        k = normalise_heads(k, norm.kind, norm.k_weight, norm.k_bias, norm.eps)
    if norm.head_scale is not None:
        q = q * norm.head_scale.float()[:, None, None]
    if mask is not None:
        mask = mask.float()
    out = F.scaled_dot_product_attention(q, k, v.float(), mask, is_causal=causal, scale=scale)
    rows = out.transpose(1, 2).reshape(batch * tokens, heads * channels)
    if grid.sink_mean is not None:
        rows = rows - at_sinks(grid.sink_mean, grid.sinks, grid.positions, len(rows))
    # (M,) each
    x_scale, zero_point, _ = params_by_row(grid.x_params, grid.positions, len(rows)).squeeze(-1)
    steps = rows * (1 / x_scale)[:, None]
    codes = ops.static_codes(steps, torch.ones_like(x_scale), zero_point, grid.bits)
    return codes, codes.sum(dim=1, dtype=torch.int32)
