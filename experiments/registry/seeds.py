"""The seeds of a table, as they are typed."""

from __future__ import annotations

from experiments.options import read_integer
from ptq.ranges import Integer, check_value
from ptq.spec import ConfigError

MOST_SEEDS = 1_000  # of a table
SEEDS_HELP = "a list, or the number of seeds from 0 on"


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds that `[0,1,2]` or `3` say.

    Raises:
        ConfigError: it says none.
    """
    try:
        if not text.startswith("["):
            seeds = tuple(range(read_integer("seeds", text, 1, MOST_SEEDS)))
        else:
            entries = text.removeprefix("[").removesuffix("]").split(",")
            seeds = tuple(map(int, entries))
    except ValueError:
        seeds = ()
    if not seeds:
        raise ConfigError(
            f"seeds: {text} is not a list of integers such as [0,1,2], nor how many from 0 on "
            f"(1 to {MOST_SEEDS})"
        )
    if len(seeds) > MOST_SEEDS:
        raise ConfigError(f"seeds: {len(seeds)} of them are too many, allowed are {MOST_SEEDS}")
    for seed in seeds:
        check_value("seeds", seed, Integer(0, 2**63 - 1))
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds: {text} has a seed twice, which would count as two")
    return seeds
