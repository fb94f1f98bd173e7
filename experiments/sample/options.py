"""The options of `experiments.sample`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.config.overrides import RUN
from experiments.options import option, option_names, parse_options
from ptq.spec import ConfigError

# said once more here: `images/microbatches.py` loads PyTorch
ROUNDINGS = ("round", "truncate")
FORMATS = ("npz", "png", "shards")
FULL_PRECISION = "method=fp"  # unless a method or an export is named


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
    labels: list[int] | None = option(
        None,
        help="classes of the images, over and over; left out, all classes in turn",
        at_least=0,
        at_most=1_000_000,
    )
    quantized: str | None = option(
        None,
        help="an export, its folder or organisation/repository on the hub, in place of model, "
        "method and bits",
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
    measure: bool = option(
        False,
        help="also judge the model by held-out tokens, and keep what quantizing cost: scores.json",
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
    if options.labels is not None and options.n_per_class is not None:
        raise ConfigError("labels, n_per_class: both are given, allowed is one of them")
    if not options.measure and any(is_held_out(text) for text in overrides):
        raise ConfigError("heldout: images alone need none, it goes with measure=true")
    if options.quantized is None and not any(is_of_method(text) for text in overrides):
        overrides = [FULL_PRECISION, *overrides]
    return options, overrides


def is_held_out(override: str) -> bool:
    """Whether an override names held-out images."""
    key, _, value = override.partition("=")
    return key == "heldout" and value != "null"


def is_of_method(override: str) -> bool:
    """Whether an override chooses a method, or changes one."""
    return re.match(r"[+~]*method[.@=]", override) is not None
