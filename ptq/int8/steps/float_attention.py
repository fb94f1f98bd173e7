"""Attention of a decoding step that is not quantized, between two products that are (Triton):

    q, k   LayerNorm over the channels of a head; k and v go to the cache, at the step's position
    softmax over all keys up to there, and the average of values, in float32
    codes  of the average, for the product that reads it, and their sum

A program serves one row and head, and reads its keys and values once.
`reference_float_step` is the same in plain PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ptq.int8.kernel_parts import round_codes
from ptq.int8.ops import entry_at, static_codes
from ptq.int8.steps.attention import NORM_EPS

LOG2_E = tl.constexpr(1.4426950408889634)
BLOCK_N = 16  # keys at a time: more do not fit the registers of one warp


@dataclass(frozen=True)
class FloatStepAttention:
    """What the step's attention of one block is made of.

    Attributes:
        query_norm, key_norm: gain and bias (D,) float32 each.
        heads: H.
        output: scale and zero point of the average by position (2, P).
        bits: of its codes.
    """

    query_norm: tuple[Tensor, Tensor]
    key_norm: tuple[Tensor, Tensor]
    heads: int
    output: Tensor
    bits: int

    @property
    def channels(self) -> int:
        """D."""
        return len(self.query_norm[0])


@triton.jit
def _normalize(x, gain, bias, inside, eps, D: tl.constexpr):
    centred = tl.where(inside, x - tl.sum(x, axis=0) / D, 0.0)
    variance = tl.sum(centred * centred, axis=0) / D
    return centred * tl.rsqrt(variance + eps) * gain + bias


@triton.jit
def _step_kernel(
    qkv,
    keys,
    values,
    codes,
    code_sums,
    position_at,
    query_gain,
    query_bias,
    key_gain,
    key_bias,
    table,
    P,
    H,
    S,
    scale,
    eps,
    D: tl.constexpr,
    HALF: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row_head = tl.program_id(0)
    row = row_head // H
    channels = tl.arange(0, BLOCK_D)
    inside = channels < D
    position = tl.load(position_at).to(tl.int32)
    entry = table + tl.minimum(position, P - 1)
    out_scale = tl.load(entry)
    out_zero = tl.load(entry + P)
    gain_of_q = tl.load(query_gain + channels, mask=inside, other=0.0)
    bias_of_q = tl.load(query_bias + channels, mask=inside, other=0.0)
    gain_of_k = tl.load(key_gain + channels, mask=inside, other=0.0)
    bias_of_k = tl.load(key_bias + channels, mask=inside, other=0.0)
    token = qkv + (row * 3 * H + row_head % H) * D + channels
    q = tl.load(token, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(token + H * D, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(token + 2 * H * D, mask=inside, other=0.0).to(tl.float32)
    q = _normalize(q, gain_of_q, bias_of_q, inside, eps, D) * (scale * LOG2_E)
    stored_k = _normalize(k, gain_of_k, bias_of_k, inside, eps, D).to(keys.dtype.element_ty)
    stored_v = v.to(values.dtype.element_ty)
    own = row_head.to(tl.int64) * S * D  # offsets of a large batch pass 2^31
    place = own + position * D + channels
    tl.store(keys + place, stored_k, mask=inside)
    tl.store(values + place, stored_v, mask=inside)

    # this step's own key and value first, which need not be read back
    top = tl.sum(q * stored_k.to(tl.float32), axis=0)  # the largest score so far
    total = top * 0 + 1.0  # sum of the weights so far, relative to the largest
    average = stored_v.to(tl.float32)  # (BLOCK_D,), likewise
    for first in range(0, position, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        there = key < position
        wanted = there[:, None] & inside[None, :]
        tile = own + key[:, None] * D + channels[None, :]
        k_tile = tl.load(keys + tile, mask=wanted, other=0.0).to(tl.float32)
        v_tile = tl.load(values + tile, mask=wanted, other=0.0).to(tl.float32)
        scores = tl.sum(q[None, :] * k_tile, axis=1)  # (BLOCK_N,)
        scores = tl.where(there, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=0))
        weights = tl.exp2(scores - higher)
        shrink = tl.exp2(top - higher)
        average = average * shrink + tl.sum(weights[:, None] * v_tile, axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        top = higher
    if EARLY:
        # not before: the next product's tiles would take the L1 cache that holds keys and values
        tl.extra.cuda.gdc_launch_dependents()
    rounded = round_codes(average / total / out_scale, out_zero, HALF)  # (BLOCK_D,)
    tl.store(codes + row_head * D + channels, rounded, mask=inside)
    code_sum = tl.sum(tl.where(inside, rounded.to(tl.int32), 0), axis=0)
    tl.atomic_add(code_sums + row, code_sum, sem="relaxed")


def attend_floats(
    attention: FloatStepAttention,
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    code_sums: Tensor,
    early: bool = False,
) -> Tensor:
    """Codes (B, H * D) of the average of values, for the product that reads it.

    Args:
        qkv: (B, 3 * H * D).
        keys, values: the cache (B, H, S, D); the step's own are stored at `position` (1,).
        code_sums: zeros (B,) int32, to which the sums of the codes are added.
        early: let the next kernel be launched before this one has ended.
    """
    rows = len(qkv)
    codes = torch.empty(rows, qkv.shape[1] // 3, dtype=torch.int8, device=qkv.device)
    _step_kernel[(rows * attention.heads,)](
        qkv,
        keys,
        values,
        codes,
        code_sums,
        position,
        *attention.query_norm,
        *attention.key_norm,
        attention.output,
        attention.output.shape[1],
        attention.heads,
        keys.shape[2],
        attention.channels**-0.5,
        NORM_EPS,
        D=attention.channels,
        HALF=2 ** (attention.bits - 1),
        EARLY=early,
        BLOCK_D=triton.next_power_of_2(attention.channels),
        BLOCK_N=BLOCK_N,
        num_warps=1,
    )
    return codes


def reference_float_step(
    attention: FloatStepAttention, qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """The codes that `attend_floats` makes, and their sums, in plain PyTorch."""
    rows = len(qkv)
    split = qkv.view(rows, 3, attention.heads, 1, attention.channels).float()
    q, k, v = split.unbind(1)  # (B, H, 1, D) each
    q = F.layer_norm(q, q.shape[-1:], *attention.query_norm, eps=NORM_EPS)
    k = F.layer_norm(k, k.shape[-1:], *attention.key_norm, eps=NORM_EPS)
    keys.index_copy_(2, position, k.to(keys.dtype))
    values.index_copy_(2, position, v.to(values.dtype))
    absent = torch.arange(keys.shape[2], device=keys.device) > position  # (S,)
    scores = (q @ keys.float().mT) * attention.channels**-0.5  # (B, H, 1, S)
    weights = scores.masked_fill(absent, float("-inf")).softmax(dim=-1)
    average = (weights @ values.float()).reshape(rows, -1)  # (B, H * D)
    scale, zero_point = entry_at(attention.output, position)[:, None]  # (1,) each
    codes = static_codes(average, scale, zero_point, attention.bits)
    return codes, codes.sum(dim=1, dtype=torch.int32)
