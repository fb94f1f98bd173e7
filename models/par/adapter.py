"""PAR described for quantization: which activation feeds which linears, what absorbs a transform,
where tokens differ.

The tokens before the regular groups are sink tokens: the class token, the image tokens fed one at a
time, and the first group with its special tokens. Under static token-wise quantization each single
one has its own parameters, the first group shares one pair, and the regular groups share another.
For 4x this is {0} {1} {2} {3} {4..7} {8..}, as in the released PTQ4ARVG code, which keeps these
numbers for 16x too; here 16x is {0} .. {15} {16..31} {32..}.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.par.transformer import PAR
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
    layout = "inference"
    last_block: str
    released_block: str

    def __init__(self, model: PAR) -> None:
        self.model = model
        layout = model.layout
        dim = model.output.in_features
        self.blocks = tuple(f"layers.{i}" for i in range(len(model.layers)))
        self.last_block = self.released_block = self.blocks[-1]
        self.sinks = sinks = layout.ar + layout.group
        tokens = Segments((*range(layout.ar + 1), sinks))
        sites: list[Site] = []
        for block in self.blocks:
            attention = f"{block}.attention"
            mlp = f"{block}.feed_forward"
            norm1 = NormFold(f"{block}.attention_norm")
            norm2 = NormFold(f"{block}.ffn_norm")
            # a value head shared by several queries cannot fold
            each = model.get_submodule(attention).shared == 1
            values = RowsFold(f"{attention}.wqkv", (2 * dim, 3 * dim)) if each else None
            hidden = RowsFold(
                f"{mlp}.w3", (0, model.get_submodule(f"{mlp}.w3").out_features), shift=False
            )
            sites += [
                Site(
                    f"{attention}.wqkv",
                    "qkv",
                    (f"{attention}.wqkv",),
                    tokens,
                    sinks,
                    norm1,
                    Probe(attention, f"{attention}.wo"),
                ),
                Site(f"{attention}.wo", "proj", (f"{attention}.wo",), tokens, sinks, values),
                Site(
                    f"{mlp}.w1",
                    "fc1",
                    (f"{mlp}.w1", f"{mlp}.w3"),
                    tokens,
                    sinks,
                    norm2,
                    Probe(mlp, f"{mlp}.w2"),
                ),
                Site(f"{mlp}.w2", "fc2", (f"{mlp}.w2",), tokens, sinks, hidden),
            ]
        sites.append(Site("output", "head", ("output",), fold=NormFold("norm")))
        self.sites = tuple(sites)
        self.matmuls = tuple(
            MatMulSite(f"{block}.attention.{kind}", kind, model.head_dim)
            for block in self.blocks
            for kind in ("qk", "pv")
        )
        first = sum(model.layers[0].attention.sizes[:2])  # row of V
        self.rotations = (  # not of q and k, which the rotary embedding turns
            StreamRotation(
                dim,
                tuple(site.name for site in sites if isinstance(site.fold, NormFold)),
                tuple(
                    f"{block}.{path}"
                    for block in self.blocks
                    for path in ("attention.wo", "feed_forward.w2")
                ),
                (
                    "tok_embeddings.weight",
                    "cls_embedding.embedding_table.weight",
                    "spe_tok_embeddings.special_embeddings.weight",
                ),
            ),
            *(
                HeadRotation(
                    f"{block}.attention.wqkv",
                    (first, sum(model.layers[0].attention.sizes)),
                    model.head_dim,
                    f"{block}.attention.wo",
                )
                for block in self.blocks
            ),
        )

    def prepare(self) -> None:
        """Nothing to do."""

    def rows(self, tokens: Tensor, labels: Tensor) -> tuple[Rows, Rows]:
        """Rows of images with tokens (N, L), in generation order, and labels (N,): what a decoder
        feeds.

        It never feeds the last group, and the special tokens are the model's own: L - spe - 1
        tokens.
        """
        ids = tokens[:, : -self.model.layout.group]
        return {"ids": ids, "labels": labels}, {
            "ids": ids,
            "labels": torch.full_like(labels, self.model.num_classes),
        }

    def forward(self, rows: Rows) -> Tensor:
        """Logits (B, L, V)."""
        return self.model(rows["ids"], rows["labels"])
