"""Attention whose two products multiply integers, as an operator of PyTorch,
`ar_ptq::int8_attention`.

Queries q, keys k, weights w and values v have signed codes, and one scale and zero point each, as
in `codes.py`:

    scores  = (q_scale k_scale) sum (q - q_zero)(k - k_zero) scale + mask      over the channels
    p       = softmax(scores)                                    over the row of keys, in float32
    w       = clip(round(p / w_scale) + w_zero)                  the weight's static quantizer
    average = (w_scale v_scale) sum (w - w_zero)(v - v_zero)     over the keys

The sums are int32 and exact, what follows them is float32. Keys and values are codes from the
moment they are made, in the KV cache too: one byte each.

An online softmax (flash attention) cannot give this: it adds up unnormalised weights tile by tile
and divides at the end, but the static quantizer rounds the normalised weight, which is not known
before the row's last key was seen. So on CUDA one kernel goes over the keys twice
(`attention_kernel.py`). Everywhere else `reference_attention` runs, whose products are exact in
float64; PyTorch has no batched integer product to offer for CPUs.

Attention is in integers if all four operands have static integer quantizers, per tensor. If it
stays simulated, as with dynamic ranges or log-sqrt2 weights, `simulation_reason` says why. A
rotation of queries and keys that runs online does so in front of their quantizers, as in
simulation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq.int8.codes import InputCodes, input_codes
from ptq.int8.fixed import Fixed
from ptq.int8.ops import static_codes
from ptq.modules import QuantMatMul
from ptq.numbers.quantizers import DynamicQuantizer, Passthrough
from ptq.spec import ConfigError
from ptq.staq.positions import TableQuantizer
from ptq.transform import Rotation

# with at most so many channels of a head and keys of a row no sum of 8-bit codes leaves 32 bits
MAX_CHANNELS = 128
MAX_KEYS = 2304


def reference_attention(
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
    """What `int8_attention` computes, in plain PyTorch.

    Integers are in float64, where they are below 2^53 and so exact.
    """
    score_scale, weight_scale, value_scale = scales
    q_zero, k_zero, w_zero, v_zero = zero_points.double()
    integer_scores = (q.double() - q_zero) @ (k.double() - k_zero).mT  # (B, H, T, S)
    scores = integer_scores.float() * score_scale * scale  # (B, H, T, S)
    if mask is not None:
        scores = scores + mask
    absent = None  # (S,)
    if filled is not None:
        absent = torch.arange(k.shape[2], device=k.device) >= filled
        scores = scores.masked_fill(absent, float("-inf"))
    probabilities = scores.softmax(dim=-1)  # (B, H, T, S)
    codes = static_codes(probabilities, weight_scale[None], zero_points[2:3].float(), bits)
    weights = codes.double() - w_zero  # (B, H, T, S)
    if absent is not None:
        weights = weights.masked_fill(absent, 0)  # probability 0 need not be rounded to weight 0
    average = (weights @ (v.double() - v_zero)).float() * value_scale  # (B, H, T, D)
    return average.transpose(1, 2).to(dtype).contiguous()


@torch.library.custom_op("ar_ptq::int8_attention", mutates_args=())
def int8_attention(
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
    """The average of values (B, T, H, D) of type `dtype`.

    Args:
        q, k, v: codes int8 (B, H, T, D), (B, H, S, D) and (B, H, S, D), D up to `MAX_CHANNELS`, S
            up to `MAX_KEYS`.
        mask: additive, broadcastable to (B, H, T, S), or None.
        filled: (1,), how many keys there are; the others are as if not given. None: all are.
        scales: (3,) float32: q_scale k_scale, w_scale, w_scale v_scale.
        zero_points: (4,) int32: of q, k, w, v.
        scale: of the scores.
        bits: of the weights.
    """
    return reference_attention(q, k, v, mask, filled, scales, zero_points, scale, bits, dtype)


@int8_attention.register_kernel("cuda")
def _attention_on_cuda(*operands):
    from ptq.int8 import attention_kernel  # Triton is there with CUDA only

    return attention_kernel.launch_attention(*operands)


@int8_attention.register_fake
def _attention_outline(q, *operands):
    batch, heads, tokens, channels = q.shape
    return q.new_empty(batch, tokens, heads, channels, dtype=operands[-1])


class Encoder(Fixed):
    """Makes codes int8 of an operand (..., D), with a static quantizer per tensor.

    A `rotation` comes in front of the quantizer.
    """

    def __init__(self, codes: InputCodes, rotation: Rotation | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", codes.scale)
        self.register_buffer("zero_point", codes.zero_point.float())
        self.bits = codes.bits
        self.rotation = rotation

    def forward(self, x: Tensor) -> Tensor:
        if self.rotation is not None:
            x = self.rotation(x.float())
        return static_codes(x, self.scale, self.zero_point, self.bits)


class Int8Values(Fixed):
    """In the place of the product of weights with values: makes the values' codes.

    `Int8Scores`, in the place of the other product, does the rest.
    """

    fused = False
    attention = None

    def __init__(self, values: InputCodes) -> None:
        super().__init__()
        self.values = Encoder(values)

    def prepare(self, v: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.values(v)


class Int8Scores(Fixed):
    """In the place of the product of queries with keys: all of attention, and the keys' codes."""

    fused = False

    def __init__(
        self,
        queries: InputCodes,
        keys: InputCodes,
        weights: InputCodes,
        values: InputCodes,
        rotation: Rotation | None = None,
    ) -> None:
        super().__init__()
        self.queries = Encoder(queries, rotation)
        self.keys = Encoder(keys, rotation)
        self.bits = weights.bits
        q_scale = queries.scale.double()
        k_scale = keys.scale.double()
        w_scale = weights.scale.double()
        v_scale = values.scale.double()
        scales = torch.cat((q_scale * k_scale, w_scale, w_scale * v_scale))  # (3,)
        self.register_buffer("scales", scales.float())
        zero_points = (queries.zero_point, keys.zero_point, weights.zero_point, values.zero_point)
        self.register_buffer("zero_points", torch.cat(zero_points))  # (4,)

    def prepare(self, k: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.keys(k)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        mask: Tensor | None,
        filled: Tensor | None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """softmax(scale * q k^T + mask) v (B, H, T, D).

        Args:
            q: (B, H, T, D), before it is rounded.
            k, v: codes (B, H, S, D).
            mask: additive, broadcastable to (B, H, T, S), or None.
            filled: (1,), how many keys there are, or None if all are.
            positions: of the queries, which all share their parameters here.

        Raises:
            ValueError: there are too many channels or keys.
        """
        channels = q.shape[3]
        keys = k.shape[2]
        if channels > MAX_CHANNELS or keys > MAX_KEYS:
            raise ValueError(
                f"attention: {channels} channels and {keys} keys, "
                f"at most {MAX_CHANNELS} and {MAX_KEYS}"
            )
        average = int8_attention(
            self.queries(q),
            k,
            v,
            mask,
            filled,
            self.scales,
            self.zero_points,
            scale,
            self.bits,
            q.dtype,
        )
        return average.transpose(1, 2)


def attention_quantizers(qk: QuantMatMul, pv: QuantMatMul) -> dict[str, nn.Module]:
    """The four quantizers of attention."""
    return {"queries": qk.a, "keys": qk.b, "weights": pv.a, "values": pv.b}


def simulation_reason(qk: QuantMatMul, pv: QuantMatMul) -> str | None:
    """Why attention stays simulated, in one line; None if it can be in integers."""
    for name, quantizer in attention_quantizers(qk, pv).items():
        if isinstance(quantizer, Passthrough):
            return f"the {name} are not quantized"
        if isinstance(quantizer, DynamicQuantizer):
            return (
                f"the {name} have dynamic ranges: every token or row would have a scale and zero "
                "point of its own"
            )
        if isinstance(quantizer, TableQuantizer):
            return f"the {name} have parameters by head, allowed with method.softmax=numerators"
        try:
            codes = input_codes(quantizer, name)
        except ConfigError as error:
            return str(error)
        if len(codes.scale) > 1:
            return f"the {name} have parameters by token"
    score_bound = MAX_CHANNELS * _largest_code(qk.a) * _largest_code(qk.b)
    average_bound = MAX_KEYS * _largest_code(pv.a) * _largest_code(pv.b)
    if max(score_bound, average_bound) >= 2**31:
        return "zero points lie so far off that sums could leave 32 bits"
    return None


def _largest_code(quantizer: nn.Module) -> float:
    """The largest magnitude of a code without its zero point."""
    zero_point = float(quantizer.zero_point)
    return max(abs(zero_point), abs(quantizer.spec.levels - 1 - zero_point))


def attention_modules(qk: QuantMatMul, pv: QuantMatMul) -> tuple[nn.Module, nn.Module]:
    """What takes the places of the two products."""
    codes: dict[str, InputCodes] = {}
    for operand, quantizer in attention_quantizers(qk, pv).items():
        codes[operand] = input_codes(quantizer, operand)
    return Int8Scores(**codes, rotation=qk.rotation), Int8Values(codes["values"])
