"""Commands that are Hydra applications: its flags work, and what it refuses is one line."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from experiments.config.overrides import RUN, Overrides
from experiments.options import nearest
from ptq.errors import describe_fault, error_line
from ptq.spec import ConfigError

if typing.TYPE_CHECKING:
    from omegaconf import DictConfig

Task = Callable[["DictConfig"], None]

# Hydra's flags; of those with True the next argument is their value
FLAGS = {
    "--hydra-help": False,
    "--version": False,
    "--cfg": True,
    "--resolve": False,
    "--package": True,
    "--run": False,
    "--multirun": False,
    "--shell-completion": False,
    "--config-path": True,
    "--config-name": True,
    "--config-dir": True,
    "--experimental-rerun": True,
    "--info": False,
}
SHORT_FLAGS_WITH_VALUE = ("-c", "-p", "-cp", "-cn", "-cd")
# of a config from elsewhere this project knows no words
FOREIGN_CONFIG = ("--config-path", "--config-name", "--config-dir", "-cp", "-cn", "-cd")
INFO_KINDS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
LONGEST_REASON = 200  # letters of what a launcher says
HELP = """
Flags of Hydra: -m or --multirun makes a run of every combination of values with commas between
them (those that fail are listed at the end, the others go on), --cfg job prints the config and
runs nothing, --info prints where it comes from; --hydra-help has the rest. hydra/launcher= says who
runs them: basic (one after the other), joblib (hydra.launcher.n_jobs processes), submitit_local, or
submitit_slurm (hydra.launcher.partition, .timeout_min, .gpus_per_node, .cpus_per_task, ...).
"""


def run_hydra(
    task: Task, overrides: Overrides, grid: Sequence[Sequence[str]] | None = None
) -> None:
    """Call `task` with the config that the command line composes, or several times with -m.

    One bad job does not end the others of a grid; at its end those that failed are listed.
    HYDRA_FULL_ERROR=1 shows where an error of Hydra comes from.

    Args:
        grid: with -m, the overrides of each job, in place of all combinations.

    Raises:
        ConfigError: Hydra or the check before it refuses the command line, or jobs failed.
        Whatever a single job raises.
    """
    words = check_arguments(sys.argv[1:], overrides)
    import hydra  # late: a misspelt word has been refused by now

    # its schema is the first part of a run's config
    from experiments.config.compose import check_grammar, use_plugins

    if overrides is RUN:
        use_plugins(words)
    check_grammar(words, overrides)

    raised: list[Exception] = []
    with job_record(shared_folder(words)) as record:
        keeping = keep_failures(task, record, raised)
        application = hydra.main(str(overrides.folder), "config", version_base="1.3")(keeping)
        try:
            with passing_over(record, grid):
                call_application(application, chosen_launcher(words))
        finally:
            failures, total = list_failures(record)  # of a grid that is stopped, too
    if raised:
        raise raised[0]
    if failures:
        raise ConfigError(f"{len(failures)} of {total} jobs failed")


def call_application(application: Callable[[], None], launcher: str) -> None:
    """Call what Hydra makes of a task, and say in one line what it refuses.

    Args:
        launcher: of its jobs, "" for Hydra's own, which calls them in this process.

    Raises:
        ConfigError: Hydra refuses the command line, or a launcher cannot start its jobs or lost
            one.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from experiments.config.compose import explain_refusal

    if "HYDRA_FULL_ERROR" in os.environ:
        return application()
    # makes Hydra raise its errors in place of printing them over many lines
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        return application()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_refusal(error)) from error
    except ConfigError:
        raise
    except Exception as error:
        # jobs raise nothing (`keep_failures`): it is the launcher's
        if not launcher:
            raise
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise ConfigError(f"hydra/launcher: {launcher} failed: {reason}") from error
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def chosen_launcher(words: Sequence[str]) -> str:
    """What a command line says of who runs the jobs of a grid; "" if nothing."""
    return last_value(words, "hydra/launcher", "")


def last_value(words: Sequence[str], key: str, default: str) -> str:
    """The value that overrides give a key; of several the last counts."""
    value = default
    for word in words:
        if word.startswith(f"{key}="):
            value = word.partition("=")[2]
    return value


