"""Settings of the methods that have any beyond an on/off switch, as values; the defaults are the
authors' own.

`conf/method/*_paper.yaml` holds what PTQ4ARVG's Table 7 states instead.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ptq.ranges import Flag, Integer, ListOf, Number, Range, Word, check_value
from ptq.spec import ConfigError

# names of input transforms, in the order in which they are solved: diagonal steps, then a rotation,
# then a low-rank branch
TRANSFORMS = (
    "smoothquant",
    "os_plus",
    "repq",
    "shift",
    "gps",
    "geometric",
    "hadamard",
    "block_hadamard",
    "svd",
)
GPS_FORMS = ("squares", "eq16")
KINDS = ("qkv", "proj", "fc1", "fc2", "head", "adaln", "embed", "diffusion")  # of sites


# counts that no calibration reaches
ROWS = Integer(1, 100_000)
STEPS = Integer(1, 100_000)
SITES = ListOf(Word(*KINDS))
# by the name of the method's switch and of the field
OPTION_RANGES: dict[str, Range] = {
    "os_plus.floor": Number(0, 1, above=True, below=True),
    "os_plus.steps": STEPS,
    "os_plus.rows": ROWS,
    "os_plus.spread": Flag(),
    "repq.lowest": Number(0, 1e12, above=True),
    "repq.highest": Number(0, 1e12, above=True),
    "hadamard.sites": SITES,
    "hadamard.offline": Flag(),
    "svd.sites": SITES,
    "svd.rank": Integer(1, 65_536),
    "svd.iterations": STEPS,
    "svd.grid": Flag(),
    "svd.alpha": Number(0, 1),
    "svd.rows": ROWS,
    "svd.spread": Flag(),
    "omniquant.epochs": Integer(0, 10_000),
    "omniquant.batch": ROWS,
    "omniquant.clip_lr": Number(0, 1, above=True),
    "omniquant.transform_lr": Number(0, 1, above=True),
    "omniquant.clip": Flag(),
    "omniquant.transform": Flag(),
    "omniquant.values": Flag(),
    "omniquant.alpha": Number(0, 1),
    "omniquant.second_loss": Flag(),
    "gptq.damping": Number(0, 100, above=True),
    "gptq.block": Integer(1, 65_536),
    "geometric.sites": SITES,
    "geometric.online": SITES,
    "geometric.shift": Flag(),
    "geometric.steps": STEPS,
    "sink_shift.sites": SITES,
    "gptaq.damping": Number(0, 100, above=True),
    "gptaq.block": Integer(1, 65_536),
    "gptaq.correction": Number(0, 1),
}


def check_ranges(options: object, group: str) -> None:
    """Refuse a setting outside its range.

    Raises:
        ConfigError: the line names the setting as a config does.
    """
    for entry in fields(options):
        name = f"{group}.{entry.name}"
        check_value(f"method.options.{name}", getattr(options, entry.name), OPTION_RANGES[name])


@dataclass(frozen=True)
class OSPlus:
    """Outlier Suppression+: the search for the clipping threshold.

    Attributes:
        floor: smallest threshold tried, relative to the largest shifted magnitude (the authors'
            absolute floors leave the grid empty where activations are small).
        steps: thresholds tried at least; one per 0.5 where activations are large.
        rows: calibration rows that shift and threshold are found on.
        spread: they lie evenly over all, as the recipe has it; otherwise they are the first, as
            with the authors' one batch, and conditional ones, since selectors keep their order. (An
            option at its default is no part of a run's hash, so this one stays.)
    """

    floor: float = 0.02
    steps: int = 100
    rows: int = 16
    spread: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "os_plus")


@dataclass(frozen=True)
class RepQ:
    """RepQ-ViT's scale reparameterisation.

    Attributes:
        lowest, highest: bounds of a channel's scale over the mean scale.
    """

    lowest: float = 1e-3
    highest: float = 1e3

    def __post_init__(self) -> None:
        check_ranges(self, "repq")
        if self.lowest > self.highest:
            raise ConfigError(
                f"method.options.repq.lowest: {self.lowest} is not at most {self.highest}, "
                "the highest"
            )


@dataclass(frozen=True)
class Hadamard:
    """QuaRot's rotations.

    Attributes:
        sites: whose inputs are rotated online.
        offline: rotate for good wherever that is exact, whatever the site, and online only what is
            left.
    """

    sites: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2", "head", "adaln")
    offline: bool = True

    def __post_init__(self) -> None:
        check_ranges(self, "hadamard")


@dataclass(frozen=True)
class SVDQuant:
    """SVDQuant's low-rank branch.

    Attributes:
        rank: of the branch.
        iterations: alternations of branch and rounding, ended early when the output error rises.
        grid: search the smoothing exponents for the least output error; without it they are `alpha`
            and 1 - alpha.
        rows: calibration rows that output errors are judged on.
        spread: as for OS+.
    """

    sites: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2", "head", "adaln", "embed", "diffusion")
    rank: int = 32
    iterations: int = 100
    grid: bool = True
    alpha: float = 0.5
    rows: int = 16
    spread: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "svd")


@dataclass(frozen=True)
class OmniQuant:
    """OmniQuant's training, block by block.

    Attributes:
        epochs: passes over the calibration rows per block.
        batch: rows per step.
        clip_lr, transform_lr: AdamW learning rates of the weight clipping and of the transforms.
        clip: learn the clipping.
        transform: learn scale and shift at the method's sites (qkv and fc1).
        values: learn scale and shift between V and proj.
        alpha: of the SmoothQuant start.
        second_loss: add the distance to the full-precision block on quantized inputs.
    """

    epochs: int = 20
    batch: int = 1
    clip_lr: float = 1e-2
    transform_lr: float = 5e-3
    clip: bool = True
    transform: bool = True
    values: bool = True
    alpha: float = 0.5
    second_loss: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "omniquant")


@dataclass(frozen=True)
class GPTQ:
    """GPTQ rounding.

    Attributes:
        damping: share of the mean diagonal added to the Hessian.
        block: columns per lazy update.
    """

    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        check_ranges(self, "gptq")


@dataclass(frozen=True)
class Geometric:
    """The scale as a geometric program.

    Attributes:
        sites: whose inputs are scaled. online: of these, the kinds where vectors run online if
            nothing absorbs the scale; other such sites are left alone.
        shift: subtract the mean of each channel, too. steps: of Adam.
    """

    sites: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2", "head")
    online: tuple[str, ...] = ("fc2",)
    shift: bool = True
    steps: int = 60

    def __post_init__(self) -> None:
        check_ranges(self, "geometric")


@dataclass(frozen=True)
class SinkShift:
    """The sites whose sink tokens are shifted."""

    sites: tuple[str, ...] = ("qkv", "fc1", "fc2")

    def __post_init__(self) -> None:
        check_ranges(self, "sink_shift")


@dataclass(frozen=True)
class GPTAQ:
    """Rounding for rounded inputs. `damping`, `block`: as for GPTQ. `correction`: share of the step
    to the weight that is best for rounded inputs."""

    damping: float = 0.01
    block: int = 128
    correction: float = 0.5

    def __post_init__(self) -> None:
        check_ranges(self, "gptaq")


@dataclass(frozen=True)
class Options:
    """The settings of all methods, by the name of the switch that turns the method on."""

    os_plus: OSPlus = OSPlus()
    repq: RepQ = RepQ()
    hadamard: Hadamard = Hadamard()
    svd: SVDQuant = SVDQuant()
    omniquant: OmniQuant = OmniQuant()
    gptq: GPTQ = GPTQ()
    geometric: Geometric = Geometric()
    sink_shift: SinkShift = SinkShift()
    gptaq: GPTAQ = GPTAQ()
