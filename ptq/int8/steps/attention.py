"""Attention of a decoding step in integers: one query a row and head, in one kernel (CUDA C++).

    q, k   LayerNorm over the channels of a head
    codes  of q, k and v; those of k and v go to the cache, at the step's position
    softmax over all keys up to there, weights rounded after they are normalised
           (`ptq/int8/attention.py`) or before (`ptq/int8/numerators.py`)
    codes  of the average of values, for the product that reads it, and their sum

With one query the row of scores fits the registers, so the keys are read once and weights can be
rounded with the row's sum known; and products of few rows are bound by memory, which codes halve.
`reference_step` is the same in plain PyTorch. The kernel, `attention.cu`, is compiled when it is
first needed (`nvrtc.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.int8.attention import Int8Scores, reference_attention
from ptq.int8.numerators import Int8NumeratorScores, reference_numerators
from ptq.int8.ops import entry_at, static_codes
from ptq.int8.steps import nvrtc

SOURCE = Path(__file__).with_name("attention.cu")
WARPS = 4  # of a block, as in the source; each serves a row and head
KEYS_A_ROUND = 32
MAX_CHANNELS = 128  # of a head
NORM_EPS = 1e-6  # of the norms of q and k, as in the source


@dataclass(frozen=True)
class StepAttention:
    """What the step's attention of one block is made of, all float32.

    Attributes:
        query_norm, key_norm: gain and bias (D,) each.
        queries, keys: scale and zero point by head and position (2, H, P); the last position's
            serve all from there on.
        values: (2, H).
        weight_scale: of normalised weights, None for numerators.
        key_weights: (H,), of the first `sinks` keys; numerators alone have sinks.
        output: scale and zero point of the average by position (2, P).
        bits: of the codes of queries, keys, weights, values and output.
    """

    query_norm: tuple[Tensor, Tensor]
    key_norm: tuple[Tensor, Tensor]
    queries: Tensor
    keys: Tensor
    values: Tensor
    weight_scale: float | None
    key_weights: Tensor
    sinks: int
    output: Tensor
    bits: tuple[int, int, int, int, int]

    @property
    def channels(self) -> int:
        """D."""
        return len(self.query_norm[0])

    @property
    def heads(self) -> int:
        """H."""
        return self.queries.shape[1]


def describe_attention(
    query_norm: tuple[Tensor, Tensor],
    key_norm: tuple[Tensor, Tensor],
    scores: Int8Scores | Int8NumeratorScores,
    values: nn.Module,
    heads: int,
    output: Tensor,
    output_bits: int,
) -> StepAttention:
    """The step's attention of modules that compute it in integers.

    Args:
        query_norm, key_norm: gain and bias (D,) each.
        scores, values: what stands in the places of the two products.
        output: the table of the layer that reads the average; the first rows are its scale and zero
            point (2, P).
    """
    if isinstance(scores, Int8NumeratorScores):
        queries = scores.queries.table_for(heads)
        keys = scores.keys.table_for(heads)
        value_table = scores.value_table.expand(-1, heads).contiguous()
        weight_scale = None
        weight_bits = scores.bits
        sinks = scores.sinks if scores.key_weights is not None else 0
        key_weights = scores.key_weights if sinks else torch.ones_like(value_table[0])
    else:
        queries = _same_for_heads(scores.queries, heads)[:, :, None].contiguous()
        keys = _same_for_heads(scores.keys, heads)[:, :, None].contiguous()
        value_table = _same_for_heads(values.values, heads)
        weight_scale = float(scores.scales[1])
        weight_bits = scores.bits
        sinks = 0
        key_weights = torch.ones_like(value_table[0])
    bits = (scores.queries.bits, scores.keys.bits, weight_bits, values.values.bits, output_bits)
    return StepAttention(
        query_norm=query_norm,
        key_norm=key_norm,
        queries=queries,
        keys=keys,
        values=value_table,
        weight_scale=weight_scale,
        key_weights=key_weights.float().contiguous(),
        sinks=sinks,
        output=output[:2].contiguous(),
        bits=bits,
    )


def refusal_of(scores: nn.Module, channels: int) -> str | None:
    """What of integer attention the kernel does not do, in one line; None if it does it all."""
    if channels % 8 or channels > MAX_CHANNELS:
        return f"its heads have {channels} channels, no multiple of 8 up to {MAX_CHANNELS}"
    if scores.queries.rotation is not None:
        return "its queries and keys are rotated online"
    if isinstance(scores, Int8Scores) and int(scores.zero_points[2]) != -(2 ** (scores.bits - 1)):
        return "its attention weights have a zero point"
    return None


def _same_for_heads(encoder: nn.Module, heads: int) -> Tensor:
    """Scale and zero point (2, H) of an operand that has one of each."""
    pair = torch.cat((encoder.scale, encoder.zero_point)).float()  # (2,)
    return pair[:, None].expand(-1, heads).contiguous()


def reference_step(
    attention: StepAttention,
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """What `attend_codes` computes, in plain PyTorch."""
    rows = len(qkv)
    split = qkv.view(rows, 3, attention.heads, 1, attention.channels).float()
    q, k, v = split.unbind(1)  # (B, H, 1, D) each
    q = F.layer_norm(q, q.shape[-1:], *attention.query_norm, eps=NORM_EPS)
    k = F.layer_norm(k, k.shape[-1:], *attention.key_norm, eps=NORM_EPS)
    q_bits, k_bits, weight_bits, v_bits, out_bits = attention.bits
    q_params = entry_at(attention.queries, position)  # (2, H)
    k_params = entry_at(attention.keys, position)  # (2, H)
    q_codes = static_codes(q, *q_params[..., None], q_bits)
    keys.index_copy_(2, position, static_codes(k, *k_params[..., None], k_bits))
    values.index_copy_(2, position, static_codes(v, *attention.values[..., None], v_bits))
    filled = position + 1
    softmax_scale = attention.channels**-0.5
    if attention.weight_scale is None:
        average = reference_numerators(
            q_codes,
            keys,
            values,
            None,
            filled,
            q_params[..., None],
            attention.keys,
            attention.values,
            attention.key_weights,
            attention.sinks,
            softmax_scale,
            weight_bits,
            torch.float32,
        )  # (B, 1, H, D)
    else:
        q_scale, q_zero = q_params[:, 0]
        k_scale, k_zero = k_params[:, 0]
        v_scale, v_zero = attention.values[:, 0]
        weight_scale = attention.weight_scale
        scales = torch.stack(
            (q_scale * k_scale, q_scale * 0 + weight_scale, v_scale * weight_scale)
        )
        w_zero = torch.full_like(q_zero, -(2 ** (weight_bits - 1)))
        zero_points = torch.stack((q_zero, k_zero, w_zero, v_zero)).int()
        average = reference_attention(
            q_codes,
            keys,
            values,
            None,
            filled,
            scales,
            zero_points,
            softmax_scale,
            weight_bits,
            torch.float32,
        )  # (B, 1, H, D)
    scale, zero_point = entry_at(attention.output, position)[:, None]  # (1,) each
    codes = static_codes(average.reshape(rows, -1), scale, zero_point, out_bits)  # (B, H * D)
    return codes, codes.sum(dim=1, dtype=torch.int32)


@lru_cache
def compile_kernel(constants: tuple[tuple[str, int], ...], device: int) -> nvrtc.CudaKernel:
    """The kernel with these macros for a device.

    Raises:
        CompilerMissing: it cannot be compiled here.
    """
    major, minor = torch.cuda.get_device_capability(device)
    code = nvrtc.compile_source(SOURCE.read_text(), dict(constants), f"sm_{major}{minor}")
    with torch.cuda.device(device):
        return nvrtc.CudaKernel(code, "attend_codes")


def kernel_constants(
    attention: StepAttention, dtype: torch.dtype, visible: int, early: bool
) -> tuple[tuple[str, int], ...]:
    """The macros of `attention.cu` for a cache of which `visible` slots may be filled."""
    names = ("QUERY_BITS", "KEY_BITS", "WEIGHT_BITS", "VALUE_BITS", "OUT_BITS")
    constants = {
        "CHANNELS": attention.channels,
        "HEADS": attention.heads,
        "ROUNDS": -(-visible // KEYS_A_ROUND),
        "HALF_INPUT": int(dtype == torch.bfloat16),
        "NUMERATORS": int(attention.weight_scale is None),
        "EARLY_NEXT": int(early),
        **dict(zip(names, attention.bits)),
    }
    return tuple(constants.items())


def attend_codes(
    attention: StepAttention,
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    code_sums: Tensor,
    visible: int,
    early: bool = False,
) -> Tensor:
    """Codes (B, H * D) of the average of values, for the product that reads it, on a CUDA device.

    Args:
        qkv: (B, 3 * H * D), float32 or bfloat16.
        keys, values: the cache (B, H, S, D) int8; the step's own are stored at `position` (1,).
        code_sums: zeros (B,) int32, to which the sums of the codes are added.
        visible: the first so many slots may be filled.
        early: let the next kernel be launched before this one has ended. This one is not: beside
            the tiles of the product ahead it would get too little of the L1 cache, from which it
            reads its keys.
    """
    rows = len(qkv)
    codes = torch.empty(rows, qkv.shape[1] // 3, dtype=torch.int8, device=qkv.device)
    constants = kernel_constants(attention, qkv.dtype, visible, early)
    kernel = compile_kernel(constants, qkv.device.index or 0)
    arguments = [
        qkv,
        keys,
        values,
        codes,
        code_sums,
        position,
        *attention.query_norm,
        *attention.key_norm,
        attention.queries,
        attention.keys,
        attention.values,
        attention.key_weights,
        attention.output,
        attention.queries.shape[2],
        attention.keys.shape[2],
        attention.output.shape[1],
        attention.sinks,
        rows,
        keys.shape[2],
        attention.weight_scale or 1.0,
        attention.channels**-0.5,
    ]
    blocks = -(-rows * attention.heads // WARPS)
    kernel.launch(blocks, 32 * WARPS, arguments)
    return codes