def shared_folder(words: Sequence[str]) -> Path | None:
    """The folder of runs, where jobs may run on other machines: these share it; None elsewhere."""
    if not chosen_launcher(words).startswith("submitit"):
        return None
    return Path(last_value(words, "runs", "runs"))


@contextmanager
def job_record(folder: Path | None) -> Iterator[Path]:
    """A file to which the jobs of a grid append a line each, whichever process does them.

    Args:
        folder: where it lies; None stands for where temporary files are.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix="ar-ptq-jobs-", dir=folder) as file:
        yield Path(file.name).resolve()


def keep_failures(task: Task, record: Path, raised: list[Exception]) -> Task:
    """The task, which keeps what goes wrong in place of raising it.

    Hydra would print a line of its own before an error, and end a grid. What goes wrong in a grid
    is recorded, in one line; what no user can mend is printed with its traceback, too. What goes
    wrong in a single job is `raised`.
    """

    @functools.wraps(task)
    def do_job(config: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        job = HydraConfig.get()
        is_grid = job.mode == RunMode.MULTIRUN
        line = None
        try:
            task(config)
        except Exception as error:
            raised.append(error)
            line = error_line(error)
            if is_grid and describe_fault(error) is None:
                traceback.print_exc()
        if is_grid:
            raised.clear()  # a grid goes on
            with record.open("a") as file:
                file.write(json.dumps([job.job.num, " ".join(job.overrides.task), line]) + "\n")

    return do_job


@contextmanager
def passing_over(record: Path, grid: Sequence[Sequence[str]] | None = None) -> Iterator[None]:
    """Within the block a grid passes over jobs whose config cannot be composed, and records them.

    Hydra composes all configs of a grid before its first job, and would refuse the whole grid.

    Args:
        grid: the overrides of each job, in place of those that Hydra lists.

    Raises:
        ConfigError: none can be composed.
    """
    from hydra.core.plugins import Sweeper
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from experiments.config.compose import explain_refusal

    def keep_composable(sweeper: Sweeper, jobs: list[Sequence[str]]) -> None:
        if grid is not None:
            jobs[:] = grid
        refused = []
        composable = []
        for number, job in enumerate(jobs):
            try:
                loader = sweeper.hydra_context.config_loader
                config = loader.load_sweep_config(sweeper.config, list(job))
                # places of a job's files may name fields of the config
                OmegaConf.to_container(config.hydra.sweep, resolve=True)
            except (HydraException, OmegaConfBaseException) as error:
                refused.append([number, " ".join(job), explain_refusal(error)])
            else:
                composable.append(job)
        with record.open("a") as file:
            for entry in refused:
                file.write(json.dumps(entry) + "\n")
        jobs[:] = composable
        if not jobs:
            raise ConfigError(f"{len(refused)} of {len(refused)} jobs failed")

    validate = Sweeper.validate_batch_is_legal
    Sweeper.validate_batch_is_legal = keep_composable
    try:
        yield
    finally:
        Sweeper.validate_batch_is_legal = validate


def list_failures(record: Path) -> tuple[list[str], int]:
    """Say on stderr which jobs failed and why; returns them, and how many jobs there were."""
    # by their numbers: several processes may finish in any order
    jobs = sorted(map(json.loads, record.read_text().splitlines()))
    failures = []
    for _, overrides, error in jobs:
        if error is not None:
            failures.append(f"{overrides}: {error}")
            print(f"failed: {failures[-1]}", file=sys.stderr)
    return failures, len(jobs)


def check_arguments(arguments: Sequence[str], overrides: Overrides) -> None:
    """Refuse misspelt flags and overrides before anything is loaded.

    Returns the overrides, none of a config from elsewhere.

    Raises:
        ConfigError: there is one.
    """
    words = []
    remaining = iter(arguments)
    for argument in remaining:
        flag = argument.partition("=")[0]
        if flag in FOREIGN_CONFIG:
            return []
        if flag.startswith("--") and flag not in FLAGS:
            raise ConfigError(
                f"{flag}: no such flag, allowed are --help, {', '.join(FLAGS)}"
                f"{nearest(flag, ['--help', *FLAGS])}"
            )
        if (FLAGS.get(flag) or flag in SHORT_FLAGS_WITH_VALUE) and flag == argument:
            next(remaining, None)  # the flag's value
        elif not flag.startswith("-") and argument not in INFO_KINDS:
            words.append(argument)
    overrides.check(words)
    return words
