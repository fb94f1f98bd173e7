"""The nouns of the library, as plain values: what to quantize how (`QuantSpec`), where (`Site`,
`MatMulSite`), which tokens share parameters (`Segments`), what absorbs a transform (`AdaLNFold`,
`NormFold`), and the transform itself.

Adapters in `models/*/adapter.py` are built from these types and import nothing else of `ptq`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

GRANULARITIES = ("tensor", "out_channel", "in_channel", "token_static", "token_dynamic")
RANGES = ("minmax", "percentile_mse")
OBSERVERS = ("exact", "histogram")
FORMATS = ("int", "log_sqrt2", "fp8_e4m3")
LAYOUTS = ("inference", "released")

# model inputs of calibration rows; every tensor has the rows as its first dimension
Rows = Mapping[str, Tensor]
Track = Callable[[Iterable, str], Iterable]  # wraps an iterable to show progress


class ConfigError(ValueError):
    """A value the user gave is not allowed. The message is one line: field, value, what is
    allowed."""


def require(field_name: str, value: object, allowed: tuple) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{field_name}: {value!r} is not one of {', '.join(map(str, allowed))}")


@dataclass(frozen=True)
class QuantSpec:
    """How one operand is quantized.

    Attributes:
        bits: 2 to 8. Codes are 0 .. 2^bits - 1 with a zero point.
        symmetric: the zero point is 2^(bits - 1) and the range is centred on zero.
        granularity: which values share a scale and zero point.
            | word          | operand          | one (scale, zero point) per        | found          |
            | tensor        | any              | tensor                             | in calibration |
            | out_channel   | weight (O, I)    | row                                | from the weight|
            | in_channel    | input (..., C)   | channel; a calibration device only | in calibration |
            | token_static  | input (B, T, C)  | segment of token positions         | in calibration |
            | token_dynamic | input (..., C)   | token (last dimension)             | at run time    |
        range: `minmax`, or `percentile_mse`: of the two-sided percentiles .999, .9999, .99999 the
            one with the least mean squared quantization error.
        observer: how calibration batches are summarised for `percentile_mse`: `exact` order
            statistics (two passes) or a `histogram` (one pass, approximate).
        include_zero: stretch the range to contain zero. format: `int`, or a format of
            `numbers/formats.py`, all with
        the zero point 0: `log_sqrt2` of non-negative values, or
            `fp8_e4m3`.
    """

    bits: int = 8
    symmetric: bool = False
    granularity: str = "tensor"
    range: str = "percentile_mse"
    observer: str = "exact"
    include_zero: bool = False
    format: str = "int"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 2 <= self.bits <= 8:
            raise ConfigError(f"bits: {self.bits!r} is not an integer from 2 to 8")
        require("granularity", self.granularity, GRANULARITIES)
        require("range", self.range, RANGES)
        require("observer", self.observer, OBSERVERS)
        require("format", self.format, FORMATS)
        if self.format == "fp8_e4m3" and self.bits != 8:
            raise ConfigError(
                f"bits: {self.bits} does not go with the format fp8_e4m3, allowed is 8"
            )

    @property
    def levels(self) -> int:
        return 2**self.bits

    def at(self, granularity: str) -> QuantSpec:
        """The same spec at another granularity."""
        return replace(self, granularity=granularity)


@dataclass(frozen=True)
class Segments:
    """Contiguous groups of token positions: group g covers starts[g] .. starts[g + 1] - 1, the last
    one all the rest.

    Positions before starts[0] fall into group 0.
    """

    starts: tuple[int, ...] = (0,)

    def __len__(self) -> int:
        return len(self.starts)

    def index(self, positions: Tensor) -> Tensor:
        """Group (T,) of each position (T,)."""
        starts = torch.tensor(self.starts, device=positions.device)
        return (torch.searchsorted(starts, positions, right=True) - 1).clamp_(min=0)


@dataclass(frozen=True)
class AdaLNFold:
    """A site fed by LN(h) * (kappa + scale(c)) + shift(c), where scale and shift are rows of the
    projection `linear`.

    `scale_rows` and `shift_rows` are (first, end) row ranges; `kappa` names a buffer (C,): the
    literal 1 of AdaLN, kept as a vector so that a scale can be folded into it.
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

    The rows of V (the average of values keeps a scale, and a shift because attention weights sum to
    one), or the up projection of a gated MLP, whose product with the gate keeps a scale only
    (`shift` is False).
    """

    linear: str
    rows: tuple[int, int]
    shift: bool = True


Fold = AdaLNFold | NormFold | RowsFold


@dataclass(frozen=True)
class Probe:
    """Where a site's effect is judged: `module` is run again on its recorded arguments with
    candidates in place of the site's linears, and what comes out is compared, or with `reads` what
    arrives at the linear of that name."""

    module: str
    reads: str | None = None


@dataclass(frozen=True)
class Site:
    """An activation and the linear layers that read it.

    Attributes:
        name: module path of the first consumer. kind: qkv, proj, fc1, fc2, head or adaln.
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
    """A product of two activations: `qk` scores or the `pv` average of values. `channels`: of a
    head."""

    name: str
    kind: str
    channels: int


