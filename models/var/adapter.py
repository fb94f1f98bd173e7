"""VAR described for quantization: which activation feeds which linears, what absorbs a transform,
where tokens differ.

Position 0, the start token, is the sink token (PTQ4ARVG, Figure 1). Tokens come image scale by
image scale, coarse ones first. Under static token-wise quantization the inputs of mat_qkv and fc1
have parameters per image scale, those of proj and fc2 for the start token and for the rest. The
AdaLN input is one class vector without a position. The projection of a shared AdaLN serves all
blocks, so that no block can fold a transform of its own into the projection's rows; those sites
have no fold.

The calibration forward applies the block-causal mask, so that every token sees what it sees in
inference. The released PTQ4ARVG calibration has no mask and lets coarse scales see finer ones; the
paper's numbers came from that, and the layout `released` does the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.var.tokenizer import MultiScaleQuantizer
from models.var.transformer import VAR
from ptq.types import AdaLNFold, HeadRotation, MatMulSite, Probe, Rows, RowsFold, Segments, Site

SINKS = 1


@torch.no_grad()
def fuse_qkv_bias(model: VAR) -> None:
    """Move the separate biases of q, k and v into `mat_qkv.bias`, in place; the model's outputs
    stay the same.

    What is left of the separate biases is zero, so a second call changes nothing.
    """
    for block in model.blocks:
        attn = block.attn
        linear = block.attn.mat_qkv
        bias = attn.qkv_bias() if linear.bias is None else linear.bias + attn.qkv_bias()
        linear.bias = nn.Parameter(bias, requires_grad=False)
        for part in (attn.q_bias, attn.zero_k_bias, attn.v_bias):
            part.zero_()


class VARAdapter:
    """Sites of a VAR in the order in which a forward pass reaches them.

    Args:
        quantizer: the tokenizer's; it turns calibration tokens into transformer inputs.

    Attributes:
        layout: `inference`, or `released`: calibrate without the mask.
    """

    family = "var"
    layout = "inference"
    last_block: str
    released_block: str
    sinks = SINKS

    def __init__(self, model: VAR, quantizer: MultiScaleQuantizer) -> None:
        self.model = model
        self.quantizer = quantizer
        self.blocks = tuple(f"blocks.{i}" for i in range(len(model.blocks)))
        self.last_block = self.released_block = self.blocks[-1]
        dim = model.head.in_features
        shared = model.shared_ada_lin is not None
        rows = [(n * dim, (n + 1) * dim) for n in range(6)]
        # rows of ada_lin: gate1, gate2, scale1, scale2, shift1, shift2; of mat_qkv: q, k, v; of
        # head_nm: scale, shift
        scales = Segments(tuple(begin for begin, _ in model.spans))
        start = Segments((0, SINKS))
        sites: list[Site] = []
        if shared:
            sites.append(Site("shared_ada_lin.1", "adaln", ("shared_ada_lin.1",)))
        for block in self.blocks:
            attention = mlp = None
            values = RowsFold(f"{block}.attn.mat_qkv", rows[2])
            probe = Probe(f"{block}.attn", f"{block}.attn.proj")
            projection = f"{block}.ada_lin.1"
            if not shared:
                attention = AdaLNFold(projection, rows[2], rows[4], f"{block}.kappa1")
                mlp = AdaLNFold(projection, rows[3], rows[5], f"{block}.kappa2")
                sites.append(Site(projection, "adaln", (projection,)))
            sites += [
                Site(
                    f"{block}.attn.mat_qkv",
                    "qkv",
                    (f"{block}.attn.mat_qkv",),
                    scales,
                    SINKS,
                    attention,
                    probe,
                ),
                Site(f"{block}.attn.proj", "proj", (f"{block}.attn.proj",), start, SINKS, values),
                Site(f"{block}.ffn.fc1", "fc1", (f"{block}.ffn.fc1",), scales, SINKS, mlp),
                Site(f"{block}.ffn.fc2", "fc2", (f"{block}.ffn.fc2",), start, SINKS),
            ]
        projection = "head_nm.ada_lin.1"
        head = AdaLNFold(projection, rows[0], rows[1], "head_nm.kappa")
        sites += [
            Site(projection, "adaln", (projection,)),
            Site("head", "head", ("head",), fold=head),
        ]
        self.sites = tuple(sites)
        size = model.blocks[0].attn.head_dim
        self.matmuls = tuple(
            MatMulSite(f"{block}.attn.{kind}", kind, size)
            for block in self.blocks
            for kind in ("qk", "pv")
        )
        self.rotations = tuple(  # queries and keys are unit vectors, and a rotation leaves them so
            rotation
            for block in self.blocks
            for rotation in (
                HeadRotation(f"{block}.attn.mat_qkv", (0, 2 * dim), size, f"{block}.attn.qk"),
                HeadRotation(
                    f"{block}.attn.mat_qkv", (2 * dim, 3 * dim), size, f"{block}.attn.proj"
                ),
            )
        )

    def prepare(self) -> None:
        """Give `mat_qkv` the biases that stand beside it, so that V's can be folded into."""
        fuse_qkv_bias(self.model)

    def rows(self, tokens: Tensor, labels: Tensor) -> tuple[Rows, Rows]:
        """Rows of images with tokens (N, L) and labels (N,): what inference feeds, all scales but
        the last."""
        ids = tokens[:, : self.model.spans[-1][0]]
        uncond = torch.full_like(labels, self.model.num_classes)
        return {"ids": ids, "label": labels}, {"ids": ids, "label": uncond}

    def forward(self, rows: Rows) -> Tensor:
        """Logits (B, L, V)."""
        inputs = self.quantizer.teacher_inputs(rows["ids"])
        return self.model(rows["label"], inputs, masked=self.layout == "inference")
