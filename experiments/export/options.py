"""The options of `experiments.export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.config.overrides import RUN
from experiments.options import option, option_names, parse_options

NUMBER_FORMATS = ("float16", "float32")
FORMATS = ("int8", "torchao")


@dataclass
class Options:
    """Where to write the file, and how."""

    out: str | None = option(None, help="folder; left out, `int8` in the folder of the run")
    rest: str = option(
        "float16", help="number format of what is not quantized", choices=NUMBER_FORMATS
    )
    format: str = option("int8", help="of the file, see above", choices=FORMATS)


def parse(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """This command's options, and the overrides that compose the config of a run.

    Raises:
        ConfigError: an option is not allowed.
    """
    options, overrides = parse_options(Options, arguments)
    RUN.check(overrides, option_names(Options))
    return options, overrides
