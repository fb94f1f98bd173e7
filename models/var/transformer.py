"""The VAR transformer: predicts all tokens of an image scale at once, scales coarse to fine.

Numerics and state-dict keys follow FoundationVision/VAR `models/var.py` and `models/basic_var.py`.

Sequence positions, with token maps of sides p_0 < ... < p_{S-1}
(1, 2, 3, 4, 5, 6, 8, 10, 13, 16 in the models for 256 pixels):
    scale 0: start tokens made from the class, the first p_0^2 positions, which is position 0 alone
        in every preset;
    scale s: the next p_s^2 positions, fed with the features of all scales before s, pooled to
        p_s x p_s.
A position sees its own scale and the ones before. The output at a position is the token at the same
place of its scale.

Surprises kept: the key projection has no bias; without unit queries and keys the scores are scaled
by 1/4 of the usual 1/sqrt(head_dim); the two gates come first in the modulation. Not kept: the
released forward drops labels at random in eval mode too; here labels are used as given, and the
label `num_classes` means "no class".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import KVCache, Linear, Mask, MatMul, Modulation, attend, look_up_modulation

# outputs of the projections, in the order of their rows
ADALN_CHUNKS = ("gate_msa", "gate_mlp", "scale_msa", "scale_mlp", "shift_msa", "shift_mlp")
HEAD_CHUNKS = ("scale", "shift")
QKV_CHUNKS = ("q", "k", "v")

MAX_LOG_SCALE = math.log(100)


class Attention(nn.Module):
    """Multi-head attention; with `l2_norm` on unit queries and keys, scaled by exp(scale_mul) <=
    100 per head.

    The biases of q and v are parameters of their own, as in the released files, and are added after
    the product. They may be moved into `mat_qkv.bias` (`models.var.adapter.fuse_qkv_bias`).
    """

    def __init__(self, dim: int, heads: int, l2_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.l2_norm = l2_norm
        self.scale = 1.0 if l2_norm else 0.25 * self.head_dim**-0.5
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("zero_k_bias", torch.zeros(dim))
        self.mat_qkv = Linear(dim, 3 * dim, bias=False)
        self.proj = Linear(dim, dim)
        self.qk = MatMul()
        self.pv = MatMul()

    def qkv_bias(self) -> Tensor:
        """The bias of q, k and v, (3 * C,)."""
        return torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))

    def forward(self, x: Tensor, positions: Tensor, mask: Mask, cache: KVCache | None) -> Tensor:
        qkv = self.mat_qkv(x, positions) + self.qkv_bias()  # (B, T, 3 * C)
        return self.proj(self.average(qkv, positions, mask, cache), positions)

    def query_scale(self) -> Tensor | None:
        """The learned scale of every head's unit queries, (1, H, 1, 1), kept as a logarithm; None
        without `l2_norm`."""
        return self.scale_mul_1H11.clamp(max=MAX_LOG_SCALE).exp() if self.l2_norm else None

    def average(self, qkv: Tensor, positions: Tensor, mask: Mask, cache: KVCache | None) -> Tensor:
        """The average of values (B, T, C) of queries, keys and values (B, T, 3 * C)."""
        qkv = qkv.unflatten(-1, (3, self.heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D) each
        if self.l2_norm:
            q = F.normalize(q, dim=-1) * self.query_scale()
            k = F.normalize(k, dim=-1)
        return attend(q, k, v, self.qk, self.pv, self.scale, mask, positions, cache)


class FeedForward(nn.Module):
    """fc1, tanh-approximated GELU, fc2."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x, positions), approximate="tanh"), positions)


