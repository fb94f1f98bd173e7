"""Commands that are Hydra applications: its flags (`-m`, `--cfg job`, `--info`, ...) work, and what
it refuses is said in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from experiments.config.overrides import Overrides
from experiments.options import nearest
from ptq.spec import ConfigError

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
HELP = """
Flags of Hydra: -m or --multirun makes a run of every combination of values with commas between
them, --cfg job prints the config and runs nothing, --info prints where it comes from; --hydra-help
has the rest.
"""


def run_hydra(task: Callable[[Any], None], overrides: Overrides) -> None:
    """Call `task` with the config that the command line composes, or several times with -m.

    HYDRA_FULL_ERROR=1 shows where an error of Hydra comes from.

    Raises:
        ConfigError: Hydra or the check before it refuses the command line.
    """
    check_arguments(sys.argv[1:], overrides)
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from experiments.config.compose import (
        explain_refusal,
    )  # its schema is the first part of a run's config

    application = hydra.main(str(overrides.folder), "config", version_base="1.3")(task)
    if "HYDRA_FULL_ERROR" in os.environ:
        return application()
    # makes Hydra raise its errors in place of printing them over many lines
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        return application()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_refusal(error)) from error
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def check_arguments(arguments: Sequence[str], overrides: Overrides) -> None:
    """Refuse misspelt flags and overrides before anything is loaded.

    Raises:
        ConfigError: there is one.
    """
    words = []
    remaining = iter(arguments)
    for argument in remaining:
        flag = argument.partition("=")[0]
        if flag in FOREIGN_CONFIG:
            return
        if flag.startswith("--") and flag not in FLAGS:
            raise ConfigError(
                f"{flag}: no such flag, allowed are --help, {', '.join(FLAGS)}"
                f"{nearest(flag, ['--help', *FLAGS])}"
            )
        if (FLAGS.get(flag) or flag in SHORT_FLAGS_WITH_VALUE) and flag == argument:
            next(remaining, None)
        elif not flag.startswith("-") and argument not in INFO_KINDS:
            words.append(argument)
    overrides.check(words)
