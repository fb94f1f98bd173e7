"""The options of `experiments.sample`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.config.overrides import RUN
from experiments.options import option, option_names, parse_options
from ptq.spec import ConfigError

# said once more here: `images/microbatches.py` loads PyTorch
ROUNDINGS = ("round", "truncate")
FORMATS = ("npz", "png", "shards")


@dataclass
class Options:
    """What to make of a run's images."""

    n: int | None = option(
        None,
        help="images in all, eval.n if left out; image i has class i mod classes",
        at_least=1,
        at_most=10_000_000,
    )
    n_per_class: int | None = option(
        None, help="images of every class, in place of n", at_least=1, at_most=1_000_000
    )
    rounding: str = option(
        "round",
        help="pixels to uint8: to the nearest, or cut off as the released codes do",
        choices=ROUNDINGS,
    )
    format: str = option(
        "npz",
        help="what to make of the shards: samples.npz with arr_0, a folder of PNG, nothing more",
        choices=FORMATS,
    )
    out: str | None = option(
        None, help="folder; left out, one below runs/samples named by all that matters"
    )


def parse(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """This command's options, and the overrides that compose the config of a run.

    Raises:
        ConfigError: an option is of the wrong type or not allowed.
    """
    options, overrides = parse_options(Options, arguments)
    RUN.check(overrides, option_names(Options))
    if options.n is not None and options.n_per_class is not None:
        raise ConfigError("n, n_per_class: both are given, allowed is one of them")
    return options, overrides
