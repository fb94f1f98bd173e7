"""The options of `experiments.speed`: what to measure, and the settings of each benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.config.overrides import RUN
from experiments.options import option, option_names, parse_options
from experiments.registry.labels import method_place
from experiments.registry.tables import override_key
from ptq.spec import ConfigError

BLOCK_VARIANTS = (
    "fp32",
    "tf32",
    "bf16_eager",
    "bf16",
    "int8",
    "int8_stwq",
    "int8_stwq_symmetric",
    "int8_stwq_all",
    "int8_stwq_paper",
    "int8_staq",
    "int8_staq_paper",
    "int8_dynamic",
    "int8_quarot",
    "fp8",
    "simulated",
)
GENERATE_VARIANTS = (
    "fp32",
    "tf32",
    "bf16",
    "int8",
    "int8_stwq",
    "int8_stwq_all",
    "int8_stwq_paper",
    "int8_staq_paper",
    "simulated",
)
SAMPLE_VARIANTS = ("fp32", "static", "dynamic")
SAMPLE_WAYS = ("eager", "replayed")
BASELINE_HELP = "folder of a checkout of a former revision, whose BF16 is timed in turn"
METHODS = sorted(  # in the order of tables, those without a name there last
    (name for name in RUN.group_choices("method") if name != "fp"),
    key=method_place,
)


@dataclass(frozen=True)
class CalibrateOptions:
    """Cost of calibration."""

    methods: list[str] | None = option(
        None, help="recipes; null: all that the model's family allows", choices=METHODS
    )
    blocks: int | None = option(
        None,
        help="blocks that OmniQuant trains, its time is scaled to all; null: all",
        at_least=1,
        at_most=10_000,
    )
    repeats: int = option(1, help="measurements of every method", at_least=1, at_most=10_000)


@dataclass(frozen=True)
class BlockOptions:
    """A forward pass of all blocks."""

    batch: int = option(100, help="images", at_least=1, at_most=100_000)
    lengths: list[int] = option(
        (64, 128, 256), help="tokens of an image", at_least=1, at_most=100_000
    )
    variants: list[str] = option(
        BLOCK_VARIANTS, help="ways to compute that are compared", choices=BLOCK_VARIANTS
    )
    rounds: int = option(30, help="timed passes of each", at_least=1, at_most=1_000_000)
    profile: bool = option(False, help="print where the time goes")
    baseline: str | None = option(None, help=BASELINE_HELP)


@dataclass(frozen=True)
class GenerateOptions:
    """Whole generation of a batch of images."""

    batch: list[int] = option((100,), help="images at a time", at_least=1, at_most=100_000)
    variants: list[str] = option(
        GENERATE_VARIANTS, help="ways to compute that are compared", choices=GENERATE_VARIANTS
    )
    repeats: int = option(
        3,
        help="timed generations of each, after one that compiles and captures",
        at_least=1,
        at_most=10_000,
    )
    baseline: str | None = option(None, help=BASELINE_HELP)


@dataclass(frozen=True)
class SampleOptions:
    """A micro-batch of images as runs make it."""

    batch: list[int] = option((128,), help="images at a time", at_least=1, at_most=100_000)
    variants: list[str] = option(
        SAMPLE_VARIANTS, help="full precision, static or dynamic ranges", choices=SAMPLE_VARIANTS
    )
    ways: list[str] = option(
        SAMPLE_WAYS, help="kernels started one by one, or replayed", choices=SAMPLE_WAYS
    )


BENCHMARK_OPTIONS = {
    "calibrate": CalibrateOptions,
    "blocks": BlockOptions,
    "generate": GenerateOptions,
    "sample": SampleOptions,
}
# overrides that a benchmark sets unless they are given
BLOCK_DEFAULTS = ("scope=blocks", "quant=w8a8", "calib=random", "calib.n=8")
DEFAULTS = {
    "calibrate": ("quant=w8a8",),
    "blocks": BLOCK_DEFAULTS,
    "generate": BLOCK_DEFAULTS,
    "sample": ("scope=paper", "quant=w6a6", "calib=random", "calib.n=8"),
}


@dataclass
class Options:
    """What to measure."""

    what: str = option(
        "calibrate",
        help="the cost of calibration, of a pass of all blocks, of generating images, or of a "
        "micro-batch as runs make it",
        choices=tuple(BENCHMARK_OPTIONS),
    )


def parse_benchmark(
    what: str, arguments: Sequence[str]
) -> tuple[CalibrateOptions | BlockOptions | GenerateOptions | SampleOptions, list[str]]:
    """The settings of a benchmark, and the overrides for every config.

    Raises:
        ConfigError: a value is not allowed.
    """
    kind = BENCHMARK_OPTIONS[what]
    options, overrides = parse_options(kind, arguments)
    RUN.check(overrides, ["what", *option_names(kind)])
    refuse_method(what, overrides)
    return options, with_defaults(overrides, DEFAULTS[what])


def refuse_method(what: str, overrides: Sequence[str]) -> None:
    """Refuse `method=`: a benchmark of calibration measures several, others have it from their
    variants.

    Raises:
        ConfigError: it is given.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "method":
            allowed = f"methods=[{value}]" if what == "calibrate" else "variants=[...]"
            raise ConfigError(
                f"method: {value} is not a setting of what={what}, allowed is {allowed}"
            )


def with_defaults(overrides: Sequence[str], defaults: Sequence[str] = BLOCK_DEFAULTS) -> list[str]:
    """The overrides, and before them the defaults of those that are not given."""
    given = set(map(override_key, overrides))
    missing = [default for default in defaults if override_key(default) not in given]
    return [*missing, *overrides]
