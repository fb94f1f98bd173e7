"""What quantization knows of a model, as plain values: where to quantize (`Site`, `MatMulSite`),
which tokens share parameters (`Segments`), what absorbs a transform (`AdaLNFold`, `NormFold`,
`RowsFold`), what may be rotated for good, and the calibration rows.

`Adapter` puts them together. There is one per family of models (`models/*/adapter.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ptq.options import KINDS
from ptq.spec import ATTENTION_OPERANDS, require

LAYOUTS = ("inference", "released")

# model inputs of calibration rows; every tensor has the rows as its first dimension
Rows = Mapping[str, Tensor]
# wraps an iterable, with the name of the work, to show progress
Track = Callable[[Iterable, str], Iterable]


@dataclass(frozen=True)
class Segments:
    """Contiguous groups of token positions.

    Group g covers the positions starts[g] .. starts[g + 1] - 1, the last group all that follow.
    Positions before starts[0] fall into group 0.
    """

    starts: tuple[int, ...] = (0,)

    def __len__(self) -> int:
        return len(self.starts)

    def index(self, positions: Tensor) -> Tensor:
        """Group (T,) of each position (T,)."""
        starts = torch.tensor(self.starts, device=positions.device)  # (G,)
        return (torch.searchsorted(starts, positions, right=True) - 1).clamp_(min=0)


@dataclass(frozen=True)
class AdaLNFold:
    """A site fed by LN(h) * (kappa + scale(c)) + shift(c), where scale(c) and shift(c) are rows of
    the projection `linear`.

    Attributes:
        scale_rows, shift_rows: (first, end) row ranges of the projection.
        kappa: name of a buffer (C,): the literal 1 of AdaLN, kept as a vector so that a scale can
            be folded into it.
    """

    linear: str
    scale_rows: tuple[int, int]
    shift_rows: tuple[int, int]
    kappa: str


@dataclass(frozen=True)
class NormFold:
    """A site fed by an affine norm: the module `norm` has `weight` (C,) and `bias` (C,) or None."""

    norm: str


@dataclass(frozen=True)
class RowsFold:
    """A site whose channels are rows of the linear `linear`, passed on channel by channel.

    Either the rows of V: the average of values keeps a scale, and a shift too, because attention
    weights sum to one. Or the up projection of a gated MLP, whose product with the gate keeps a
    scale only (`shift` is False).
    """

    linear: str
    rows: tuple[int, int]
    shift: bool = True


Fold = AdaLNFold | NormFold | RowsFold


@dataclass(frozen=True)
class Probe:
    """Where a site's effect is judged: `module` is run again on its recorded arguments, with
    candidates in place of the site's linears.

    Attributes:
        reads: the linear whose input is compared; None compares the output of `module`.
    """

    module: str
    reads: str | None = None


@dataclass(frozen=True)
class Site:
    """An activation and the linear layers that read it.

    Attributes:
        name: module path of the first consumer.
        kind: qkv, proj, fc1, fc2, head or adaln.
        consumers: module paths of all linears that read this activation.
        segments: position groups with their own parameters under static token-wise quantization.
        sinks: leading token positions (of the full sequence) left out of scaling statistics.
        fold: what absorbs a per-channel scale and shift exactly; None if nothing does.
        probe: where candidates for the site are judged; None stands for the outputs of its linears.
    """

    name: str
    kind: str
    consumers: tuple[str, ...]
    segments: Segments = Segments()
    sinks: int = 0
    fold: Fold | None = None
    probe: Probe | None = None


@dataclass(frozen=True)
class MatMulSite:
    """A product of two activations.

    Attributes:
        kind: `qk`, the attention scores, or `pv`, the average of values.
        channels: of a head.
    """

    name: str
    kind: str
    channels: int

    def role(self, operand: str) -> str:
        """Which of `ATTENTION_OPERANDS` its operand `a` or `b` is."""
        first, second = ("q", "k") if self.kind == "qk" else ("p", "v")
        return first if operand == "a" else second


@dataclass(frozen=True)
class HeadRotation:
    """Rows of the linear `linear` that hold heads of `channels` each, which may be rotated for
    good, all by one R.

    Either rows of V, whose average the site `reader` takes in, or rows of Q and K, if nothing
    stands between them and the product `reader` that a rotation of both would change.
    """

    linear: str
    rows: tuple[int, int]
    channels: int
    reader: str


@dataclass(frozen=True)
class StreamRotation:
    """A residual stream that may be rotated for good, h -> h R: norms alone stand between it and
    its readers.

    Attributes:
        channels: of the stream.
        readers: sites fed by a norm of the stream (`Site.fold` is a `NormFold`).
        writers: linears whose outputs are added to the stream.
        tables: parameters (..., C) that are added to it.
        centred: the norms subtract the mean, which then every writer does beforehand.
        entry: norm whose output enters the stream.
        exit: norm of the stream whose output is no reader's alone.
    """

    channels: int
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    tables: tuple[str, ...] = ()
    centred: bool = False
    entry: str | None = None
    exit: str | None = None


@dataclass(frozen=True)
class BlockForm:
    """A transformer block of the form

        h = norm1(x) * (kappa1 + scale_msa) + shift_msa
        x = x + gate_msa * proj(attention(qkv(h)))
        h = norm2(x) * (kappa2 + scale_mlp) + shift_mlp
        x = x + gate_mlp * fc2(gelu(fc1(h)))

    whose parts have these names in it, for kernels that run it as a whole (`int8/blocks`).

    Attributes:
        norm1, norm2: LayerNorms.
        gelu: form of GELU, `erf` or `tanh`.
        chunks: what the modulation holds, in this order; none without AdaLN.
        kappa1, kappa2: buffers (C,); with AdaLN alone.
        projection: SiLU and the linear layer whose output the modulation is; None if it is not the
            block's.
        q_norm, k_norm: LayerNorms of every head's queries and keys, if there are any.
        query_scale: method that gives the factors (1, H, 1, 1) of queries where queries and keys
            are unit vectors.
        loose_bias: parameters that attention adds to the output of qkv, which `Adapter.prepare`
            leaves zero.
    """

    norm1: str
    qkv: str
    attention: str
    proj: str
    norm2: str
    fc1: str
    fc2: str
    gelu: str
    chunks: tuple[str, ...] = ()
    kappa1: str | None = None
    kappa2: str | None = None
    projection: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    query_scale: str | None = None
    loose_bias: tuple[str, ...] = ()


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration rows.

    Attributes:
        conditional: (n,), which rows carry a class.
        meta: how the rows were chosen.
    """

    rows: Rows
    conditional: Tensor
    meta: Mapping[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.conditional)

    def batches(self, size: int) -> list[Rows]:
        """The rows in order, at most `size` at a time."""
        parts: list[Rows] = []
        for first in range(0, len(self), size):
            end = first + size
            parts.append({name: tensor[first:end] for name, tensor in self.rows.items()})
        return parts