class Block(nn.Module):
    """Pre-norm block; the class gives gate, scale and shift of both branches, or with `shared_aln`
    an offset to them.

    `kappa1`, `kappa2` are the literal 1 of LN(h) * (1 + scale(c)) + shift(c), kept as vectors (not
    in the state dict) so that a per-channel scale of the branch's input can be folded into the
    modulation.
    """

    def __init__(self, dim: int, heads: int, hidden: int, shared_aln: bool, l2_norm: bool) -> None:
        super().__init__()
        self.attn = Attention(dim, heads, l2_norm)
        self.ffn = FeedForward(dim, hidden)
        self.ln_wo_grad = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.shared_aln = shared_aln
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, dim))
        else:
            self.ada_lin = Modulation(dim, 6)
        self.register_buffer("kappa1", torch.ones(dim), persistent=False)
        self.register_buffer("kappa2", torch.ones(dim), persistent=False)
        self.drop = nn.Dropout(0.0)

    def modulation(self, c: Tensor, positions: Tensor) -> Tensor:
        """gate1, gate2, scale1, scale2, shift1, shift2 in a row, (B, 1, 6 * C).

        Args:
            c: the class vector (B, 1, C), or with `shared_aln` what the shared projection made of
                it, (B, 1, 6 * C).
        """
        if self.shared_aln:
            return (self.ada_gss + c.unflatten(-1, (6, -1))).flatten(2)
        return self.ada_lin(c, positions)

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
            c: see `modulation`; None with a `table` of what it gives (`look_up_modulation`).
        """
        # (B, 1, 6 * C)
        if table is None:
            modulation = self.modulation(c, positions)
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
        """Attention and MLP of x (B, T, C), with the modulation (B, 1, 6 * C)."""
        # (B, 1, C) each
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.chunk(6, dim=-1)
        h = self.ln_wo_grad(x) * (self.kappa1 + scale1) + shift1  # (B, T, C)
        x = x + gate1 * self.drop(self.attn(h, positions, mask, cache))
        h = self.ln_wo_grad(x) * (self.kappa2 + scale2) + shift2  # (B, T, C)
        return x + gate2 * self.drop(self.ffn(h, positions))


class FinalNorm(nn.Module):
    """The modulated norm before the head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln_wo_grad = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ada_lin = Modulation(dim, 2)
        self.register_buffer("kappa", torch.ones(dim), persistent=False)

    def forward(
        self, x: Tensor, c: Tensor, positions: Tensor, table: Tensor | None = None
    ) -> Tensor:
        # (B, 1, 2 * C)
        if table is None:
            modulation = self.ada_lin(c, positions)
        else:
            modulation = look_up_modulation(table, positions, len(x))
        scale, shift = modulation.chunk(2, dim=-1)  # (B, 1, C) each
        return self.ln_wo_grad(x) * (self.kappa + scale) + shift