@dataclass(frozen=True)
class HeadRotation:
    """Rows of the linear `linear` that hold heads of `channels` each, which may be rotated for
    good, all by one R.

    Either rows of V, whose average the site `reader` takes in, or rows of Q and K, between which
    and the product `reader` stands nothing that a rotation of both changes.
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
        writers: linears whose outputs are added to the stream. tables: parameters (..., C) that
            are.
        centred: the norms subtract the mean, which then every writer does beforehand.
        entry: norm whose output enters the stream. exit: norm of the stream whose output is no
            reader's alone.
    """

    channels: int
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    tables: tuple[str, ...] = ()
    centred: bool = False
    entry: str | None = None
    exit: str | None = None


class Rotation(Protocol):
    """An orthogonal map R of channels, the same for an activation and for the weight that reads
    it."""

    def __call__(self, x: Tensor) -> Tensor:
        """x R along the last dimension."""


@dataclass(frozen=True)
class LowRank:
    """A branch in full precision beside the quantized weight: down A (r, C) and up B (O, r)."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class InputTransform:
    """What a site's input becomes, and what of its weights is left to quantize.

        x' = ((x - shift) / scale) R          W' = W diag(scale) R - B A         b' = b + W shift
        y  = Q(x') Q(W')^T + (x' A^T) B^T + b'

    Attributes:
        scale, shift: (C,). rotation: R, or None. low_rank: A and B (of all consumers, stacked), or
            None.
    """

    scale: Tensor
    shift: Tensor
    rotation: Rotation | None = None
    low_rank: LowRank | None = None

    @classmethod
    def identity(cls, channels: int, like: Tensor) -> InputTransform:
        return cls(like.new_ones(channels), like.new_zeros(channels))

    @property
    def diagonal(self) -> InputTransform:
        """Scale and shift alone."""
        return InputTransform(self.scale, self.shift)

    def then(self, after: InputTransform) -> InputTransform:
        """The transform that applies `self` first and `after` second.

        Raises:
            ConfigError: it would not be of this form: a diagonal step follows a rotation, or a step
                a low-rank branch.
        """
        if self.rotation is not None and not after.is_diagonal_identity():
            raise ConfigError(
                "method: a scale or shift cannot follow a rotation, allowed is the other order"
            )
        if self.low_rank is not None or (self.rotation is not None and after.rotation is not None):
            raise ConfigError(
                "method: nothing can follow a low-rank branch, and no rotation another one"
            )
        return InputTransform(
            self.scale * after.scale,
            self.shift + self.scale * after.shift,
            self.rotation or after.rotation,
            after.low_rank,
        )

    def is_diagonal_identity(self) -> bool:
        return bool((self.scale == 1).all()) and not bool(self.shift.any())

    def __call__(self, x: Tensor) -> Tensor:
        """x' of x (..., C)."""
        x = (x - self.shift) / self.scale
        return x if self.rotation is None else self.rotation(x)

    def on_weight(self, weight: Tensor) -> Tensor:
        """W' of the stacked weights W (O, C)."""
        weight = weight * self.scale
        if self.rotation is not None:
            weight = self.rotation(weight)
        return weight if self.low_rank is None else weight - self.low_rank.up @ self.low_rank.down


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration rows. `conditional` (n,) tells which rows carry a class; `meta` says how they
    were chosen."""

    rows: Rows
    conditional: Tensor
    meta: Mapping[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.conditional)

    def batches(self, size: int) -> list[Rows]:
        """The rows in order, at most `size` at a time."""
        return [
            {k: v[i : i + size] for k, v in self.rows.items()} for i in range(0, len(self), size)
        ]


class Adapter(Protocol):
    """What quantization knows of a model.

    Attributes:
        family: whose released code it goes with (`released_families.RELEASED`).
        layout: one of `LAYOUTS`: calibration rows are made and run as inference sees them, or as
            the released PTQ4ARVG code has them: VAR without its mask, MAR in the last sampling
            iteration; to RAR and PAR both are the same.
    """

    family: str
    layout: str
    model: nn.Module
    sites: tuple[Site, ...]
    matmuls: tuple[MatMulSite, ...]
    rotations: tuple[HeadRotation | StreamRotation, ...]  # that can be done offline
    blocks: tuple[str, ...]  # the transformer's blocks in forward order
    last_block: str  # module whose output describes a calibration sample
    released_block: str  # the same in the released code
    sinks: int  # leading sink tokens of the sequence

    def prepare(self) -> None:
        """Bring the model into the form that the sites describe; what it computes stays the
        same."""

    def rows(self, tokens: Tensor, labels: Tensor) -> tuple[Rows, Rows]:
        """Calibration rows of generated images: conditional ones, and their unconditional guidance
        twins."""

    def forward(self, rows: Rows) -> Tensor:
        """Teacher-forced logits in the adapter's layout."""