class Adapter(Protocol):
    """What quantization knows of a model.

    Attributes:
        family: whose released code it goes with (`released/families.py`).
        layout: one of `LAYOUTS`: calibration rows are made and run as inference sees them, or as
            the released PTQ4ARVG code has them: VAR without its mask, MAR in the last sampling
            iteration; to RAR and PAR both are the same.
        rotations: what can be rotated offline.
        blocks: the transformer's blocks in forward order.
        last_block: module whose output describes a calibration sample.
        released_block: the same in the released code.
        sinks: leading sink tokens of the sequence.
        block_form: that of all `blocks`, or None: they have another.
    """

    family: str
    layout: str
    model: nn.Module
    sites: tuple[Site, ...]
    matmuls: tuple[MatMulSite, ...]
    rotations: tuple[HeadRotation | StreamRotation, ...]
    blocks: tuple[str, ...]
    last_block: str
    released_block: str
    sinks: int
    block_form: BlockForm | None

    def prepare(self) -> None:
        """Bring the model into the form that the sites describe; what it computes stays the
        same."""

    def rows(self, tokens: Tensor, labels: Tensor) -> tuple[Rows, Rows]:
        """Calibration rows of generated images: conditional ones, and their unconditional guidance
        twins."""

    def forward(self, rows: Rows) -> Tensor:
        """Teacher-forced logits in the adapter's layout."""


@dataclass(frozen=True)
class Scope:
    """What is quantized: kinds of sites, whether the attention products are, and which of their
    operands. Keys and values are what the KV cache holds."""

    kinds: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2", "head", "adaln")
    matmuls: bool = True
    operands: tuple[str, ...] = ATTENTION_OPERANDS

    def __post_init__(self) -> None:
        for kind in self.kinds:
            require("scope.kinds", kind, KINDS)
        for operand in self.operands:
            require("scope.operands", operand, ATTENTION_OPERANDS)

    def sites(self, adapter: Adapter) -> list[Site]:
        return [site for site in adapter.sites if site.kind in self.kinds]

    def products(self, adapter: Adapter) -> list[MatMulSite]:
        return list(adapter.matmuls) if self.matmuls else []

    def within(self, limits: Scope) -> Scope:
        """What of it lies in another scope."""
        kinds = tuple(kind for kind in self.kinds if kind in limits.kinds)
        operands = tuple(name for name in self.operands if name in limits.operands)
        return Scope(kinds, self.matmuls and limits.matmuls, operands)


def block_number(adapter: Adapter, name: str) -> int | None:
    """Which of the adapter's blocks a module is in; None: in none."""
    for number, block in enumerate(adapter.blocks):
        if name.startswith(f"{block}."):
            return number
    return None


def product_segments(adapter: Adapter, product: MatMulSite) -> Segments:
    """The segments of positions in an attention: those of the input of its queries and keys."""
    block = block_number(adapter, product.name)
    for site in adapter.sites:
        if site.kind == "qkv" and block_number(adapter, site.name) == block:
            return site.segments
    return Segments()