class VAR(nn.Module):
    """The generator.

    Args:
        depth, embed_dim, num_heads, mlp_ratio: transformer dimensions.
        patch_nums: sides of the token maps, coarse to fine.
        vocab_size, z_channels: size and dimension of the tokenizer's codebook.
        num_classes: classes, N.
        shared_aln: one AdaLN projection for all blocks. attn_l2_norm: unit queries and keys.

    Attributes:
        spans: first and end position of every scale. length: tokens of an image, over all scales.
    """

    def __init__(
        self,
        depth: int,
        embed_dim: int,
        num_heads: int,
        patch_nums: tuple[int, ...],
        vocab_size: int,
        z_channels: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        shared_aln: bool = False,
        attn_l2_norm: bool = True,
    ) -> None:
        super().__init__()
        dim = embed_dim
        hidden = round(embed_dim * mlp_ratio)
        self.patch_nums = tuple(patch_nums)
        self.num_classes = num_classes
        ends = list(itertools.accumulate(side * side for side in self.patch_nums))
        self.spans = tuple(zip((0, *ends), ends))
        self.length = ends[-1]
        self.start_length = ends[0]

        self.pos_start = nn.Parameter(torch.zeros(1, self.start_length, dim))
        self.pos_1LC = nn.Parameter(torch.zeros(1, self.length, dim))
        # by NumPy: PyTorch loads its compiler to calculate on tensors without memory
        sizes = [end - begin for begin, end in self.spans]
        level = np.repeat(np.arange(len(sizes)), sizes)  # (L,), the scale of every position
        causal = np.where(level[:, None] >= level, 0.0, float("-inf"))  # (L, L)
        self.register_buffer("lvl_1L", torch.tensor(level)[None])
        causal_bias = torch.tensor(causal, dtype=torch.float32)
        self.register_buffer("attn_bias_for_masking", causal_bias[None, None])
        self.word_embed = nn.Linear(z_channels, dim)
        self.class_emb = nn.Embedding(num_classes + 1, dim)  # the last row is "no class"
        self.lvl_embed = nn.Embedding(len(self.patch_nums), dim)
        self.shared_ada_lin = Modulation(dim, 6) if shared_aln else None
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, hidden, shared_aln, attn_l2_norm) for _ in range(depth)
        )
        self.head_nm = FinalNorm(dim)
        self.head = Linear(dim, vocab_size)

    def set_dropout(self, p: float) -> None:
        """Dropout probability of both branches' outputs while training."""
        for block in self.blocks:
            block.drop.p = p

    def embed(self, c: Tensor, inputs: Tensor, positions: Tensor) -> Tensor:
        """Transformer inputs (B, T, C) at `positions` (T,): start tokens where `inputs` leave room,
        and `inputs`.

        Args:
            c: class vectors (B, 1, C). inputs: pooled features (B, T or T - start_length,
                z_channels).
        """
        x = self.word_embed(inputs.to(self.word_embed.weight.dtype))  # (B, n, C)
        if inputs.shape[1] < len(positions):
            x = torch.cat((c + self.pos_start, x), dim=1)  # (B, T, C)
        # level and position are added up first, as in the released code
        return x + (self.lvl_embed(self.lvl_1L[:, positions]) + self.pos_1LC[:, positions])

    def modulate_ahead(self, labels: Tensor, positions: Tensor) -> list[Tensor]:
        """What the AdaLN projections of all blocks, and then of the head, give for labels (B,),
        (B, 1, n * C) each: the same at all positions."""
        c = self.class_emb(labels)[:, None]  # (B, 1, C)
        shared = c if self.shared_ada_lin is None else self.shared_ada_lin(c, positions)
        tables = [block.modulation(shared, positions) for block in self.blocks]
        return [*tables, self.head_nm.ada_lin(c, positions)]

    def forward(
        self,
        labels: Tensor,
        inputs: Tensor,
        positions: Tensor | None = None,
        cache: list[KVCache] | None = None,
        masked: bool = True,
        tables: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Teacher-forced logits (B, start_length + n, V) under the block-causal mask.

        With a cache, computes the tokens at `positions` only, one scale a call, and adds them to
        it.

        Args:
            labels: classes (B,). inputs: features of scales 1 and on, (B, n, z_channels), as
                `MultiScaleQuantizer.teacher_inputs` makes them; with a cache those of the scale at
                hand, and none (n = 0) for scale 0.
            masked: apply the mask; PTQ4ARVG's released calibration does not.
            tables: what `modulate_ahead` gave for these labels; None to compute it here.
        """
        if positions is None:
            positions = torch.arange(self.start_length + inputs.shape[1], device=inputs.device)
        mask = None
        if cache is None and masked:
            # (1, 1, T, T)
            mask = self.attn_bias_for_masking[:, :, : len(positions), : len(positions)]
        c = self.class_emb(labels)[:, None]  # (B, 1, C)
        x = self.embed(c, inputs, positions)
        shared = c  # (B, 1, C) or (B, 1, 6 * C)
        if self.shared_ada_lin is not None and tables is None:
            shared = self.shared_ada_lin(c, positions)
        caches = cache or [None] * len(self.blocks)
        *block_tables, head_table = tables or [None] * (len(self.blocks) + 1)
        for block, block_cache, table in zip(self.blocks, caches, block_tables):
            x = block(x, shared, positions, mask, block_cache, table)  # (B, T, C)
        return self.head(self.head_nm(x, c, positions, head_table), positions)
