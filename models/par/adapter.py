"""PAR described for quantization: which activation feeds which linears, what absorbs a transform, where tokens differ.

The tokens before the regular groups are sink tokens: the class token, the image tokens fed one at a time, and the first
group with its special tokens. Under static token-wise quantization each single one has its own parameters, the first
group shares one pair, and the regular groups share another. For 4x this is {0} {1} {2} {3} {4..7} {8..}, as in the
released PTQ4ARVG code, which keeps these numbers for 16x too; here 16x is {0} .. {15} {16..31} {32..}.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.par.transformer import PAR
from ptq.types import MatMulSite, NormFold, Rows, Segments, Site


class PARAdapter:
    """Sites of a PAR in the order in which a forward pass reaches them."""

    last_block: str

    def __init__(self, model: PAR) -> None:
        self.model = model
        depth, layout = len(model.layers), model.layout
        self.last_block = f"layers.{depth - 1}"
        self.sinks = sinks = layout.ar + layout.group
        tokens = Segments((*range(layout.ar + 1), sinks))
        sites: list[Site] = []
        for i in range(depth):
            attention, mlp = f"layers.{i}.attention", f"layers.{i}.feed_forward"
            norm1, norm2 = NormFold(f"layers.{i}.attention_norm"), NormFold(f"layers.{i}.ffn_norm")
            sites += [
                Site(f"{attention}.wqkv", "qkv", (f"{attention}.wqkv",), tokens, sinks, norm1),
                Site(f"{attention}.wo", "proj", (f"{attention}.wo",), tokens, sinks),
                Site(f"{mlp}.w1", "fc1", (f"{mlp}.w1", f"{mlp}.w3"), tokens, sinks, norm2),
                Site(f"{mlp}.w2", "fc2", (f"{mlp}.w2",), tokens, sinks),
            ]
        sites.append(Site("output", "head", ("output",), fold=NormFold("norm")))
        self.sites = tuple(sites)
        self.matmuls = tuple(
            MatMulSite(f"layers.{i}.attention.{kind}", kind) for i in range(depth) for kind in ("qk", "pv")
        )

    def rows(self, tokens: Tensor, labels: Tensor) -> tuple[Rows, Rows]:
        """Rows of images with tokens (N, L), in generation order, and labels (N,): what a decoder feeds.

        It never feeds the last group, and the special tokens are the model's own: L - spe - 1 tokens.
        """
        ids = tokens[:, :-self.model.layout.group]
        return {"ids": ids, "labels": labels}, {"ids": ids, "labels": torch.full_like(labels, self.model.num_classes)}

    def forward(self, rows: Rows) -> Tensor:
        """Logits (B, L, V)."""
        return self.model(rows["ids"], rows["labels"])
