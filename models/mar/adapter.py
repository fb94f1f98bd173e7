"""MAR described for quantization: which activation feeds which linears, what absorbs a transform,
where tokens differ.

The buffer tokens, which all carry the class, are the sink tokens: each has its own parameters under
static token-wise quantization, all image tokens share one more (PTQ4ARVG, section 4.2). The
released code quantizes qkv, proj, fc1 and fc2 alone; kinds `embed` and `diffusion` and the matmuls
let a scope take in the rest. The inputs of the diffusion head are tokens without a place in a
sequence, so one set of parameters serves them.

The rows go through the sampling iterations from nothing visible to nearly everything. The released
PTQ4ARVG calibration sees the last one only, when nearly all tokens are visible; the layout
`released` does the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.decoding import philox
from models.layers import chunk_rows
from models.mar.diffloss import BLOCK_CHUNKS, FINAL_CHUNKS
from models.mar.diffusion import STEPS
from models.mar.sampler import mask_lengths
from models.mar.transformer import MAR, QKV_CHUNKS
from ptq.types import (
    AdaLNFold,
    BlockForm,
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

# the rows show this many states out of a sampling run of so many iterations
ITERATIONS = 64
STATES = 16
SEED = 0  # of the rows' own draws
_GOLDEN = 0.6180339887498949  # multiples of it modulo 1 are spread evenly however many there are
BLOCK_FORM = BlockForm(
    norm1="norm1",
    qkv="attn.qkv",
    attention="attn",
    proj="attn.proj",
    norm2="norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    gelu="erf",
)


class MARAdapter:
    """Sites of a MAR in the order in which a forward pass reaches them.

    Attributes:
        layout: `inference`, or `released`: rows of the last iteration only.
    """

    family = "mar"
    block_form = BLOCK_FORM
    layout = "inference"

    def __init__(self, model: MAR) -> None:
        self.model = model
        self.sinks = model.buffer_size
        # each buffer token, and the image tokens
        self.tokens = Segments(tuple(range(self.sinks + 1)))

        encoder = [f"encoder_blocks.{i}" for i in range(len(model.encoder_blocks))]
        decoder = [f"decoder_blocks.{i}" for i in range(len(model.decoder_blocks))]
        self.blocks = (*encoder, *decoder)
        self.last_block = decoder[-1]
        self.released_block = encoder[-1]

        sites = [Site("z_proj", kind="embed", consumers=("z_proj",))]
        for block in encoder:
            sites.extend(self._block_sites(block))
        sites.append(self._between_site())
        for block in decoder:
            sites.extend(self._block_sites(block))
        sites.extend(self._diffusion_sites())
        self.sites = tuple(sites)

        matmuls: list[MatMulSite] = []
        head_rotations: list[HeadRotation] = []
        for block in self.blocks:
            head_dim = model.get_submodule(f"{block}.attn").head_dim
            matmuls.append(MatMulSite(f"{block}.attn.qk", kind="qk", channels=head_dim))
            matmuls.append(MatMulSite(f"{block}.attn.pv", kind="pv", channels=head_dim))
            head_rotations.extend(self._head_rotations(block, head_dim))
        self.matmuls = tuple(matmuls)
        self.rotations = (
            *head_rotations,
            self._encoder_rotation(encoder),
            self._decoder_rotation(decoder),
        )

    def prepare(self) -> None:
        """Nothing to do."""

    def _block_sites(self, block: str) -> Iterator[Site]:
        qkv = f"{block}.attn.qkv"
        proj = f"{block}.attn.proj"
        fc1 = f"{block}.mlp.fc1"
        fc2 = f"{block}.mlp.fc2"
        width = self.model.get_submodule(qkv).in_features
        yield Site(
            name=qkv,
            kind="qkv",
            consumers=(qkv,),
            segments=self.tokens,
            sinks=self.sinks,
            fold=NormFold(f"{block}.norm1"),
            probe=Probe(f"{block}.attn", reads=proj),
        )
        yield Site(
            name=proj,
            kind="proj",
            consumers=(proj,),
            segments=self.tokens,
            sinks=self.sinks,
            fold=RowsFold(qkv, rows=chunk_rows(QKV_CHUNKS, "v", width)),
        )
        yield Site(
            name=fc1,
            kind="fc1",
            consumers=(fc1,),
            segments=self.tokens,
            sinks=self.sinks,
            fold=NormFold(f"{block}.norm2"),
        )
        yield Site(name=fc2, kind="fc2", consumers=(fc2,), segments=self.tokens, sinks=self.sinks)

    def _between_site(self) -> Site:
        """The linear between encoder and decoder."""
        return Site(
            name="decoder_embed",
            kind="embed",
            consumers=("decoder_embed",),
            segments=self.tokens,
            sinks=self.sinks,
            fold=NormFold("encoder_norm"),
        )

    def _diffusion_sites(self) -> Iterator[Site]:
        """The diffusion head, whose modulations all read one activation."""
        head = "diffloss.net"
        depth = len(self.model.diffloss.net.res_blocks)
        residual_blocks = [f"{head}.res_blocks.{i}" for i in range(depth)]
        final_layer = f"{head}.final_layer"

        for part in ("time_embed.mlp.0", "time_embed.mlp.2", "cond_embed", "input_proj"):
            linear = f"{head}.{part}"
            yield Site(linear, kind="diffusion", consumers=(linear,))

        projections = [f"{part}.adaLN_modulation.1" for part in (*residual_blocks, final_layer)]
        yield Site(projections[0], kind="diffusion", consumers=tuple(projections))

        for block in residual_blocks:
            first = f"{block}.mlp.0"
            second = f"{block}.mlp.2"
            fold = self._diffusion_fold(block, BLOCK_CHUNKS)
            yield Site(first, kind="diffusion", consumers=(first,), fold=fold)
            yield Site(second, kind="diffusion", consumers=(second,))

        linear = f"{final_layer}.linear"
        fold = self._diffusion_fold(final_layer, FINAL_CHUNKS)
        yield Site(linear, kind="diffusion", consumers=(linear,), fold=fold)

    def _diffusion_fold(self, part: str, chunks: tuple[str, ...]) -> AdaLNFold:
        width = self.model.diffloss.net.input_proj.out_features
        return AdaLNFold(
            linear=f"{part}.adaLN_modulation.1",
            scale_rows=chunk_rows(chunks, "scale", width),
            shift_rows=chunk_rows(chunks, "shift", width),
            kappa=f"{part}.kappa",
        )

    def _head_rotations(self, block: str, head_dim: int) -> Iterator[HeadRotation]:
        qkv = f"{block}.attn.qkv"
        width = self.model.get_submodule(qkv).in_features
        first_q, _ = chunk_rows(QKV_CHUNKS, "q", width)
        _, end_k = chunk_rows(QKV_CHUNKS, "k", width)
        v_rows = chunk_rows(QKV_CHUNKS, "v", width)
        yield HeadRotation(qkv, (first_q, end_k), head_dim, reader=f"{block}.attn.qk")
        yield HeadRotation(qkv, v_rows, head_dim, reader=f"{block}.attn.proj")

    def _encoder_rotation(self, blocks: list[str]) -> StreamRotation:
        readers, writers = stream_linears(blocks)
        return StreamRotation(
            channels=self.model.z_proj.out_features,
            readers=(*readers, "decoder_embed"),
            writers=writers,
            centred=True,
            entry="z_proj_ln",
        )

    def _decoder_rotation(self, blocks: list[str]) -> StreamRotation:
        readers, writers = stream_linears(blocks)
        return StreamRotation(
            channels=self.model.decoder_embed.out_features,
            readers=readers,
            writers=("decoder_embed", *writers),
            tables=("mask_token", "decoder_pos_embed_learned"),
            centred=True,
            exit="decoder_norm",
        )

    def rows(self, tokens: Tensor, labels: Tensor) -> tuple[Rows, Rows]:
        """Conditional and unconditional rows of images with tokens (N, L, D) and labels (N,): each
        at one state of a sampling run.

        The state, the hidden tokens, and the diffusion step and noise of every token depend on the
        row's number alone.
        """
        count, length, dim = tokens.shape
        index = torch.arange(count, device=tokens.device)

        # how many tokens the row's state hides, (N,)
        hidden_counts = [length, *mask_lengths(length, ITERATIONS)[:-1]]
        state = (((index + 0.5) * _GOLDEN) % 1 * STATES).long()
        if self.layout == "released":
            state = torch.full_like(state, STATES - 1)
        iteration = state * (ITERATIONS - 1) // (STATES - 1)
        hidden = torch.tensor(hidden_counts, device=tokens.device)[iteration]

        # which ones: those that come first in a random order
        order = philox.uniform(SEED, index, 0, length).argsort(dim=1)  # (N, L)
        rank = order.argsort(dim=1)

        steps = (philox.uniform(SEED, index, 1, length) * STEPS).long()  # (N, L)
        noise = philox.normal(SEED, index, 2, length * dim)  # (N, L * D)
        rows = {
            "tokens": tokens,
            "mask": rank < hidden[:, None],
            "labels": labels,
            "t": steps,
            "noise": noise.view_as(tokens).to(tokens.dtype),
        }
        no_class = torch.full_like(labels, self.model.num_classes)
        return rows, {**rows, "labels": no_class}

    def forward(self, rows: Rows) -> Tensor:
        """The diffusion head's output (B, L, 2 D) for the hidden tokens, zero for visible ones."""
        return self.model.denoise(
            rows["tokens"], rows["mask"], rows["labels"], rows["t"], rows["noise"]
        )


def stream_linears(blocks: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites that read the residual stream of these blocks, and the linears that write to it."""
    readers: list[str] = []
    writers: list[str] = []
    for block in blocks:
        readers += [f"{block}.attn.qkv", f"{block}.mlp.fc1"]
        writers += [f"{block}.attn.proj", f"{block}.mlp.fc2"]
    return tuple(readers), tuple(writers)
