"""Attention whose two products multiply integers, as an operator of PyTorch,
`ar_ptq::int8_attention`.

    s = (sq sk) sum (cq - zq)(ck - zk) scale + mask        over the channels; int32, exact; then
    float32 p = softmax(s)                                         over the whole row of keys, in
    float32 cw = clip(round(p / sw) + zw)                          the weight's static quantizer o =
    (sw sv) sum (cw - zw)(cv - zv)                     over the keys; int32, exact; then float32

with signed codes c, scales and zero points as in `codes.py`, one per tensor, of queries q, keys k,
weights w, values v.
Keys and values are codes from the moment they are made, in the KV cache too: one byte each.

An online softmax (flash attention) cannot give this: it adds up unnormalised weights tile by tile
and divides at the end, but the static quantizer rounds the normalised weight, which is not known
before the row's last key was seen. So on CUDA one kernel goes over the keys twice
(`attention_kernel.py`). Everywhere else `reference_attention` runs, whose products are exact in float64;
PyTorch has no batched integer product to offer for CPUs.

Attention is in integers if all four operands have static integer quantizers, per tensor; if it
stays simulated, as with dynamic ranges or log-sqrt2 weights, `simulation_reason` says why. A rotation of
queries and keys that runs online does so in front of their quantizers, as in simulation.
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
from ptq.transform import Rotation

# of a head, and of a row: so many at most, for which no sum leaves 32 bits
CHANNELS = 128
KEYS = 2304


def reference_attention(
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
    """What `int8_attention` computes, in plain PyTorch: integers in float64, below 2^53 and so
    exact."""
    zq, zk, zw, zv = zeros.double()
    scores = ((q.double() - zq) @ (k.double() - zk).mT).float() * scales[0] * scale
    if mask is not None:
        scores = scores + mask
    behind = None if filled is None else torch.arange(k.shape[2], device=k.device) >= filled
    if behind is not None:
        scores = scores.masked_fill(behind, float("-inf"))
    weights = (
        static_codes(scores.softmax(dim=-1), scales[1:2], zeros[2:3].float(), bits).double() - zw
    )
    if behind is not None:
        weights = weights.masked_fill(behind, 0)
    out = (weights @ (v.double() - zv)).float() * scales[2]
    return out.transpose(1, 2).to(dtype).contiguous()


@torch.library.custom_op("ar_ptq::int8_attention", mutates_args=())
def int8_attention(
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
    """The average of values (B, T, H, D) of type `dtype`.

    Args:
        q, k, v: codes int8 (B, H, T, D), (B, H, S, D) and (B, H, S, D); D up to `CHANNELS`, S up to
            `KEYS`.
        mask: additive, broadcastable to (B, H, T, S), or None.
        filled: (1,), how many keys there are, the others are as if not given; or None, if all are.
        scales: sq sk, sw, sw sv, float32. zeros: zq, zk, zw, zv, int32. scale: of the scores. bits:
            of the weights.
    """
    return reference_attention(q, k, v, mask, filled, scales, zeros, scale, bits, dtype)


@int8_attention.register_kernel("cuda")
def _(q, k, v, mask, filled, scales, zeros, scale, bits, dtype):
    from ptq.int8 import attention_kernel

    return attention_kernel.launch_attention(
        q, k, v, mask, filled, scales, zeros, scale, bits, dtype
    )


@int8_attention.register_fake
def _(q, k, v, mask, filled, scales, zeros, scale, bits, dtype):
    batch, heads, tokens, channels = q.shape
    return q.new_empty(batch, tokens, heads, channels, dtype=dtype)


class Encoder(Fixed):
    """Codes int8 of an operand (..., D), with a static quantizer per tensor; `rotation` comes
    first."""

    def __init__(self, codes: InputCodes, rotation: Rotation | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", codes.scale)
        self.register_buffer("zero", codes.zero.float())
        self.bits = codes.bits
        self.rotation = rotation

    def forward(self, x: Tensor) -> Tensor:
        return static_codes(
            x if self.rotation is None else self.rotation(x.float()),
            self.scale,
            self.zero,
            self.bits,
        )


class Int8Values(Fixed):
    """In the place of the product of weights with values: makes the values' codes; the other place
    does the rest."""

    fused = False
    attention = None

    def __init__(self, values: InputCodes) -> None:
        super().__init__()
        self.values = Encoder(values)

    def prepare(self, v: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.values(v)


class Int8Scores(Fixed):
    """In the place of the product of queries with keys: makes the keys' codes and computes all of
    attention."""

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
        sq, sk, sw, sv = (codes.scale.double() for codes in (queries, keys, weights, values))
        self.register_buffer("scales", torch.cat((sq * sk, sw, sw * sv)).float())
        self.register_buffer(
            "zeros", torch.cat((queries.zero, keys.zero, weights.zero, values.zero))
        )

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
    ) -> Tensor:
        """softmax(scale * q k^T + mask) v (B, H, T, D) of queries (B, H, T, D) and the codes of
        keys and values.

        Raises:
            ValueError: there are too many channels or keys.
        """
        if q.shape[3] > CHANNELS or k.shape[2] > KEYS:
            raise ValueError(
                f"attention: {q.shape[3]} channels and {k.shape[2]} keys, at most {CHANNELS} and {KEYS}"
            )
        out = int8_attention(
            self.queries(q), k, v, mask, filled, self.scales, self.zeros, scale, self.bits, q.dtype
        )
        return out.transpose(1, 2)


def attention_quantizers(qk: QuantMatMul, pv: QuantMatMul) -> dict[str, nn.Module]:
    """The four quantizers of attention."""
    return {"queries": qk.a, "keys": qk.b, "weights": pv.a, "values": pv.b}


def simulation_reason(qk: QuantMatMul, pv: QuantMatMul) -> str | None:
    """Why attention stays simulated, in one line; None if it can be in integers."""
    for name, quantizer in attention_quantizers(qk, pv).items():
        if isinstance(quantizer, Passthrough):
            return f"the {name} are not quantized"
        if isinstance(quantizer, DynamicQuantizer):
            return f"the {name} have dynamic ranges: every token or row would have a scale and zero point of its own"
        try:
            if len(input_codes(quantizer, name).scale) > 1:
                return f"the {name} have parameters by token"
        except ConfigError as error:
            return str(error)
    for n, pair in ((CHANNELS, (qk.a, qk.b)), (KEYS, (pv.a, pv.b))):
        sizes = [
            max(abs(float(p.zero_point)), abs(p.spec.levels - 1 - float(p.zero_point)))
            for p in pair
        ]
        if n * sizes[0] * sizes[1] >= 2**31:
            return "zero points lie so far off that sums could leave 32 bits"
    return None


def find_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Attention in integers, by the names of the products `qk` and `pv` that it replaces, wherever
    that can be."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        qk = getattr(module, "qk", None)
        pv = getattr(module, "pv", None)
        if (
            isinstance(qk, QuantMatMul)
            and isinstance(pv, QuantMatMul)
            and simulation_reason(qk, pv) is None
        ):
            codes = [
                input_codes(quantizer, what)
                for what, quantizer in attention_quantizers(qk, pv).items()
            ]
            found |= {
                f"{name}.qk": Int8Scores(*codes, rotation=qk.rotation),
                f"{name}.pv": Int8Values(codes[-1]),
            }
    return found
