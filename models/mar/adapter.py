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

import torch
from torch import Tensor

from models.decoding import philox
from models.mar.diffusion import STEPS
from models.mar.sampler import mask_lengths
from models.mar.transformer import MAR
from ptq.types import (
    AdaLNFold,
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


class MARAdapter:
    """Sites of a MAR in the order in which a forward pass reaches them.

    Attributes:
        layout: `inference`, or `released`: rows of the last iteration only.
    """

    family = "mar"
    layout = "inference"
    last_block: str
    released_block: str

    def __init__(self, model: MAR) -> None:
        self.model = model
        self.sinks = model.buffer_size
        blocks = {
            half: [f"{half}.{i}" for i in range(len(getattr(model, half)))]
            for half in ("encoder_blocks", "decoder_blocks")
        }
        self.blocks = (*blocks["encoder_blocks"], *blocks["decoder_blocks"])
        self.last_block = self.blocks[-1]
        self.released_block = blocks["encoder_blocks"][-1]
        tokens = Segments(tuple(range(self.sinks + 1)))
        self.sites = (
            Site("z_proj", "embed", ("z_proj",)),
            *(site for block in blocks["encoder_blocks"] for site in self._block(block, tokens)),
            Site(
                "decoder_embed",
                "embed",
                ("decoder_embed",),
                tokens,
                self.sinks,
                NormFold("encoder_norm"),
            ),
            *(site for block in blocks["decoder_blocks"] for site in self._block(block, tokens)),
            *self._head("diffloss.net"),
        )
        heads = [(block, model.get_submodule(f"{block}.attn").head_dim) for block in self.blocks]
        self.matmuls = tuple(
            MatMulSite(f"{block}.attn.{kind}", kind, size)
            for block, size in heads
            for kind in ("qk", "pv")
        )
        self.rotations = (
            *(rotation for block, size in heads for rotation in self._heads(block, size)),
            self._stream(blocks["encoder_blocks"], ("decoder_embed",), entry="z_proj_ln"),
            self._stream(
                blocks["decoder_blocks"],
                writers=("decoder_embed",),
                tables=("mask_token", "decoder_pos_embed_learned"),
                exit="decoder_norm",
            ),
        )

    def prepare(self) -> None:
        """Nothing to do."""

    def _block(self, block: str, tokens: Segments) -> tuple[Site, ...]:
        dim = self.model.get_submodule(f"{block}.norm1").normalized_shape[0]
        qkv, proj, fc1, fc2 = (
            f"{block}.{path}" for path in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        )
        return (
            Site(
                qkv,
                "qkv",
                (qkv,),
                tokens,
                self.sinks,
                NormFold(f"{block}.norm1"),
                Probe(f"{block}.attn", proj),
            ),
            Site(proj, "proj", (proj,), tokens, self.sinks, RowsFold(qkv, (2 * dim, 3 * dim))),
            Site(fc1, "fc1", (fc1,), tokens, self.sinks, NormFold(f"{block}.norm2")),
            Site(fc2, "fc2", (fc2,), tokens, self.sinks),
        )

    def _heads(self, block: str, size: int) -> tuple[HeadRotation, HeadRotation]:
        qkv = f"{block}.attn.qkv"
        dim = self.model.get_submodule(qkv).in_features
        return (
            HeadRotation(qkv, (0, 2 * dim), size, f"{block}.attn.qk"),
            HeadRotation(qkv, (2 * dim, 3 * dim), size, f"{block}.attn.proj"),
        )

    def _stream(
        self,
        blocks: list[str],
        readers: tuple[str, ...] = (),
        writers: tuple[str, ...] = (),
        tables: tuple[str, ...] = (),
        entry: str | None = None,
        exit: str | None = None,
    ) -> StreamRotation:
        """The residual stream of the encoder or decoder; these read and write it beside its
        blocks."""
        return StreamRotation(
            self.model.get_submodule(f"{blocks[0]}.norm1").normalized_shape[0],
            (
                *(f"{block}.{path}" for block in blocks for path in ("attn.qkv", "mlp.fc1")),
                *readers,
            ),
            (
                *writers,
                *(f"{block}.{path}" for block in blocks for path in ("attn.proj", "mlp.fc2")),
            ),
            tables,
            centred=True,
            entry=entry,
            exit=exit,
        )

    def _head(self, net: str) -> list[Site]:
        """The diffusion head: all modulations read one activation; their rows are shift, scale and,
        in blocks, gate."""
        width = self.model.diffloss.net.input_proj.out_features
        names = [f"{net}.res_blocks.{i}" for i in range(len(self.model.diffloss.net.res_blocks))]
        last = f"{net}.final_layer"

        def fold(part: str) -> AdaLNFold:
            return AdaLNFold(
                f"{part}.adaLN_modulation.1", (width, 2 * width), (0, width), f"{part}.kappa"
            )

        modulations = tuple(f"{part}.adaLN_modulation.1" for part in (*names, last))
        sites = [
            Site(path, "diffusion", (path,))
            for path in (
                f"{net}.time_embed.mlp.0",
                f"{net}.time_embed.mlp.2",
                f"{net}.cond_embed",
                f"{net}.input_proj",
            )
        ]
        sites.append(Site(modulations[0], "diffusion", modulations))
        for name in names:
            sites.append(Site(f"{name}.mlp.0", "diffusion", (f"{name}.mlp.0",), fold=fold(name)))
            sites.append(Site(f"{name}.mlp.2", "diffusion", (f"{name}.mlp.2",)))
        return [*sites, Site(f"{last}.linear", "diffusion", (f"{last}.linear",), fold=fold(last))]

    def rows(self, tokens: Tensor, labels: Tensor) -> tuple[Rows, Rows]:
        """Rows of images with tokens (N, L, D) and labels (N,): each at one state of a sampling
        run.

        The state, the hidden tokens, and the diffusion step and noise of every token depend on the
        row's number alone.
        """
        n, length, dim = tokens.shape
        index = torch.arange(n, device=tokens.device)
        lengths = torch.tensor(
            [length, *mask_lengths(length, ITERATIONS)[:-1]], device=tokens.device
        )
        state = (((index + 0.5) * _GOLDEN) % 1 * STATES).long()
        if self.layout == "released":
            state = torch.full_like(state, STATES - 1)
        hidden = lengths[state * (ITERATIONS - 1) // (STATES - 1)]
        rank = philox.uniform(SEED, index, 0, length).argsort(dim=1).argsort(dim=1)
        rows = {
            "tokens": tokens,
            "mask": rank < hidden[:, None],
            "labels": labels,
            "t": (philox.uniform(SEED, index, 1, length) * STEPS).long(),
            "noise": philox.normal(SEED, index, 2, length * dim).view_as(tokens).to(tokens.dtype),
        }
        return rows, {**rows, "labels": torch.full_like(labels, self.model.num_classes)}

    def forward(self, rows: Rows) -> Tensor:
        """The diffusion head's output (B, L, 2 D) for the hidden tokens, zero for the visible
        ones."""
        return self.model.denoise(
            rows["tokens"], rows["mask"], rows["labels"], rows["t"], rows["noise"]
        )
