"""The options of `experiments.render`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.options import option, option_names, parse_options, refuse_unknown
from experiments.registry.tables import find_table


@dataclass
class Options:
    """Which tables to render, from what, and where to."""

    name: str = option("all", help="tables, with commas between them")
    out: str = option("runs/report", help="folder of the report")
    runs: str = option("runs", help="folder where samples of runs are looked for")
    from_: str | None = option(  # "from" is a keyword of Python
        None, help="folder of experiments.table, in place of the committed results"
    )
    readme: bool = option(False, help="write the README's blocks and pictures, and no report")
    check: bool = option(False, help="write nothing; exit 1 if one of the README's is not current")


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line.

    Raises:
        ConfigError: an argument is unknown, or there is no such table.
    """
    options, others = parse_options(Options, arguments)
    refuse_unknown(others, option_names(Options))
    if options.name != "all":
        for name in options.name.split(","):
            find_table(name)
    return options
