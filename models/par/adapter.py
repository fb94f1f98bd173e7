"""PAR described for quantization: which activation feeds which linears, what absorbs a transform,
where tokens differ.

The tokens before the regular groups are sink tokens: the class token, the image tokens fed one at a
time, and the first group with its special tokens. Under static token-wise quantization each single
one has its own parameters, the first group shares one pair, and the regular groups share another.
For 4x this is {0} {1} {2} {3} {4..7} {8..}, as in the released PTQ4ARVG code, which keeps these
numbers for 16x too; here 16x is {0} .. {15} {16..31} {32..}.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.layers import chunk_rows
from models.par.transformer import PAR, QKV_CHUNKS
from ptq.types import (
    HeadRotation,
    MatMulSite,
    NormFold,
    Probe,
    Rows,
    RowsFold,
    Segments,
    Site,
    StreamRotation,
)


class PARAdapter:
    """Sites of a PAR in the order in which a forward pass reaches them."""

    family = "par"
    block_form = None  # SwiGLU and rotary embeddings
    layout = "inference"

    # what embeds tokens into the residual stream
    tables = (
        "tok_embeddings.weight",
        "cls_embedding.embedding_table.weight",
        "spe_tok_embeddings.special_embeddings.weight",
    )

    def __init__(self, model: PAR, sinks: int | None = None) -> None:
        """`sinks`: leading sink tokens, by default all before the regular groups."""
        self.model = model
        self.sinks = model.layout.ar + model.layout.group if sinks is None else sinks

        self.blocks = tuple(f"layers.{i}" for i in range(len(model.layers)))
        self.last_block = self.blocks[-1]
        self.released_block = self.blocks[-1]

        sites: list[Site] = []
        matmuls: list[MatMulSite] = []
        value_rotations: list[HeadRotation] = []
        for block in self.blocks:
            attention = f"{block}.attention"
            sites.extend(self._attention_sites(block))
            sites.extend(self._mlp_sites(block))
            matmuls.append(MatMulSite(f"{attention}.qk", kind="qk", channels=model.head_dim))
            matmuls.append(MatMulSite(f"{attention}.pv", kind="pv", channels=model.head_dim))
            value_rotations.append(self._value_rotation(attention))
        sites.append(Site("output", kind="head", consumers=("output",), fold=NormFold("norm")))
        self.sites = tuple(sites)
        self.matmuls = tuple(matmuls)
        # not of q and k, which the rotary embedding turns
        self.rotations = (self._stream_rotation(), *value_rotations)

    @property
    def _tokens(self) -> Segments:
        """Every single token, the first group, the regular groups."""
        return Segments((*range(self.model.layout.ar + 1), self.sinks))

    def _attention_sites(self, block: str) -> Iterator[Site]:
        attention = f"{block}.attention"
        wqkv = f"{attention}.wqkv"
        wo = f"{attention}.wo"

        values_fold = None  # a value head that several queries share cannot fold
        if self.model.get_submodule(attention).shared == 1:
            width = self.model.output.in_features
            values_fold = RowsFold(wqkv, rows=chunk_rows(QKV_CHUNKS, "v", width))
        yield Site(
            name=wqkv,
            kind="qkv",
            consumers=(wqkv,),
            segments=self._tokens,
            sinks=self.sinks,
            fold=NormFold(f"{block}.attention_norm"),
            probe=Probe(attention, reads=wo),
        )
        yield Site(
            name=wo,
            kind="proj",
            consumers=(wo,),
            segments=self._tokens,
            sinks=self.sinks,
            fold=values_fold,
        )

    def _mlp_sites(self, block: str) -> Iterator[Site]:
        mlp = f"{block}.feed_forward"
        gate = f"{mlp}.w1"
        up = f"{mlp}.w3"
        down = f"{mlp}.w2"
        hidden = self.model.get_submodule(up).out_features
        yield Site(
            name=gate,
            kind="fc1",
            consumers=(gate, up),
            segments=self._tokens,
            sinks=self.sinks,
            fold=NormFold(f"{block}.ffn_norm"),
            probe=Probe(mlp, reads=down),
        )
        yield Site(
            name=down,
            kind="fc2",
            consumers=(down,),
            segments=self._tokens,
            sinks=self.sinks,
            fold=RowsFold(up, rows=(0, hidden), shift=False),
        )

    def _value_rotation(self, attention: str) -> HeadRotation:
        q, k, v = self.model.get_submodule(attention).sizes  # rows of wqkv
        return HeadRotation(
            linear=f"{attention}.wqkv",
            rows=(q + k, q + k + v),
            channels=self.model.head_dim,
            reader=f"{attention}.wo",
        )

    def _stream_rotation(self) -> StreamRotation:
        readers: list[str] = []
        writers: list[str] = []
        for block in self.blocks:
            readers += [f"{block}.attention.wqkv", f"{block}.feed_forward.w1"]
            writers += [f"{block}.attention.wo", f"{block}.feed_forward.w2"]
        return StreamRotation(
            channels=self.model.output.in_features,
            readers=(*readers, "output"),
            writers=tuple(writers),
            tables=self.tables,
        )

    def prepare(self) -> None:
        """Nothing to do."""

    def rows(self, tokens: Tensor, labels: Tensor) -> tuple[Rows, Rows]:
        """Conditional and unconditional rows of images with tokens (N, L), in generation order, and
        labels (N,): what a decoder feeds.

        It never feeds the last group, and the special tokens are the model's own: that leaves
        L - spe - 1 tokens.
        """
        ids = tokens[:, : -self.model.layout.group]
        no_class = torch.full_like(labels, self.model.num_classes)
        return {"ids": ids, "labels": labels}, {"ids": ids, "labels": no_class}

    def forward(self, rows: Rows) -> Tensor:
        """Logits (B, L, V)."""
        return self.model(rows["ids"], rows["labels"])
