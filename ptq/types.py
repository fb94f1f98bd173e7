"""The nouns of the library, as plain values: what to quantize how (`QuantSpec`), where (`Site`, `MatMulSite`), which
tokens share parameters (`Segments`), what absorbs a transform (`AdaLNFold`, `NormFold`), and the transform itself.

Adapters in `models/*/adapter.py` are built from these types and import nothing else of `ptq`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

GRANULARITIES = ("tensor", "out_channel", "in_channel", "token_static", "token_dynamic")
RANGES = ("minmax", "percentile_mse")
OBSERVERS = ("exact", "histogram")

Rows = Mapping[str, Tensor]  # model inputs of calibration rows; every tensor has the rows as its first dimension


class ConfigError(ValueError):
    """A value the user gave is not allowed. The message is one line: field, value, what is allowed."""


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
        range: `minmax`, or `percentile_mse`: of the two-sided percentiles .999, .9999, .99999 the one with the least
            mean squared quantization error.
        observer: how calibration batches are summarised for `percentile_mse`: `exact` order statistics (two passes) or
            a `histogram` (one pass, approximate).
        include_zero: stretch the range to contain zero.
    """

    bits: int = 8
    symmetric: bool = False
    granularity: str = "tensor"
    range: str = "percentile_mse"
    observer: str = "exact"
    include_zero: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 2 <= self.bits <= 8:
            raise ConfigError(f"bits: {self.bits!r} is not an integer from 2 to 8")
        require("granularity", self.granularity, GRANULARITIES)
        require("range", self.range, RANGES)
        require("observer", self.observer, OBSERVERS)

    @property
    def levels(self) -> int:
        return 2**self.bits

    def at(self, granularity: str) -> QuantSpec:
        """The same spec at another granularity."""
        return replace(self, granularity=granularity)


@dataclass(frozen=True)
class Segments:
    """Contiguous groups of token positions: group g covers starts[g] .. starts[g + 1] - 1, the last one all the rest.

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
    """A site fed by LN(h) * (kappa + scale(c)) + shift(c), where scale and shift are rows of the projection `linear`.

    `scale_rows` and `shift_rows` are (first, end) row ranges; `kappa` names a buffer (C,).
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
class Site:
    """An activation and the linear layers that read it.

    Attributes:
        name: module path of the first consumer. kind: qkv, proj, fc1, fc2, head or adaln.
        consumers: module paths of all linears that read this activation.
        segments: position groups with their own parameters under static token-wise quantization.
        sinks: leading token positions (of the full sequence) left out of scaling statistics.
        fold: what absorbs a per-channel scale and shift exactly; None if nothing does.
    """

    name: str
    kind: str
    consumers: tuple[str, ...]
    segments: Segments = Segments()
    sinks: int = 0
    fold: AdaLNFold | NormFold | None = None


@dataclass(frozen=True)
class MatMulSite:
    """A product of two activations: `qk` scores or the `pv` average of values."""

    name: str
    kind: str


@dataclass(frozen=True)
class InputTransform:
    """x' = (x - shift) / scale at a site, undone in the weights: W' = W diag(scale), b' = b + W shift."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def identity(cls, channels: int, like: Tensor) -> InputTransform:
        return cls(like.new_ones(channels), like.new_zeros(channels))

    def then(self, after: InputTransform) -> InputTransform:
        """The transform that applies `self` first and `after` second."""
        return InputTransform(self.scale * after.scale, self.shift + self.scale * after.shift)

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration rows. `conditional` (n,) tells which rows carry a class; `meta` says how they were chosen."""

    rows: Rows
    conditional: Tensor
    meta: Mapping[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.conditional)

    def batches(self, size: int) -> list[Rows]:
        """The rows in order, at most `size` at a time."""
        return [{k: v[i:i + size] for k, v in self.rows.items()} for i in range(0, len(self), size)]


class Adapter(Protocol):
    """What quantization knows of a model."""

    model: nn.Module
    sites: tuple[Site, ...]
    matmuls: tuple[MatMulSite, ...]
    last_block: str  # module whose output describes a calibration sample
    sinks: int  # leading sink tokens of the sequence

    def rows(self, tokens: Tensor, labels: Tensor) -> tuple[Rows, Rows]:
        """Calibration rows of generated images: conditional ones, and their unconditional guidance twins."""

    def forward(self, rows: Rows) -> Tensor:
        """Teacher-forced logits in the layout of inference."""
