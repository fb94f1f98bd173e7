"""RAR described for quantization: which activation feeds which linears, what absorbs a transform,
where tokens differ.

Positions 0 (cls) and 1 (condition) are sink tokens (PTQ4ARVG, Figure 1) and have their own
parameters under static token-wise quantization; the AdaLN inputs vary with the position and have
one pair per position (paper section 4.2).
"""

from __future__ import annotations

from torch import Tensor

from models.rar.transformer import RAR
from ptq.types import AdaLNFold, HeadRotation, MatMulSite, Probe, Rows, RowsFold, Segments, Site

SINKS = 2


class RARAdapter:
    """Sites of a RAR in the order in which a forward pass reaches them."""

    family = "rar"
    layout = "inference"
    last_block: str
    released_block: str
    sinks = SINKS

    def __init__(self, model: RAR) -> None:
        self.model = model
        self.blocks = tuple(f"blocks.{i}" for i in range(len(model.blocks)))
        self.last_block = self.released_block = self.blocks[-1]
        dim = model.lm_head.in_features
        length = model.image_seq_len
        tokens = Segments(tuple(range(SINKS + 1)))
        every = Segments(tuple(range(length + 1)))
        sites: list[Site] = []
        for block in self.blocks:
            # rows: shift, scale, gate of attention, then of the MLP
            projection = f"{block}.adaLN_modulation.1"
            rows = [(n * dim, (n + 1) * dim) for n in range(6)]
            values = RowsFold(f"{block}.attn.qkv", rows[2])
            probe = Probe(f"{block}.attn", f"{block}.attn.proj")
            attention = AdaLNFold(projection, rows[1], rows[0], f"{block}.kappa1")
            mlp = AdaLNFold(projection, rows[4], rows[3], f"{block}.kappa2")
            sites += [
                Site(projection, "adaln", (projection,), every),
                Site(
                    f"{block}.attn.qkv",
                    "qkv",
                    (f"{block}.attn.qkv",),
                    tokens,
                    SINKS,
                    attention,
                    probe,
                ),
                Site(f"{block}.attn.proj", "proj", (f"{block}.attn.proj",), tokens, SINKS, values),
                Site(f"{block}.mlp.fc1", "fc1", (f"{block}.mlp.fc1",), tokens, SINKS, mlp),
                Site(f"{block}.mlp.fc2", "fc2", (f"{block}.mlp.fc2",), tokens, SINKS),
            ]
        projection = "adaln_before_head.adaLN_modulation.1"  # rows: scale, shift
        head = AdaLNFold(projection, (0, dim), (dim, 2 * dim), "adaln_before_head.kappa")
        sites += [
            Site(projection, "adaln", (projection,), Segments(tuple(range(1, length + 1)))),
            Site("lm_head", "head", ("lm_head",), fold=head),
        ]
        self.sites = tuple(sites)
        size = model.blocks[0].attn.head_dim
        self.matmuls = tuple(
            MatMulSite(f"{block}.attn.{kind}", kind, size)
            for block in self.blocks
            for kind in ("qk", "pv")
        )
        self.rotations = tuple(  # V alone: the norms of q and k do not commute with a rotation
            HeadRotation(f"{block}.attn.qkv", (2 * dim, 3 * dim), size, f"{block}.attn.proj")
            for block in self.blocks
        )

    def prepare(self) -> None:
        """Nothing to do."""

    def rows(self, tokens: Tensor, labels: Tensor) -> tuple[Rows, Rows]:
        """Rows of images with tokens (N, L) and labels (N,): what a decoder feeds, the first L - 1
        tokens."""
        ids = tokens[:, :-1]
        condition = self.model.condition_ids(labels)
        uncond = condition.new_full(condition.shape, self.model.none_condition)
        return {"ids": ids, "condition": condition}, {"ids": ids, "condition": uncond}

    def forward(self, rows: Rows) -> Tensor:
        """Logits (B, L, V)."""
        return self.model(rows["ids"], rows["condition"])
