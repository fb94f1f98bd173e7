"""The options of `experiments.export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.config.overrides import RUN
from experiments.options import option, option_names, parse_options
from ptq.registry.refusals import require

NUMBER_FORMATS = ("float16", "float32")
REST = "float16"  # unless it is given
TORCHAO_REST = "float32"  # torchao has no other
FORMATS = ("int8", "torchao")


@dataclass
class Options:
    """Where to write the file, and how."""

    out: str | None = option(None, help="folder; left out, `int8` in the folder of the run")
    rest: str | None = option(
        None,
        help="number format of what is not quantized; left out, float16, for torchao float32",
        choices=NUMBER_FORMATS,
    )
    format: str = option("int8", help="of the file, see above", choices=FORMATS)


def parse(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """This command's options, and the overrides that compose the config of a run.

    Raises:
        ConfigError: an option is not allowed.
    """
    options, overrides = parse_options(Options, arguments)
    RUN.check(overrides, option_names(Options))
    if options.format == "torchao":
        require("rest", options.rest or TORCHAO_REST, (TORCHAO_REST,))
    return options, overrides
