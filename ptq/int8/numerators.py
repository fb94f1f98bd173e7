"""Attention in integers whose weights are rounded numerators (`staq/numerators.py`), with
parameters of queries and keys per head and position, as an operator of PyTorch,
`ar_ptq::int8_numerators`.

    s = sq_t sk_j scale sum (cq - zq_t)(ck - zk_j) + mask - log r_j      over the channels; int32
    c = round((2^b - 1) exp(s - max_j s))                                the numerators' codes
    o = sv sum_j c_j (cv_j - zv) / sum_j c_j r_j                         over the keys; int32

per head; cq, ck, cv: signed codes (`codes.py`), with scales and zero points of the head and of the
position of query t and key j. r_j is the key weight of the head at the sinks, the first keys, and 1
elsewhere; the values of sinks are multiplied by it before they become codes.

The numerators need no scale and no zero point, and nothing of a row but its maximum. So the first
of the kernel's two passes over the keys (`numerator_kernel.py`) takes no exponential, unlike that
for normalised weights (`attention_kernel.py`). A key's zero point differs from key to key, so its
correction -zk_j sum (cq - zq_t), which a softmax does not see where all keys share one, stays in:
an outer product of two vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq.int8 import ops
from ptq.int8.attention import MAX_CHANNELS, MAX_KEYS
from ptq.int8.codes import OperandCodes, operand_codes
from ptq.int8.fixed import Fixed
from ptq.modules import QuantMatMul
from ptq.numbers.quantizers import StaticQuantizer
from ptq.spec import ConfigError
from ptq.staq.numerators import NumeratorQuantizer, key_weights_of
from ptq.staq.positions import TableQuantizer
from ptq.transform import Rotation


def reference_numerators(
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
    """What `int8_numerators` computes, in plain PyTorch: integers in float64, below 2^53 and so
    exact."""
    count = k.shape[2]
    columns = torch.arange(count, device=k.device).clamp(max=keys.shape[2] - 1)
    k_scale, k_zero = keys[:, :, columns]  # (H, S) each
    q_scale, q_zero = queries  # (H, T) each
    v_scale, v_zero = values[:, :, None, None]  # (H, 1, 1) each
    products = (q.double() - q_zero[..., None]) @ (k.double() - k_zero[..., None]).mT
    scores = products.float() * (q_scale * scale)[..., None] * k_scale[:, None]  # (B, H, T, S)
    if mask is not None:
        scores = scores + mask
    weights = key_weights_of(key_weights, sinks, count)[:, None]  # (H, 1, S)
    scores = scores - weights.log()
    if filled is not None:
        absent = torch.arange(count, device=k.device) >= filled
        scores = scores.masked_fill(absent, float("-inf"))
    largest = scores.amax(dim=-1, keepdim=True)
    codes = torch.round((scores - largest).exp() * (2**bits - 1))
    total = (codes * weights).sum(dim=-1, keepdim=True)
    out = (codes.double() @ (v.double() - v_zero)).float() * v_scale / total
    return out.transpose(1, 2).to(dtype).contiguous()


@torch.library.custom_op("ar_ptq::int8_numerators", mutates_args=())
def int8_numerators(
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
    """The average of values (B, T, H, D) of type `dtype`.

    Args:
        q, k, v: codes int8 (B, H, T, D), (B, H, S, D) and (B, H, S, D); D up to `MAX_CHANNELS`, S
            up to `MAX_KEYS`.
        mask: additive, broadcastable to (B, H, T, S), or None.
        filled: (1,), how many keys there are, the others are as if not given; or None, if all are.
        queries: scale and zero point of every query, float32 (2, H, T).
        keys: of every position, float32 (2, H, P); the last one is that of all from there on.
        values: float32 (2, H). key_weights: r of the first `sinks` keys, float32 (H,).
        scale: of the scores. bits: of the numerators.
    """
    return reference_numerators(
        q, k, v, mask, filled, queries, keys, values, key_weights, sinks, scale, bits, dtype
    )


@int8_numerators.register_kernel("cuda")
def _(q, k, v, mask, filled, queries, keys, values, key_weights, sinks, scale, bits, dtype):
    from ptq.int8 import numerator_kernel

    return numerator_kernel.launch_numerators(
        q, k, v, mask, filled, queries, keys, values, key_weights, sinks, scale, bits, dtype
    )


@int8_numerators.register_fake
def _(q, k, v, mask, filled, queries, keys, values, key_weights, sinks, scale, bits, dtype):
    batch, heads, tokens, channels = q.shape
    return q.new_empty(batch, tokens, heads, channels, dtype=dtype)


class TableEncoder(Fixed):
    """Codes int8 of an operand (B, H, T, D) by the head and position of every token.

    Args:
        rotation: comes first. key_weights: factor (H,) on the first `sinks` positions, comes next.
    """

    def __init__(
        self,
        codes: OperandCodes,
        rotation: Rotation | None = None,
        key_weights: Tensor | None = None,
        sinks: int = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("table", codes.by_position())  # (2, H, P)
        self.register_buffer("key_weights", key_weights)
        self.bits = codes.bits
        self.sinks = sinks
        self.rotation = rotation

    def table_for(self, heads: int) -> Tensor:
        """Scale and zero point (2, H, P) for so many heads, which may share one row."""
        return self.table.expand(-1, heads, -1).contiguous()

    def params_at(self, positions: Tensor | None, heads: int) -> Tensor:
        """Scale and zero point of tokens at positions (T,), float32 (2, H, T), or (2, H, 1) if all
        share them."""
        table = self.table_for(heads)
        if table.shape[2] == 1:
            return table
        rows = table.flatten(0, 1)  # (2 H, P)
        return ops.token_params(rows, positions).view(2, heads, -1)

    def forward(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """The codes, and the parameters that they were made with."""
        if self.rotation is not None:
            x = self.rotation(x.float())
        if self.key_weights is not None:
            is_sink = (positions < self.sinks)[:, None]  # (T, 1)
            x = x.float() * torch.where(is_sink, self.key_weights[:, None, None], 1)
        params = self.params_at(positions, x.shape[1])
        return ops.static_codes(x, *params, self.bits), params


class Int8NumeratorValues(Fixed):
    """In the place of the product of weights with values: makes the values' codes; the other place
    does the rest."""

    fused = False
    attention = None

    def __init__(self, values: TableEncoder) -> None:
        super().__init__()
        self.values = values

    def prepare(self, v: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.values(v, positions)[0]


class Int8NumeratorScores(Fixed):
    """In the place of the product of queries with keys: makes the keys' codes and computes all of
    attention.

    Args:
        queries, keys, values: make codes of these. bits: of the numerators.
        key_weights: (H,) of the first `sinks` keys, or None.
    """

    fused = False

    def __init__(
        self,
        queries: TableEncoder,
        keys: TableEncoder,
        values: TableEncoder,
        bits: int,
        key_weights: Tensor | None,
        sinks: int,
    ) -> None:
        super().__init__()
        self.queries = queries
        self.keys = keys
        self.register_buffer("value_table", values.table[:, :, 0].clone())  # (2, H)
        self.register_buffer("key_weights", key_weights)
        self.bits = bits
        self.sinks = sinks

    def prepare(self, k: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.keys(k, positions)[0]

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
        """softmax(scale * q k^T + mask) v (B, H, T, D) of queries (B, H, T, D) at positions (T,)
        and the codes of keys and values.

        Raises:
            ValueError: there are too many channels or keys.
        """
        if q.shape[3] > MAX_CHANNELS or k.shape[2] > MAX_KEYS:
            raise ValueError(
                f"attention: {q.shape[3]} channels and {k.shape[2]} keys, at most "
                f"{MAX_CHANNELS} and {MAX_KEYS}"
            )
        heads = q.shape[1]
        codes, params = self.queries(q, positions)
        weights = self.key_weights
        if weights is None:
            weights = params.new_ones(heads)
        out = int8_numerators(
            codes,
            k,
            v,
            mask,
            filled,
            params.expand(-1, -1, q.shape[2]).contiguous(),
            self.keys.table_for(heads),
            self.value_table.expand(-1, heads).contiguous(),
            weights,
            self.sinks if self.key_weights is not None else 0,
            scale,
            self.bits,
            q.dtype,
        )
        return out.transpose(1, 2)


def numerator_reason(qk: QuantMatMul, pv: QuantMatMul) -> str | None:
    """Why attention with numerators stays simulated, in one line; None if it can be in integers."""
    operands = {"queries": qk.a, "keys": qk.b, "values": pv.b}
    for name, quantizer in operands.items():
        if not isinstance(quantizer, StaticQuantizer | TableQuantizer):
            return f"the {name} have no static parameters"
        try:
            operand_codes(quantizer, name)
        except ConfigError as error:
            return str(error)
    if pv.b.scale.shape[-1] > 1:
        return "the values have parameters by token"
    spans = [span_of(quantizer) for quantizer in operands.values()]
    largest = pv.a.levels * spans[2] * MAX_KEYS
    if MAX_CHANNELS * spans[0] * spans[1] >= 2**31 or largest >= 2**31:
        return "zero points lie so far off that sums could leave 32 bits"
    return None


def span_of(quantizer: nn.Module) -> float:
    """The largest |code - zero point|."""
    zero = quantizer.zero_point
    return float(torch.maximum(zero.abs(), (quantizer.spec.levels - 1 - zero).abs()).max())


def numerator_modules(qk: QuantMatMul, pv: QuantMatMul) -> tuple[nn.Module, nn.Module]:
    """What takes the places of the two products."""
    weights: NumeratorQuantizer = pv.a
    queries = TableEncoder(operand_codes(qk.a, "queries"), qk.rotation)
    keys = TableEncoder(operand_codes(qk.b, "keys"), qk.rotation)
    scaled = getattr(pv.b, "key_weights", None)
    values = TableEncoder(operand_codes(pv.b, "values"), None, scaled, weights.sinks)
    bits = weights.levels.bit_length() - 1
    scores = Int8NumeratorScores(queries, keys, values, bits, weights.key_weights, weights.sinks)
    return scores, Int8NumeratorValues(values)
