"""The options of `experiments.table`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.config.overrides import PLUGINS, RUN, add_plugins
from experiments.evaluate.options import EXTRACTORS, PRC_DTYPES
from experiments.options import option, option_names, parse_options
from experiments.registry.seeds import SEEDS_HELP, parse_seeds
from experiments.registry.tables import SCALES, find_table, load_tables, table_kinds
from experiments.speed.options import BENCHMARK_OPTIONS
from ptq.spec import ConfigError

# overrides that name a file or a folder
PATH_KEYS = (PLUGINS, "heldout", "model.weights", "model.tokenizer_weights")
ENGINE = "engine."  # how overrides of conf/engine begin
JUDGING = ("reference", "inception", "extractor", "prc_dtype")  # options of scale=paper alone


@dataclass
class Options:
    """Which cells to run, where, and what to do with the results."""

    name: str = option("reproduce", help="a table of conf/table/registry.yaml, or all")
    scale: str = option(
        "twin",
        help="shipped models, released presets given their weights, or models of natural images",
        choices=SCALES,
    )
    seeds: str = option("[0]", help=SEEDS_HELP)
    workers: int | None = option(
        None,
        help="processes; stands for engine=local and engine.jobs=WORKERS",
        at_least=1,
        at_most=10_000,
        formerly="jobs",
    )
    engine: str | None = option(
        None,
        help="who runs the cells: this process, processes of this machine, or Slurm (conf/engine, "
        "whose settings are given as engine.KEY=VALUE); null: inproc, with workers= local",
        choices=RUN.group_choices("engine"),
    )
    dry_run: bool = option(
        False,
        help="list the cells, what is done of them, and what the others will take: time, memory "
        "and disk, each with how good the estimate is; nothing is run or written",
    )
    publish: bool = option(
        False,
        help="copy the results to experiments/results/NAME, where README tables come from; those "
        "of a part (row=, model=, a value of the grid) take the place of the same cells alone",
    )
    reference: str | None = option(
        None, help="at scale=paper: the reference batch of experiments.evaluate"
    )
    inception: str | None = option(None, help="at scale=paper: the weights of Inception")
    extractor: str = option(
        "inception", help="at scale=paper, as for experiments.evaluate", choices=EXTRACTORS
    )
    prc_dtype: str = option(
        "float32", help="at scale=paper, as for experiments.evaluate", choices=PRC_DTYPES
    )


@dataclass(frozen=True)
class Arguments:
    """A command line, read but not yet acted on.

    Attributes:
        names: of tables.
        engine_name, engine_overrides: a file of conf/engine, and KEY=VALUE of it.
        overrides: for every cell.
    """

    options: Options
    names: tuple[str, ...]
    seeds: tuple[int, ...]
    engine_name: str
    engine_overrides: tuple[str, ...]
    overrides: tuple[str, ...]


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """The arguments of a command line.

    Raises:
        ConfigError: one is not allowed.
    """
    options, others = parse_options(Options, arguments)
    refuse_judging(options)
    engine_overrides = []
    overrides = []
    for argument in others:
        if argument.startswith(ENGINE):
            engine_overrides.append(argument.removeprefix(ENGINE))
        else:
            overrides.append(absolute_path(argument))
    add_plugins(overrides)
    names = named_tables(options)
    RUN.check(overrides, [*option_names(Options), "row", *benchmark_settings(names)])
    several = options.workers is not None and options.workers > 1  # one worker is this process
    if options.workers is not None:
        engine_overrides.append(f"jobs={options.workers}")  # the last of a key wins
    return Arguments(
        options=options,
        names=names,
        seeds=parse_seeds(options.seeds),
        engine_name=options.engine or ("local" if several else "inproc"),
        engine_overrides=tuple(engine_overrides),
        overrides=tuple(overrides),
    )


def refuse_judging(options: Options) -> None:
    """Refuse what says how images are judged where it would change nothing.

    Raises:
        ConfigError: a twin's images are judged by their own extractor and data set.
    """
    if options.scale == "paper":
        return
    for name in JUDGING:
        value = getattr(options, name)
        if value != getattr(Options, name):
            raise ConfigError(
                f"{name}: {value} changes nothing at scale={options.scale}, it is of scale=paper"
            )


def absolute_path(override: str) -> str:
    """An override whose file or folder is found from wherever a worker runs."""
    key, _, path = override.partition("=")
    is_quoted = path.startswith(("'", '"'))  # for Hydra, which takes it as it is
    if key not in PATH_KEYS or path == "null" or is_quoted:
        return override
    return f"{key}={Path(path).expanduser().resolve()}"


def named_tables(options: Options) -> tuple[str, ...]:
    """The tables that are asked for.

    Raises:
        ConfigError: there is no such table.
    """
    if options.name != "all":
        return (find_table(options.name).name,)
    return tuple(name for name, table in load_tables().items() if options.scale in table.models)


def benchmark_settings(names: Sequence[str]) -> list[str]:
    """The settings of `experiments.speed`, which go to tables that are made of its reports."""
    settings: list[str] = []
    if "speed" in table_kinds(names):
        for options in BENCHMARK_OPTIONS.values():
            settings += option_names(options)
    return settings
