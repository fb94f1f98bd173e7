"""A table's cells as the grid of a multirun, for Hydra's launchers.

    python -m experiments.run -m table=reproduce seeds=3 hydra/launcher=joblib

Rows are several overrides each, full precision comes once, and cells may be left out: no grid that
commas can say. So the registry lists the jobs, and a launcher runs them. `experiments.table` with
the same options then reads the finished runs and writes the table.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.config.overrides import HYDRA_KEY, PLUGINS, RUN, add_plugins
from experiments.registry.seeds import parse_seeds
from experiments.registry.tables import find_table, tracked_cells
from ptq.spec import ConfigError

MULTIRUN = ("-m", "--multirun")
# settings of all jobs, which Hydra reads too
SHARED = ("runs", PLUGINS)


def table_grid(name: str, seeds: str, arguments: Sequence[str]) -> list[list[str]]:
    """The overrides of every cell of a table on the twins.

    Args:
        arguments: of the command line: flags and settings of Hydra, and overrides of all cells, or
            picks of the table's axes (`model=`, `row=`).

    Raises:
        ConfigError: it is no table of runs, or an argument is not allowed.
    """
    if not any(argument in MULTIRUN for argument in arguments):
        raise ConfigError(f"table: the cells of {name} are several runs, give -m")
    overrides = [word for word in arguments if not is_of_hydra(word)]
    add_plugins(overrides)
    table = find_table(name, "table")
    if table.what != "run":
        raise ConfigError(
            f"table: {name} is made of no runs but of {table.what}; "
            f"python -m experiments.table name={name} makes it"
        )
    RUN.check(overrides, ["row"])
    cells = tracked_cells(table, "twin", parse_seeds(seeds), overrides)
    return [list(cell.overrides) for cell in cells]


def own_words(arguments: Sequence[str]) -> list[str]:
    """What of a command line is left for Hydra: its own words, and where runs and plugins lie."""
    return [word for word in arguments if is_of_hydra(word) or word.partition("=")[0] in SHARED]


def is_of_hydra(argument: str) -> bool:
    """Whether an argument is a flag of Hydra or one of its settings."""
    return argument.startswith(("-", HYDRA_KEY, f"+{HYDRA_KEY}"))
