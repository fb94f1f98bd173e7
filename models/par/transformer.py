"""The PAR transformer: a LLaMA-style decoder that predicts a token of each image region per step.

Numerics and state-dict keys follow YuqingWang1029/PAR `autoregressive/models/gpt.py`,
class-conditional.

The grid of S x S tokens is cut into sub x sub regions, sub = floor(sqrt(ar)), and read cell by
cell: all regions' first cells, then all their second cells, and so on (`Layout`).

Sequence positions, with `spe` special tokens and L image tokens:
    0                        the class
    1 .. ar                  tokens 0 .. ar - 1
    ar + 1 .. ar + spe       special tokens
    ar + spe + 1 .. L + spe  tokens ar .. L - 1
The first `ar` tokens come one at a time; from position `ar` on, spe + 1 positions form a group, see
each other, and predict the next spe + 1 tokens at once. The special tokens fill the first group up,
whose only real token is token ar - 1. With this layout the output at position p predicts token p,
and a decoder feeds positions 0 .. L - 1.

Kept as released: class and special tokens have no place in the grid, and their rotation is cos =
sin = 0, so rotary embedding sets their queries and keys to zero instead of leaving them alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import KVCache, Linear, Mask, MatMul, attend

QKV_CHUNKS = ("q", "k", "v")  # outputs of wqkv, in the order of their rows


@dataclass(frozen=True)
class Layout:
    """Where tokens stand in the sequence and in the image.

    Attributes:
        side: tokens a side, S.
        ar: leading tokens that come one at a time.
        spe: special tokens.
    """

    side: int
    ar: int
    spe: int

    @property
    def tokens(self) -> int:
        """Image tokens, L."""
        return self.side**2

    @property
    def group(self) -> int:
        """Tokens predicted at once."""
        return self.spe + 1

    def token_at(self, positions: Tensor) -> Tensor:
        """Index (T,) of the image token at each position (T,); -1 for the class token and special
        tokens."""
        late = positions > self.ar + self.spe
        token = torch.where(late, positions - self.group, positions - 1)
        return torch.where(late | (positions <= self.ar), token, -1)

    def cells(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column (T,) of image tokens (T,), numbered in generation order."""
        sub = math.isqrt(self.ar)
        cells = self.side // sub  # per side of a region
        place = tokens // sub**2  # cell within its region
        region = tokens % sub**2
        return region // sub * cells + place // cells, region % sub * cells + place % cells

    def raster_index(self, device: torch.device | None = None) -> Tensor:
        """Raster index (L,) of every token in generation order."""
        rows, columns = self.cells(torch.arange(self.tokens, device=device))
        return rows * self.side + columns

    def to_raster(self, tokens: Tensor) -> Tensor:
        """Generation order to raster order, (B, L)."""
        return tokens[:, self.raster_index(tokens.device).argsort()]  # the inverse permutation

    def from_raster(self, tokens: Tensor) -> Tensor:
        """Raster order to generation order, (B, L)."""
        return tokens[:, self.raster_index(tokens.device)]

    def visible(self, positions: Tensor) -> Tensor:
        """Group-causal mask (T, T), True where the row's position may attend to the column's."""
        in_group = positions >= self.ar
        # (T,), where the position's group ends
        end = self.ar + ((positions - self.ar) // self.group + 1) * self.group
        return positions[None, :] < torch.where(in_group, end, positions + 1)[:, None]

    def steps(self, tokens: int) -> list[tuple[int, int]]:
        """Positions [first, end) that decoding feeds per step; the step predicts the tokens of the
        same numbers.

        Raises:
            ValueError: the tokens after the first `ar` do not divide into groups.
        """
        if tokens < self.ar or (tokens - self.ar) % self.group:
            raise ValueError(
                f"tokens: {tokens} is not {self.ar} single tokens plus groups of {self.group}"
            )
        singles = [(p, p + 1) for p in range(self.ar)]
        return singles + [(p, p + self.group) for p in range(self.ar, tokens, self.group)]


def at_least_float32(x: Tensor) -> Tensor:
    """What the released code does in float32; float64, which it never sees, is kept."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotary_table(layout: Layout, positions: Tensor, head_dim: int, base: float) -> Tensor:
    """Cosine and sine, float32 (T, D / 2, 2), for every channel pair at positions (T,).

    The first half of the pairs turns with the row, the second with the column.
    """
    half = head_dim // 2
    # (D / 4,) for rows, and the same for columns
    frequencies = 1.0 / base ** (torch.arange(0, half, 2, device=positions.device).float() / half)
    token = layout.token_at(positions)
    rows, columns = layout.cells(token.clamp(min=0))  # (T,) each
    # (T, D / 2)
    angles = torch.cat((torch.outer(rows, frequencies), torch.outer(columns, frequencies)), dim=-1)
    # zero where there is no place in the grid, as released
    return torch.stack((angles.cos(), angles.sin()), dim=-1) * (token >= 0)[:, None, None]


def apply_rotary(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn adjacent channel pairs of x (B, T, H, D) by rotation (T, D / 2, 2), in float32."""
    a, b = at_least_float32(x).unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, D / 2) each
    cos, sin = rotation[:, None].unbind(-1)  # (T, 1, D / 2), broadcast over heads
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).type_as(x)


