"""RAR described for quantization: which activation feeds which linears, what absorbs a transform,
where tokens differ.

Positions 0 (cls) and 1 (condition) are sink tokens (PTQ4ARVG, Figure 1) and have their own
parameters under static token-wise quantization; the AdaLN inputs vary with the position and have
one pair per position (paper section 4.2).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from models.layers import chunk_rows
from models.rar.transformer import ADALN_CHUNKS, HEAD_CHUNKS, QKV_CHUNKS, RAR
from ptq.types import (
    AdaLNFold,
    BlockForm,
    HeadRotation,
    MatMulSite,
    Probe,
    Rows,
    RowsFold,
    Segments,
    Site,
)

SINKS = 2
BLOCK_FORM = BlockForm(
    norm1="norm1",
    qkv="attn.qkv",
    attention="attn",
    proj="attn.proj",
    norm2="norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    gelu="erf",
    chunks=ADALN_CHUNKS,
    kappa1="kappa1",
    kappa2="kappa2",
    projection="adaLN_modulation",
    q_norm="attn.q_norm",
    k_norm="attn.k_norm",
)


class RARAdapter:
    """Sites of a RAR in the order in which a forward pass reaches them."""

    family = "rar"
    block_form = BLOCK_FORM
    layout = "inference"
    sinks = SINKS

    def __init__(self, model: RAR) -> None:
        self.model = model
        self.dim = model.lm_head.in_features
        self.head_dim = model.blocks[0].attn.head_dim

        self.blocks = tuple(f"blocks.{i}" for i in range(len(model.blocks)))
        self.last_block = self.blocks[-1]
        self.released_block = self.blocks[-1]

        sites: list[Site] = []
        matmuls: list[MatMulSite] = []
        rotations: list[HeadRotation] = []
        for block in self.blocks:
            sites.extend(self._block_sites(block))
            matmuls.append(MatMulSite(f"{block}.attn.qk", kind="qk", channels=self.head_dim))
            matmuls.append(MatMulSite(f"{block}.attn.pv", kind="pv", channels=self.head_dim))
            rotations.append(self._value_rotation(block))
        sites.extend(self._head_sites())
        self.sites = tuple(sites)
        self.matmuls = tuple(matmuls)
        self.rotations = tuple(rotations)

    def _block_sites(self, block: str) -> Iterator[Site]:
        projection = f"{block}.adaLN_modulation.1"
        qkv = f"{block}.attn.qkv"
        proj = f"{block}.attn.proj"
        fc1 = f"{block}.mlp.fc1"
        fc2 = f"{block}.mlp.fc2"
        tokens = Segments(tuple(range(SINKS + 1)))  # each sink token, and the image tokens
        every_position = Segments(tuple(range(self.model.image_seq_len + 1)))

        yield Site(projection, kind="adaln", consumers=(projection,), segments=every_position)
        yield Site(
            name=qkv,
            kind="qkv",
            consumers=(qkv,),
            segments=tokens,
            sinks=SINKS,
            fold=AdaLNFold(
                linear=projection,
                scale_rows=chunk_rows(ADALN_CHUNKS, "scale_msa", self.dim),
                shift_rows=chunk_rows(ADALN_CHUNKS, "shift_msa", self.dim),
                kappa=f"{block}.kappa1",
            ),
            probe=Probe(f"{block}.attn", reads=proj),
        )
        yield Site(
            name=proj,
            kind="proj",
            consumers=(proj,),
            segments=tokens,
            sinks=SINKS,
            fold=RowsFold(qkv, rows=chunk_rows(QKV_CHUNKS, "v", self.dim)),
        )
        yield Site(
            name=fc1,
            kind="fc1",
            consumers=(fc1,),
            segments=tokens,
            sinks=SINKS,
            fold=AdaLNFold(
                linear=projection,
                scale_rows=chunk_rows(ADALN_CHUNKS, "scale_mlp", self.dim),
                shift_rows=chunk_rows(ADALN_CHUNKS, "shift_mlp", self.dim),
                kappa=f"{block}.kappa2",
            ),
        )
        yield Site(name=fc2, kind="fc2", consumers=(fc2,), segments=tokens, sinks=SINKS)

    def _head_sites(self) -> Iterator[Site]:
        projection = "adaln_before_head.adaLN_modulation.1"
        # nothing is predicted at position 0
        predicting = Segments(tuple(range(1, self.model.image_seq_len + 1)))
        yield Site(projection, kind="adaln", consumers=(projection,), segments=predicting)
        fold = AdaLNFold(
            linear=projection,
            scale_rows=chunk_rows(HEAD_CHUNKS, "scale", self.dim),
            shift_rows=chunk_rows(HEAD_CHUNKS, "shift", self.dim),
            kappa="adaln_before_head.kappa",
        )
        yield Site(name="lm_head", kind="head", consumers=("lm_head",), fold=fold)

    def _value_rotation(self, block: str) -> HeadRotation:
        """Of V alone: the norms of q and k do not commute with a rotation."""
        return HeadRotation(
            linear=f"{block}.attn.qkv",
            rows=chunk_rows(QKV_CHUNKS, "v", self.dim),
            channels=self.head_dim,
            reader=f"{block}.attn.proj",
        )

    def prepare(self) -> None:
        """Nothing to do."""

    def rows(self, tokens: Tensor, labels: Tensor) -> tuple[Rows, Rows]:
        """Conditional and unconditional rows of images with tokens (N, L) and labels (N,): what a
        decoder feeds, the first L - 1 tokens."""
        ids = tokens[:, :-1]
        condition = self.model.condition_ids(labels)
        no_class = condition.new_full(condition.shape, self.model.none_condition)
        return {"ids": ids, "condition": condition}, {"ids": ids, "condition": no_class}

    def forward(self, rows: Rows) -> Tensor:
        """Logits (B, L, V)."""
        return self.model(rows["ids"], rows["condition"])
