"""How an operand is quantized (`QuantSpec`), the words that configs may use for it, and the error
that a wrong word raises."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

GRANULARITIES = ("tensor", "out_channel", "in_channel", "token_static", "token_dynamic")
RANGES = ("minmax", "percentile_mse", "grid")
OBSERVERS = ("exact", "histogram")
FORMATS = ("int", "log_sqrt2", "fp8_e4m3", "numerators")


class ConfigError(ValueError):
    """A value the user gave is not allowed. One line: field, value, what is allowed."""


def require(field_name: str, value: object, allowed: tuple) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{field_name}: {value!r} is not one of {', '.join(map(str, allowed))}")


def require_agreement(noun: str, places: Mapping[str, Collection[str]]) -> None:
    """Refuse a program in which a name is known in one place and unknown in another.

    Args:
        places: names by the place that lists them.

    Raises:
        ConfigError: one line: the name, where it is, and where it is missing.
    """
    for name in sorted(set().union(*places.values())):
        there = [place for place, names in places.items() if name in names]
        missing = [place for place, names in places.items() if name not in names]
        if missing:
            raise ConfigError(
                f"{noun}: {name} is in {' and '.join(there)}, "
                f"but missing in {' and '.join(missing)}"
            )


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
        format: `int`, or one of the formats of `numbers/formats.py`, whose zero point is 0:
            `log_sqrt2` of non-negative values, or `fp8_e4m3`.

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
        require("format", self.format, FORMATS)
        if self.format == "fp8_e4m3" and self.bits != 8:
            raise ConfigError(
                f"bits: {self.bits} does not go with the format fp8_e4m3, allowed is 8"
            )

    @property
    def levels(self) -> int:
        """The number of codes."""
        return 2**self.bits

    def at(self, granularity: str) -> QuantSpec:
        """The same spec at another granularity."""
        return replace(self, granularity=granularity)