class RMSNorm(nn.Module):
    """x / rms(x) * weight + bias, the quotient in float32.

    The released norm has no bias. It is None, and not in the state dict, until a shift is folded
    into it.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_buffer("bias", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        mean_square = wide.square().mean(dim=-1, keepdim=True)  # (B, T, 1)
        out = (wide * torch.rsqrt(mean_square + self.eps)).type_as(x) * self.weight
        return out if self.bias is None else out + self.bias


class Attention(nn.Module):
    """Rotary multi-head attention.

    With `kv_heads` < `heads`, neighbouring query heads share a key and a value head.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.shared = heads // kv_heads
        self.sizes = (dim, kv_heads * self.head_dim, kv_heads * self.head_dim)
        self.wqkv = Linear(dim, sum(self.sizes), bias=False)
        self.wo = Linear(dim, dim, bias=False)
        self.qk = MatMul()
        self.pv = MatMul()

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        positions: Tensor,
        mask: Mask,
        cache: KVCache | None,
    ) -> Tensor:
        q, k, v = self.wqkv(x, positions).split(self.sizes, dim=-1)  # (B, T, heads * D) each
        heads = (-1, self.head_dim)
        q = apply_rotary(q.unflatten(-1, heads), rotation).transpose(1, 2)  # (B, H, T, D)
        k = apply_rotary(k.unflatten(-1, heads), rotation).transpose(1, 2)
        v = v.unflatten(-1, heads).transpose(1, 2)
        if self.shared > 1:
            k = k.repeat_interleave(self.shared, dim=1)  # (B, H, T, D)
            v = v.repeat_interleave(self.shared, dim=1)
        out = attend(q, k, v, self.qk, self.pv, self.head_dim**-0.5, mask, positions, cache)
        return self.wo(out, positions)


def feed_forward_width(dim: int, multiple_of: int, multiplier: float | None = None) -> int:
    """Two thirds of 4 * dim, times a multiplier if there is one, rounded up to a multiple."""
    hidden = 8 * dim // 3
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return math.ceil(hidden / multiple_of) * multiple_of


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden, bias=False)
        self.w3 = Linear(dim, hidden, bias=False)
        self.w2 = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x, positions)) * self.w3(x, positions), positions)


class Block(nn.Module):
    """Pre-norm block."""

    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, kv_heads)
        self.feed_forward = FeedForward(dim, hidden)
        self.attention_norm = RMSNorm(dim, eps)
        self.ffn_norm = RMSNorm(dim, eps)
        self.drop = nn.Dropout(0.0)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        positions: Tensor,
        mask: Mask = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        x = x + self.drop(self.attention(self.attention_norm(x), rotation, positions, mask, cache))
        return x + self.drop(self.feed_forward(self.ffn_norm(x), positions))


