"""VAR described for quantization: which activation feeds which linears, what absorbs a transform,
where tokens differ.

Position 0, the start token, is the sink token (PTQ4ARVG, Figure 1). Tokens come image scale by
image scale, coarse ones first. Under static token-wise quantization the inputs of mat_qkv and fc1
have parameters per image scale, those of proj and fc2 for the start token and for the rest. The
AdaLN input is one class vector without a position. The projection of a shared AdaLN serves all
blocks, so no block can fold a transform of its own into the projection's rows; those sites have no
fold.

The calibration forward applies the block-causal mask, so that every token sees what it sees in
inference. The released PTQ4ARVG calibration has no mask and lets coarse scales see finer ones; the
paper's numbers came from that, and the layout `released` does the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.layers import chunk_rows
from models.var.tokenizer import MultiScaleQuantizer
from models.var.transformer import ADALN_CHUNKS, HEAD_CHUNKS, QKV_CHUNKS, VAR
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

SINKS = 1
BLOCK_FORM = BlockForm(
    norm1="ln_wo_grad",
    qkv="attn.mat_qkv",
    attention="attn",
    proj="attn.proj",
    norm2="ln_wo_grad",
    fc1="ffn.fc1",
    fc2="ffn.fc2",
    gelu="tanh",
    chunks=ADALN_CHUNKS,
    kappa1="kappa1",
    kappa2="kappa2",
    query_scale="attn.query_scale",
    loose_bias=("attn.q_bias", "attn.zero_k_bias", "attn.v_bias"),
)


class VARAdapter:
    """Sites of a VAR in the order in which a forward pass reaches them.

    Args:
        quantizer: the tokenizer's; it turns calibration tokens into transformer inputs.

    Attributes:
        layout: `inference`, or `released`: calibrate without the mask.
    """

    family = "var"
    block_form = BLOCK_FORM
    layout = "inference"
    sinks = SINKS

    def __init__(self, model: VAR, quantizer: MultiScaleQuantizer) -> None:
        self.model = model
        self.quantizer = quantizer
        self.dim = model.head.in_features
        self.head_dim = model.blocks[0].attn.head_dim

        self.blocks = tuple(f"blocks.{i}" for i in range(len(model.blocks)))
        self.last_block = self.blocks[-1]
        self.released_block = self.blocks[-1]

        sites: list[Site] = []
        matmuls: list[MatMulSite] = []
        rotations: list[HeadRotation] = []
        if model.shared_ada_lin is not None:
            sites.append(adaln_site("shared_ada_lin.1"))
        for block in self.blocks:
            sites.extend(self._block_sites(block))
            matmuls.append(MatMulSite(f"{block}.attn.qk", kind="qk", channels=self.head_dim))
            matmuls.append(MatMulSite(f"{block}.attn.pv", kind="pv", channels=self.head_dim))
            rotations.extend(self._head_rotations(block))
        sites.extend(self._head_sites())
        self.sites = tuple(sites)
        self.matmuls = tuple(matmuls)
        self.rotations = tuple(rotations)

    def _block_sites(self, block: str) -> Iterator[Site]:
        qkv = f"{block}.attn.mat_qkv"
        proj = f"{block}.attn.proj"
        fc1 = f"{block}.ffn.fc1"
        fc2 = f"{block}.ffn.fc2"
        scales = Segments(tuple(begin for begin, _ in self.model.spans))
        start_and_rest = Segments((0, SINKS))

        attention_fold = mlp_fold = None
        if self.model.shared_ada_lin is None:
            projection = f"{block}.ada_lin.1"
            yield adaln_site(projection)
            attention_fold = AdaLNFold(
                linear=projection,
                scale_rows=chunk_rows(ADALN_CHUNKS, "scale_msa", self.dim),
                shift_rows=chunk_rows(ADALN_CHUNKS, "shift_msa", self.dim),
                kappa=f"{block}.kappa1",
            )
            mlp_fold = AdaLNFold(
                linear=projection,
                scale_rows=chunk_rows(ADALN_CHUNKS, "scale_mlp", self.dim),
                shift_rows=chunk_rows(ADALN_CHUNKS, "shift_mlp", self.dim),
                kappa=f"{block}.kappa2",
            )
        yield Site(
            name=qkv,
            kind="qkv",
            consumers=(qkv,),
            segments=scales,
            sinks=SINKS,
            fold=attention_fold,
            probe=Probe(f"{block}.attn", reads=proj),
        )
        yield Site(
            name=proj,
            kind="proj",
            consumers=(proj,),
            segments=start_and_rest,
            sinks=SINKS,
            fold=RowsFold(qkv, rows=chunk_rows(QKV_CHUNKS, "v", self.dim)),
        )
        yield Site(
            name=fc1, kind="fc1", consumers=(fc1,), segments=scales, sinks=SINKS, fold=mlp_fold
        )
        yield Site(name=fc2, kind="fc2", consumers=(fc2,), segments=start_and_rest, sinks=SINKS)

    def _head_sites(self) -> Iterator[Site]:
        projection = "head_nm.ada_lin.1"
        yield adaln_site(projection)
        fold = AdaLNFold(
            linear=projection,
            scale_rows=chunk_rows(HEAD_CHUNKS, "scale", self.dim),
            shift_rows=chunk_rows(HEAD_CHUNKS, "shift", self.dim),
            kappa="head_nm.kappa",
        )
        yield Site(name="head", kind="head", consumers=("head",), fold=fold)

    def _head_rotations(self, block: str) -> Iterator[HeadRotation]:
        """Queries and keys are unit vectors, and a rotation leaves them so."""
        qkv = f"{block}.attn.mat_qkv"
        first_q, _ = chunk_rows(QKV_CHUNKS, "q", self.dim)
        _, end_k = chunk_rows(QKV_CHUNKS, "k", self.dim)
        v_rows = chunk_rows(QKV_CHUNKS, "v", self.dim)
        yield HeadRotation(qkv, (first_q, end_k), self.head_dim, reader=f"{block}.attn.qk")
        yield HeadRotation(qkv, v_rows, self.head_dim, reader=f"{block}.attn.proj")

    def prepare(self) -> None:
        """Give `mat_qkv` the biases that stand beside it, so that V's can be folded into."""
        fuse_qkv_bias(self.model)

    def rows(self, tokens: Tensor, labels: Tensor) -> tuple[Rows, Rows]:
        """Conditional and unconditional rows of images with tokens (N, L) and labels (N,): what
        inference feeds, all scales but the last."""
        first_of_last_scale, _ = self.model.spans[-1]
        ids = tokens[:, :first_of_last_scale]
        no_class = torch.full_like(labels, self.model.num_classes)
        return {"ids": ids, "label": labels}, {"ids": ids, "label": no_class}

    def forward(self, rows: Rows) -> Tensor:
        """Logits (B, L, V)."""
        inputs = self.quantizer.teacher_inputs(rows["ids"])
        return self.model(rows["label"], inputs, masked=self.layout == "inference")


def adaln_site(projection: str) -> Site:
    """The site of an AdaLN projection: the class vector feeds it, so no token has a position."""
    return Site(name=projection, kind="adaln", consumers=(projection,))


@torch.no_grad()
def fuse_qkv_bias(model: VAR) -> None:
    """Move the separate biases of q, k and v into `mat_qkv.bias`, in place; outputs stay the same.

    What is left of the separate biases is zero, so a second call changes nothing.
    """
    for block in model.blocks:
        attention = block.attn
        linear = attention.mat_qkv
        bias = attention.qkv_bias()
        if linear.bias is not None:
            bias = linear.bias + bias
        linear.bias = nn.Parameter(bias, requires_grad=False)
        for part in (attention.q_bias, attention.zero_k_bias, attention.v_bias):
            part.zero_()
