"""How an operand is quantized (`QuantSpec`), and the words that configs may use for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ptq.registry.entries import FORMATS
from ptq.registry.refusals import ConfigError, require

WEIGHT_GRANULARITIES = ("out_channel", "tensor", "group")
ACTIVATION_GRANULARITIES = (
    "tensor",
    "token_dynamic",
    "group",
    "group_dynamic",
    "head",
    "head_segment",
    "channel",
)
GRANULARITIES = (
    *dict.fromkeys((*WEIGHT_GRANULARITIES, *ACTIVATION_GRANULARITIES)),
    "in_channel",
    "token_static",
)
DYNAMIC = ("token_dynamic", "group_dynamic")  # found at run time
# what attention multiplies: queries with keys, attention weights with values
ATTENTION_OPERANDS = ("q", "k", "p", "v")
BY_HEAD = ("head", "head_segment")  # of operands of attention
BY_GROUP = ("group", "group_dynamic")  # need a group size
HIGH_PRECISION = 16  # bits of an operand that is left as it is
RANGES = ("minmax", "percentile_mse", "grid")
OBSERVERS = ("exact", "histogram")
__all__ = [
    "ACTIVATION_GRANULARITIES",
    "ATTENTION_OPERANDS",
    "DYNAMIC",
    "GRANULARITIES",
    "HIGH_PRECISION",
    "OBSERVERS",
    "RANGES",
    "WEIGHT_GRANULARITIES",
    "ConfigError",
    "QuantSpec",
    "require",
]


@dataclass(frozen=True)
class QuantSpec:
    """How one operand is quantized.

    Attributes:
        bits: 2 to 8. Codes are 0 .. 2^bits - 1 with a zero point. 16: the operand is left as it is.
        symmetric: the zero point is 2^(bits - 1) and the range is centred on zero.
        granularity: which values share a scale and zero point.
            | word          | operand         | one (scale, zero point) per     | found           |
            | tensor        | any             | tensor                          | in calibration  |
            | out_channel   | weight (O, I)   | row                             | from the weight |
            | group         | weight (O, I)   | row and group of columns        | from the weight |
            | group         | input (..., C)  | group of channels               | in calibration  |
            | group_dynamic | input (..., C)  | token and group of channels     | at run time     |
            | token_dynamic | input (..., C)  | token (last dimension)          | at run time     |
            | token_static  | input (B, T, C) | segment of token positions, and | in calibration  |
            |               |                 | group where there is a size     |                 |
            | head          | q, k, p, v      | head                            | in calibration  |
            | head_segment  | q, k, p, v      | head and segment of positions   | in calibration  |
            | channel       | input (..., C)  | channel; of q, k, v in a head   | in calibration  |
            | in_channel    | input (..., C)  | channel, for methods to measure | in calibration  |
            q, k, v are operands of attention (B, H, T, D), p the attention weights (B, H, T, S).
            Where a word does not apply, one pair serves the tensor: `head` of an input without
            heads, `group` and `channel` of attention weights, whose last dimension is the keys.
        group_size: neighbours in a group; the last group of a row has what is left, as in GPTQ's
            code, and a row that is shorter than a group is one. None without groups.
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
    group_size: int | None = None

    def __post_init__(self) -> None:
        # True and False are integers to Python
        is_integer = isinstance(self.bits, int) and not isinstance(self.bits, bool)
        if not is_integer or not (2 <= self.bits <= 8 or self.bits == HIGH_PRECISION):
            raise ConfigError(f"bits: {self.bits!r} is not an integer from 2 to 8, or 16")
        require("granularity", self.granularity, GRANULARITIES)
        require("range", self.range, RANGES)
        require("observer", self.observer, OBSERVERS)
        self._check_groups()
        if self.format != "int" and self.is_rounded:
            self._check_format()

    def _check_groups(self) -> None:
        """Refuse groups without a size, and a size without groups."""
        if self.group_size is None:
            if self.granularity in BY_GROUP:
                raise ConfigError(
                    f"group_size: null does not go with granularity={self.granularity}, "
                    "allowed is the number of channels in a group"
                )
            return
        if self.granularity not in (*BY_GROUP, "token_static"):
            raise ConfigError(
                f"group_size: {self.group_size!r} does not go with granularity={self.granularity}, "
                f"allowed is null, or granularity={' or '.join(BY_GROUP)}"
            )
        is_integer = isinstance(self.group_size, int) and not isinstance(self.group_size, bool)
        if not is_integer or self.group_size < 1:
            raise ConfigError(f"group_size: {self.group_size!r} is not an integer of at least 1")

    def _check_format(self) -> None:
        """Refuse what a number format does not have."""
        number_format = FORMATS[self.format]
        if number_format.bits and self.bits not in number_format.bits:
            allowed = " or ".join(str(bits) for bits in number_format.bits)
            raise ConfigError(
                f"bits: {self.bits} does not go with the format {self.format}, allowed is {allowed}"
            )
        if number_format.block is None:
            return
        if self.group_size != number_format.block:
            raise ConfigError(
                f"group_size: {self.group_size} does not go with the format {self.format}, "
                f"whose blocks are of {number_format.block}"
            )
        if self.range != "minmax":
            raise ConfigError(
                f"range: {self.range} does not go with the format {self.format}, whose scales "
                "follow the largest magnitude of a block, allowed is minmax"
            )

    @property
    def is_rounded(self) -> bool:
        """Whether the operand is quantized at all."""
        return self.bits < HIGH_PRECISION

    @property
    def is_dynamic(self) -> bool:
        """Whether ranges are found at run time."""
        return self.granularity in DYNAMIC

    @property
    def levels(self) -> int:
        """The number of codes."""
        return 2**self.bits

    def at(self, granularity: str) -> QuantSpec:
        """The same spec at another granularity, which keeps groups if it can have them."""
        keeps_groups = granularity in (*BY_GROUP, "token_static")
        size = self.group_size if keeps_groups else None
        return replace(self, granularity=granularity, group_size=size)

    def at_run_time(self) -> QuantSpec:
        """The same spec with a range per token, or per token and group, found at run time."""
        return self.at("token_dynamic" if self.group_size is None else "group_dynamic")
