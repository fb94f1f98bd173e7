"""The RAR transformer: a causal decoder over raster-ordered VQ tokens, with AdaLN per position.

Numerics and state-dict keys follow bytedance/1d-tokenizer `modeling/rar.py`.

Token space of the embedding table, with V codes and N classes:
    [0, V) image tokens | V mask token | V + 1 + class | V + 1 + N "no class".
Sequence positions, with L image tokens:
    0 cls token | 1 condition token | 2 .. L + 1 image tokens; a decoder feeds the first L - 1.
The output at position p >= 1 predicts image token p - 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.decoding.embedding import embed_token
from models.layers import (
    KVCache,
    Linear,
    Mask,
    MatMul,
    Mlp,
    Modulation,
    StepRunner,
    attend,
    causal_mask,
    look_up_modulation,
)

# outputs of the projections, in the order of their rows
ADALN_CHUNKS = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
HEAD_CHUNKS = ("scale", "shift")
QKV_CHUNKS = ("q", "k", "v")


class Attention(nn.Module):
    """Multi-head attention with per-head LayerNorm on queries and keys."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.scale = self.head_dim**-0.5
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.proj = Linear(dim, dim)
        self.qk = MatMul()
        self.pv = MatMul()

    def forward(self, x: Tensor, positions: Tensor, mask: Mask, cache: KVCache | None) -> Tensor:
        average = self.average(self.qkv(x, positions), positions, mask, cache)
        return self.proj(average, positions)

    def average(self, qkv: Tensor, positions: Tensor, mask: Mask, cache: KVCache | None) -> Tensor:
        """The average of values (B, T, C) of queries, keys and values (B, T, 3 * C)."""
        qkv = qkv.unflatten(-1, (3, self.heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D) each
        q = self.q_norm(q)
        k = self.k_norm(k)
        return attend(q, k, v, self.qk, self.pv, self.scale, mask, positions, cache)


class Block(nn.Module):
    """Pre-norm block; the condition gives shift, scale and gate of both branches.

    `kappa1`, `kappa2` are the literal 1 of LN(h) * (1 + scale(c)) + shift(c), kept as vectors (not
    in the state dict) so that a per-channel scale of the branch's input can be folded into the
    modulation.
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.adaLN_modulation = Modulation(dim, 6)
        self.register_buffer("kappa1", torch.ones(dim), persistent=False)
        self.register_buffer("kappa2", torch.ones(dim), persistent=False)
        self.drop = nn.Dropout(0.0)

    def forward(
        self,
        x: Tensor,
        c: Tensor | None,
        positions: Tensor,
        mask: Mask = None,
        cache: KVCache | None = None,
        table: Tensor | None = None,
    ) -> Tensor:
        """The block's output (B, T, C).

        Args:
            c: conditions after SiLU (B, T, C); None with a `table` of what the projection made of
                them (`look_up_modulation`).
        """
        # (B, T, 6 * C)
        if table is None:
            modulation = self.adaLN_modulation.project(c, positions)
        else:
            modulation = look_up_modulation(table, positions, len(x))
        return self.branches(x, modulation, positions, mask, cache)

    def branches(
        self,
        x: Tensor,
        modulation: Tensor,
        positions: Tensor,
        mask: Mask,
        cache: KVCache | None,
    ) -> Tensor:
        """Attention and MLP of x (B, T, C), with the modulation (B, T, 6 * C)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # (B, T, C) each
        h = self.attn(self.norm1(x) * (self.kappa1 + scale1) + shift1, positions, mask, cache)
        x = x + gate1 * self.drop(h)
        h = self.mlp(self.norm2(x) * (self.kappa2 + scale2) + shift2, positions)
        return x + gate2 * self.drop(h)


class FinalNorm(nn.Module):
    """The modulated, affine-free norm before the head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = Modulation(dim, 2)
        self.register_buffer("kappa", torch.ones(dim), persistent=False)

    def forward(
        self, x: Tensor, c: Tensor | None, positions: Tensor, table: Tensor | None = None
    ) -> Tensor:
        # (B, T, 2 * C)
        if table is None:
            modulation = self.adaLN_modulation.project(c, positions)
        else:
            modulation = look_up_modulation(table, positions, len(x))
        scale, shift = modulation.chunk(2, dim=-1)  # (B, T, C) each
        return self.norm_final(x) * (self.kappa + scale) + shift


class RAR(nn.Module):
    """The generator.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: transformer
            dimensions.
        image_seq_len: image tokens per image, L.
        codebook_size: image token vocabulary, V.
        condition_num_classes: classes, N.
    """

    prefix = 2  # tokens of a decoder's first step; every other one has one
    step_runner: StepRunner | None = None

    def __init__(
        self,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        intermediate_size: int,
        image_seq_len: int,
        codebook_size: int,
        condition_num_classes: int,
    ) -> None:
        super().__init__()
        dim = hidden_size
        self.image_seq_len = image_seq_len
        self.codebook_size = codebook_size
        self.num_classes = condition_num_classes
        self.none_condition = codebook_size + 1 + condition_num_classes
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # longer tables than the sequence needs, as in the released files
        self.pos_embed = nn.Parameter(torch.zeros(1, image_seq_len + 1024, dim))
        self.target_aware_pos_embed = nn.Parameter(torch.zeros(1, image_seq_len + 1024, dim))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, image_seq_len + 100, dim))
        self.blocks = nn.ModuleList(
            Block(dim, num_attention_heads, intermediate_size) for _ in range(num_hidden_layers)
        )
        self.embeddings = nn.Embedding(codebook_size + 1 + condition_num_classes + 1, dim)
        self.adaln_before_head = FinalNorm(dim)
        self.lm_head = Linear(dim, codebook_size)

    def set_dropout(self, p: float) -> None:
        """Dropout probability of both branches' outputs while training."""
        for block in self.blocks:
            block.drop.p = p

    def condition_ids(self, labels: Tensor) -> Tensor:
        """Token ids of class labels (B,); a label equal to the number of classes means "no
        class"."""
        return labels + self.codebook_size + 1

    def embed(
        self, ids: Tensor, condition: Tensor, orders: Tensor | None, positions: Tensor
    ) -> Tensor:
        """Inputs (B, T, C) at `positions`.

        Args:
            ids: image tokens seen so far, in generation order (B, n); positions 2 .. n + 1.
            condition: condition token ids (B,).
            orders: generation order (B, L) of raster positions, or None for raster order.
        """
        batch = ids.shape[0]
        length = self.image_seq_len
        if orders is None:
            orders = torch.arange(length, device=ids.device)[None]
        # raster places, (B, T) or (1, T), of the token at each position, and of the one predicted
        own_place = orders[:, (positions - 2).clamp(0, length - 1)]
        next_place = orders[:, (positions - 1).clamp(0, length - 1)]
        is_cls = (positions == 0)[None, :, None]  # (1, T, 1)
        is_image = (positions >= 2)[None, :, None]  # (1, T, 1)
        has_target = ((positions >= 1) & (positions <= length))[None, :, None]  # (1, T, 1)

        tokens = torch.cat((condition[:, None], ids), dim=1)  # token of position p stands at p - 1
        x = self.embeddings(tokens[:, (positions - 1).clamp(min=0)])  # (B, T, C)
        x = torch.where(is_cls, self.cls_token.expand(batch, -1, -1), x)

        own_table = self.pos_embed[0]
        next_table = self.target_aware_pos_embed[0]
        x = x + torch.where(
            is_image, F.embedding(2 + own_place, own_table), own_table[positions.clamp(max=1)]
        )
        return x + torch.where(has_target, F.embedding(2 + next_place, next_table), 0.0)

    def embed_step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """`embed` (B, 1, C) of the one image token at `positions` (1,), in raster order: one
        operator."""
        tables = self.pos_embed[0], self.target_aware_pos_embed[0]
        return embed_token(ids, positions, self.embeddings.weight, *tables)

    def embed_condition(self, condition: Tensor, positions: Tensor) -> Tensor:
        """What the linear layers of all AdaLN projections are fed at `positions`, (B, T, C): no
        token has a part in it."""
        c = self.embeddings(condition)[:, None] + self.timesteps_embeddings[:, positions]
        return F.silu(c)

    def modulate_ahead(self, condition: Tensor, positions: Tensor) -> list[Tensor]:
        """What the AdaLN projections of all blocks, and then of the head, give at `positions`,
        (B, T, n * C) each, for condition token ids (B,).

        Positions behind the last are taken for it, so that a table may reach beyond the end.
        """
        positions = positions.clamp(max=self.image_seq_len)
        c = self.embed_condition(condition, positions)  # (B, T, C)
        tables = [block.adaLN_modulation.project(c, positions) for block in self.blocks]
        # nothing is predicted at the cls token
        predicting = positions.clamp(min=1)
        return [*tables, self.adaln_before_head.adaLN_modulation.project(c, predicting)]

    def forward(
        self,
        ids: Tensor,
        condition: Tensor,
        orders: Tensor | None = None,
        positions: Tensor | None = None,
        cache: list[KVCache] | None = None,
        tables: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Teacher-forced logits (B, n + 1, V) of positions 1 .. n + 1, given n tokens.

        With a cache, computes the tokens at `positions` only and adds them to it: first the prefix
        (0, 1), which returns (B, 1, V), then one position a call. `tables` are then those of
        `modulate_ahead` that hold these positions (`look_up_modulation`).
        """
        if positions is None:
            positions = torch.arange(ids.shape[1] + 2, device=ids.device)
        from_start = len(positions) > 1
        if from_start or orders is not None:
            x = self.embed(ids, condition, orders, positions)  # (B, T, C)
        else:
            x = self.embed_step(ids, positions)  # (B, 1, C)
        c = self.embed_condition(condition, positions) if tables is None else None  # (B, T, C)
        # (T, T); one token after the prefix sees all that is stored
        mask = causal_mask(len(positions), ids.device).to(x.dtype) if from_start else None
        if self.step_runner is not None and tables is not None and not from_start:
            return self.step_runner(x, tables, positions, cache, self.predict)
        caches = cache or [None] * len(self.blocks)
        *block_tables, head_table = tables or [None] * (len(self.blocks) + 1)
        for block, block_cache, table in zip(self.blocks, caches, block_tables):
            x = block(x, c, positions, mask, block_cache, table)  # (B, T, C)
        if from_start:  # nothing is predicted at the cls token
            x = x[:, 1:]
            c = None if c is None else c[:, 1:]
            positions = positions[1:]
        return self.predict(x, c, positions, head_table)

    def predict(
        self, x: Tensor, c: Tensor | None, positions: Tensor, table: Tensor | None
    ) -> Tensor:
        """Logits (B, T, V) of the last block's output (B, T, C); `c` and `table` as in `Block`."""
        return self.lm_head(self.adaln_before_head(x, c, positions, table), positions)
