"""How an operand is quantized (`QuantSpec`), and the words that configs may use for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ptq.registry.entries import FORMATS
from ptq.registry.refusals import ConfigError, require

GRANULARITIES = ("tensor", "out_channel", "in_channel", "token_static", "token_dynamic")
RANGES = ("minmax", "percentile_mse", "grid")
OBSERVERS = ("exact", "histogram")
__all__ = ["GRANULARITIES", "OBSERVERS", "RANGES", "ConfigError", "QuantSpec", "require"]


@dataclass(frozen=True)
class QuantSpec:
    """How one operand is quantized.

    Attributes:
        bits: 2 to 8. Codes are 0 .. 2^bits - 1 with a zero point.
        symmetric: the zero point is 2^(bits - 1) and the range is centred on zero.
        granularity: which values share a scale and zero point.
            | word          | operand         | one (scale, zero point) per  | found           |
            | tensor        | any             | tensor                       | in calibration  |
            | out_channel   | weight (O, I)   | row                          | from the weight |
            | in_channel    | input (..., C)  | channel, to calibrate only   | in calibration  |
            | token_static  | input (B, T, C) | segment of token positions   | in calibration  |
            | token_dynamic | input (..., C)  | token (last dimension)       | at run time     |
        range: `minmax`, or `percentile_mse`: of the two-sided percentiles .999, .9999, .99999 the
            one with the least mean squared quantization error; or `grid`: the best of a finer grid
            of ranges (`numbers/range_grid.py`).
        observer: how calibration batches are summarised for `percentile_mse`: `exact` order
            statistics (two passes) or a `histogram` (one pass, approximate).
        include_zero: stretch the range to contain zero.
        format: `int`, or another number format (`registry.FORMATS`), such as those of
            `numbers/formats.py`.

    Raises:
        ConfigError: a value is not allowed.
    """

    bits: int = 8
    symmetric: bool = False
    granularity: str = "tensor"
    range: str = "percentile_mse"
    observer: str = "exact"
    include_zero: bool = False
    format: str = "int"

    def __post_init__(self) -> None:
        # True and False are integers to Python
        is_integer = isinstance(self.bits, int) and not isinstance(self.bits, bool)
        if not is_integer or not 2 <= self.bits <= 8:
            raise ConfigError(f"bits: {self.bits!r} is not an integer from 2 to 8")
        require("granularity", self.granularity, GRANULARITIES)
        require("range", self.range, RANGES)
        require("observer", self.observer, OBSERVERS)
        if self.format == "int":
            return
        bits = FORMATS[self.format].bits
        if bits is not None and self.bits != bits:
            raise ConfigError(
                f"bits: {self.bits} does not go with the format {self.format}, allowed is {bits}"
            )

    @property
    def levels(self) -> int:
        """The number of codes."""
        return 2**self.bits

    def at(self, granularity: str) -> QuantSpec:
        """The same spec at another granularity."""
        return replace(self, granularity=granularity)
