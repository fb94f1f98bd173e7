"""Settings of the methods that have any beyond an on/off switch, as values; the defaults are the
authors' own.

`conf/method/*_paper.yaml` holds what PTQ4ARVG's Table 7 states instead.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def _positive(options: object, group: str, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not value > 0:
            raise ConfigError(f"method.options.{group}.{name}: {value} is not positive")


@dataclass(frozen=True)
class OSPlus:
    """Outlier Suppression+: the search for the clipping threshold.

    Attributes:
        floor: smallest threshold tried, relative to the largest shifted magnitude (the authors'
            absolute floors leave the grid empty where activations are small).
        steps: thresholds tried at least; one per 0.5 where activations are large.
        rows: calibration rows that shift and threshold are found on.
        spread: they lie evenly over all, as the recipe has it; otherwise they are the first, as with the authors' one batch,
            and conditional ones, since selectors keep their order. (An option at its default is no
            part of a run's hash, so this one stays.)
    """

    floor: float = 0.02
    steps: int = 100
    rows: int = 16
    spread: bool = False

    def __post_init__(self) -> None:
        _positive(self, "os_plus", "floor", "steps", "rows")
        if self.floor >= 1:
            raise ConfigError(f"method.options.os_plus.floor: {self.floor} is not below 1")


@dataclass(frozen=True)
class RepQ:
    """RepQ-ViT's scale reparameterisation.

    Attributes:
        lowest, highest: bounds of a channel's scale over the mean scale.
    """

    lowest: float = 1e-3
    highest: float = 1e3

    def __post_init__(self) -> None:
        _positive(self, "repq", "lowest", "highest")
        if self.lowest > self.highest:
            raise ConfigError(
                f"method.options.repq.lowest: {self.lowest} is not at most {self.highest}, the highest"
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
        _positive(self, "svd", "rank", "iterations", "rows")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"method.options.svd.alpha: {self.alpha} is not between 0 and 1")


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
        _positive(self, "omniquant", "batch", "clip_lr", "transform_lr")
        if self.epochs < 0:
            raise ConfigError(f"method.options.omniquant.epochs: {self.epochs} is negative")
        for name in ("clip_lr", "transform_lr"):
            if not getattr(self, name) <= 1:
                raise ConfigError(
                    f"method.options.omniquant.{name}: {getattr(self, name)} is not at most 1"
                )
        if not 0 <= self.alpha <= 1:
            raise ConfigError(
                f"method.options.omniquant.alpha: {self.alpha} is not between 0 and 1"
            )


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
        _positive(self, "gptq", "damping", "block")


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
        _positive(self, "geometric", "steps")


@dataclass(frozen=True)
class SinkShift:
    """The sites whose sink tokens are shifted."""

    sites: tuple[str, ...] = ("qkv", "fc1", "fc2")


@dataclass(frozen=True)
class GPTAQ:
    """Rounding for rounded inputs. `damping`, `block`: as for GPTQ. `correction`: share of the step
    to the weight that is best for rounded inputs."""

    damping: float = 0.01
    block: int = 128
    correction: float = 0.5

    def __post_init__(self) -> None:
        _positive(self, "gptaq", "damping", "block")
        if not 0 <= self.correction <= 1:
            raise ConfigError(
                f"method.options.gptaq.correction: {self.correction} is not between 0 and 1"
            )


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
