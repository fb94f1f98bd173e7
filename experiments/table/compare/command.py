"""Two folders of results side by side: what differs beyond the spread over seeds.

    python -m experiments.table compare experiments/results/main runs/tables/main
    python -m experiments.table compare FOLDER OTHER csv=differences.csv all=true

A folder is one of runs, one of a table below `runs/tables`, or one of committed results. Cells of
one are compared with those of the other that were asked the same. Figures that agree within the
spread over seeds (`agreement.py`) are counted; the others are listed, and so are cells that one
folder has alone. What tells the results apart besides, sizes, settings, devices, versions, is said
in words; figures of different sizes are not compared.

The exit status is 0 if all figures agree and no cell is missing, else 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.options import answer_help, option, option_names, parse_options, refuse_unknown
from ptq.errors import user_errors
from ptq.spec import ConfigError


@dataclass
class Options:
    """What to compare, and what to make of it."""

    folders: list[str] = option(help="two folders of results", positional=True)
    csv: str | None = option(None, help="a file for all figures, those that agree among them")
    all: bool = option(False, help="print all figures")


def main(arguments: Sequence[str]) -> None:
    """The command `experiments.table compare`."""
    with user_errors():
        answer_help(__doc__, {"Options": Options}, arguments=arguments)
        options, others = parse_options(Options, arguments)
        refuse_unknown(others, option_names(Options))
        if len(options.folders) != 2:
            raise ConfigError(f"folders: {len(options.folders)} are given, expected two")
        from experiments.table.compare.folders import compare_folders  # late: pandas, and results

        agrees = compare_folders(options.folders, options.csv, options.all)
    if not agrees:
        sys.exit(1)
