"""The two operations that quantization replaces, and what several families build from them: above
all, attention.

A model is written once, in full precision, with `Linear` and `MatMul` wherever quantization may
sit. `ptq` swaps those modules for quantized ones of the same call signature, so no model file knows
about quantization. Both take `positions`, the absolute positions (T,) of the tokens in the full
sequence: static token-wise quantization looks its parameters up by position, and nothing has to
guess the position from the length of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# kernel(q, k, v, scale, mask, filled, positions) -> the average of values (B, H, T, D)
# k and v come as `MatMul.prepare` left them; `filled` (1,) is how many of the S tokens are there,
# or None if all are
Attention = Callable[
    [Tensor, Tensor, Tensor, float, Tensor | None, Tensor | None, Tensor | None], Tensor
]
CAUSAL = "causal"  # stands for `causal_mask` where a kernel needs no tensor
Mask = Tensor | str | None  # additive, or `CAUSAL`
# run(x (B, 1, C), tables of AdaLN, position (1,), caches, head) -> logits (B, 1, V): a faster way
# through a decoding step of one token a row; head(x, None, position, table) is the model's own
StepRunner = Callable[[Tensor, Sequence[Tensor], Tensor, Sequence["KVCache"], Callable], Tensor]


class Linear(nn.Linear):
    """`nn.Linear` that accepts (and ignores) token positions."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class MatMul(nn.Module):
    """The product of two activations, `a @ b`.

    Attributes:
        fused: whether the product may be computed inside `scaled_dot_product_attention`; a
            quantized product may not.
        attention: of the product of queries with keys: computes all of attention, the other product
            included (`choose_kernel`).
    """

    fused = True
    attention: Attention | None = None

    def prepare(self, b: Tensor, positions: Tensor | None = None) -> Tensor:
        """Applied once to the second operand, before it enters a KV cache: a quantized product then
        need not quantize the whole cache again in every decoding step."""
        return b

    def forward(self, a: Tensor, b: Tensor, positions: Tensor | None = None) -> Tensor:
        return a @ b


class Mlp(nn.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x, positions)), positions)


class Modulation(nn.Sequential):
    """SiLU and a linear layer on the condition: the AdaLN projection, (B, T, C) -> (B, T, n * C).

    One vector (B, 1, C) may serve all tokens of a call; the linear is then given the position of
    the first of them.
    """

    def __init__(self, dim: int, chunks: int) -> None:
        super().__init__(nn.SiLU(), Linear(dim, chunks * dim))

    def forward(self, c: Tensor, positions: Tensor) -> Tensor:
        return self.project(self[0](c), positions)

    def project(self, activated: Tensor, positions: Tensor) -> Tensor:
        """The same of conditions after SiLU, which projections of many blocks may share."""
        return self[1](activated, positions[: activated.shape[1]])


def look_up_modulation(table: Tensor, positions: Tensor, batch: int) -> Tensor:
    """What an AdaLN projection gives at `positions` (T,), (batch, T, n * C), from a table.

    Args:
        table: (R, S, n * C), made ahead of the step. Row i of the batch reads row min(i, R - 1), so
            that all rows without a class share the last one; position p reads column p mod S. A
            single column serves all tokens: (batch, 1, n * C).
    """
    rows, columns, _ = table.shape
    if columns == 1 and rows == batch:
        return table
    row = torch.arange(batch, device=table.device).clamp(max=rows - 1)  # (batch,)
    if columns == 1:
        return table[row]
    return table[row[:, None], (positions % columns)[None]]


def chunk_rows(chunks: tuple[str, ...], name: str, width: int) -> tuple[int, int]:
    """First and end row of the chunk called `name` of a projection whose outputs are `chunks`, each
    `width` rows high."""
    first = chunks.index(name) * width
    return first, first + width


class KVCache:
    """Keys and values of one attention layer, preallocated for `length` tokens: two tensors
    (B, H, length, D).

    They are kept in the number format that they come in: codes of one byte where the products are
    in integers.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.filled = 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(
        self, k: Tensor, v: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Store the new tokens k, v (B, H, T, D); return all tokens so far, (B, H, S, D) each."""
        if self.k is None:
            batch, heads, _, channels = k.shape
            self.k = k.new_empty(batch, heads, self.length, channels)
            self.v = v.new_empty(batch, heads, self.length, channels)
        end = self.filled + k.shape[2]
        self.k[:, :, self.filled : end] = k
        self.v[:, :, self.filled : end] = v
        self.filled = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def slots(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """Where a kernel may write keys and values like k, v to their positions by itself, (B, H,
        S, D) each, and find them with `seen`; None: they are to be appended."""
        return None

    def mask(self, mask: Tensor | None, q: Tensor, positions: Tensor | None) -> Tensor | None:
        """The additive mask over what `append` returned, given that over this call's tokens."""
        return mask

    def count(self, positions: Tensor | None) -> Tensor | None:
        """How many of the tokens that `append` returned were ever stored (1,); None if all were."""
        return None

    def attention(self, q: Tensor) -> Attention | None:
        """A kernel that is faster over this cache than the library's; None if there is none."""
        return None


def choose_kernel(q: Tensor, qk: MatMul, pv: MatMul, cache: KVCache | None) -> Attention | None:
    """The special kernel that computes attention, or None: the library's, or the two products.

    A quantized product comes with its own; a cache may have one for products that may be fused.
    """
    if qk.attention is not None:
        return qk.attention
    if cache is not None and qk.fused and pv.fused:
        return cache.attention(q)
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk: MatMul,
    pv: MatMul,
    scale: float,
    mask: Mask = None,
    positions: Tensor | None = None,
    cache: KVCache | None = None,
) -> Tensor:
    """softmax(scale * q k^T + mask) v for q, k, v (B, H, T, D); returns (B, T, H * D).

    Args:
        qk, pv: the two products; they run fused unless one of them says that it cannot be.
        mask: additive, broadcastable to (B, H, T, S); or "causal", which fused products need no
            tensor for.
        cache: extends k and v to the S tokens seen so far.
    """
    k = qk.prepare(k, positions)
    v = pv.prepare(v, positions)
    kernel = choose_kernel(q, qk, pv, cache)
    fused = kernel is None and qk.fused and pv.fused
    is_causal = mask == CAUSAL if isinstance(mask, str) else False
    if is_causal and (cache is not None or not fused):
        is_causal = False
        mask = causal_mask(q.shape[2], q.device).to(q.dtype)

    filled = None
    if cache is not None:
        k, v = cache.append(k, v, positions)  # (B, H, S, D) each
        filled = cache.count(positions)
        # a kernel without a mask learns from `filled` all that one would tell it
        if kernel is None or mask is not None:
            mask = cache.mask(mask, q, positions)

    if kernel is not None:
        out = kernel(q, k, v, scale, mask, filled, positions)  # (B, H, T, D)
    elif fused:
        additive = None if is_causal else mask
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=additive, is_causal=is_causal, scale=scale
        )  # (B, H, T, D)
    else:
        scores = qk(q, k.transpose(-2, -1), positions) * scale  # (B, H, T, S)
        if mask is not None:
            scores = scores + mask
        out = pv(scores.softmax(dim=-1), v, positions)  # (B, H, T, D)
    return out.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H * D)


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """Additive causal mask (length, length): 0 on and below the diagonal, -inf above."""
    return torch.full((length, length), float("-inf"), device=device).triu_(1)