class PAR(nn.Module):
    """The generator.

    Args:
        dim, n_layer, n_head: transformer dimensions.
        vocab_size: image token vocabulary, V.
        block_size: image tokens per image, L, a square number.
        spe_token_num: learned tokens that fill the first group up; a group is one more.
        ar_token_num: tokens generated one at a time, one per image region.
        num_classes: classes, N; label N means "no class".
        n_kv_head: key and value heads, by default n_head.
        multiple_of: the feed-forward width is rounded up to a multiple of this.
        ffn_dim_multiplier: of the feed-forward width; no released checkpoint has one.
        rope_base: base of the rotary frequencies. norm_eps: added to the mean square.
    """

    def __init__(
        self,
        dim: int,
        n_layer: int,
        n_head: int,
        vocab_size: int,
        block_size: int,
        spe_token_num: int,
        ar_token_num: int,
        num_classes: int,
        n_kv_head: int | None = None,
        multiple_of: int = 256,
        rope_base: float = 10000,
        norm_eps: float = 1e-5,
        ffn_dim_multiplier: float | None = None,
    ) -> None:
        super().__init__()
        self.layout = Layout(math.isqrt(block_size), ar_token_num, spe_token_num)
        self.num_classes = num_classes
        self.head_dim = dim // n_head
        self.rope_base = rope_base
        if self.layout.tokens != block_size or self.layout.side % math.isqrt(ar_token_num):
            raise ValueError(
                f"block_size: {block_size} is not a square that divides into {ar_token_num} regions"
            )
        self.cls_embedding = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, dim)})
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        self.spe_tok_embeddings = nn.ModuleDict(
            {"special_embeddings": nn.Embedding(spe_token_num, dim)}
        )
        hidden = feed_forward_width(dim, multiple_of, ffn_dim_multiplier)
        self.layers = nn.ModuleList(
            Block(dim, n_head, n_kv_head or n_head, hidden, norm_eps) for _ in range(n_layer)
        )
        self.norm = RMSNorm(dim, norm_eps)
        self.output = Linear(dim, vocab_size, bias=False)

    def set_dropout(self, p: float) -> None:
        """Dropout probability of both branches' outputs while training."""
        for layer in self.layers:
            layer.drop.p = p

    def embed(self, ids: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        """Inputs (B, T, C) at `positions`, given image tokens in generation order (B, n) and labels
        (B,)."""
        class_token = self.cls_embedding["embedding_table"](labels)[:, None]  # (B, 1, C)
        specials = self.spe_tok_embeddings["special_embeddings"].weight  # (spe, C)
        # (B, 1 + spe, C)
        extra = torch.cat((class_token, specials.expand(len(labels), -1, -1)), dim=1)

        token = self.layout.token_at(positions)  # (T,), -1 where `extra` stands
        # (T,), place in `extra`; the clamp is for image tokens, which do not use it
        which = torch.where(positions == 0, 0, positions - self.layout.ar).clamp(0, self.layout.spe)
        image = self.tok_embeddings(ids[:, token.clamp(min=0)])  # (B, T, C)
        return torch.where((token >= 0)[:, None], image, extra[:, which])

    def forward(
        self,
        ids: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        cache: list[KVCache] | None = None,
    ) -> Tensor:
        """Teacher-forced logits (B, T, V), float32; those at position p predict token p.

        Without `positions`, all of a sequence that holds n >= ar tokens: T = 1 + n + spe. With a
        cache, computes the tokens at `positions` only and adds them to it: one position or one
        whole group a call (`Layout.steps`).
        """
        if positions is None:
            positions = torch.arange(ids.shape[1] + 1 + self.layout.spe, device=ids.device)
        x = self.embed(ids, labels, positions)
        rotation = rotary_table(self.layout, positions, self.head_dim, self.rope_base)
        mask = None  # a cached step sees all that is stored
        if cache is None:
            # (T, T)
            mask = torch.zeros(len(positions), len(positions), dtype=x.dtype, device=x.device)
            mask = mask.masked_fill_(~self.layout.visible(positions), float("-inf"))
        caches = cache or [None] * len(self.layers)
        for layer, layer_cache in zip(self.layers, caches):
            x = layer(x, rotation, positions, mask, layer_cache)  # (B, T, C)
        return at_least_float32(self.output(self.norm(x), positions))
