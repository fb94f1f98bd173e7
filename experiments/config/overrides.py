"""What may follow the options of a command that composes a config: Hydra overrides.

Their first words are checked against the files of `conf/` before anything is composed, so that a
misspelt one is refused at once. What lies deeper, such as `method.gps`, is the schema's to check.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.options import WIDTH, nearest, wrapped
from ptq.config.files import CONF
from ptq.spec import ConfigError

PLAIN_VALUES = re.compile(r"[\w-]+(,[\w-]+)*")  # names of a group; more is for Hydra to read
HYDRA_KEY = "hydra"


@dataclass(frozen=True)
class Overrides:
    """The overrides of the config whose `config.yaml` lies in a folder; `example` shows some."""

    folder: Path
    example: str

    def read_config(self) -> dict[str, Any]:
        # without Hydra: help does not wait for it
        return yaml.safe_load((self.folder / "config.yaml").read_text())

    def group_defaults(self) -> dict[str, str]:
        """The groups of the config with the choice that each has by default."""
        defaults = {}
        for entry in self.read_config()["defaults"]:
            if isinstance(entry, dict):
                for group, name in entry.items():
                    if not group.startswith("override "):  # of Hydra's own settings
                        defaults[group] = name
        return defaults

    def group_choices(self, group: str) -> list[str]:
        return sorted(path.stem for path in (self.folder / group).glob("*.yaml"))

    def plain_settings(self) -> dict[str, Any]:
        """The settings of the config that belong to no group, with their defaults."""
        config = self.read_config()
        return {key: config[key] for key in config if key not in ("defaults", HYDRA_KEY)}

    def check(self, arguments: Sequence[str], others: Sequence[str] = ()) -> None:
        """Refuse overrides whose first word, or whose choice of a group, does not exist.

        Args:
            others: names that the command knows beside them, such as its options.

        Raises:
            ConfigError: one line that names the nearest allowed word, and all of them.
        """
        groups = self.group_defaults()
        allowed = list(dict.fromkeys([*others, *groups, *self.plain_settings()]))
        for argument in arguments:
            key, equals, value = argument.partition("=")
            # the group in `+model.name`, `~tracker` and `model@other`
            word = re.split(r"[.@/]", key.lstrip("+~"))[0]
            if word not in (*allowed, HYDRA_KEY):
                raise ConfigError(
                    f"{key}: no such option or setting, allowed are {', '.join(allowed)}"
                    f"{nearest(word, allowed)}"
                )
            if not equals and not key.startswith("~"):
                raise ConfigError(f"{key}: its value is missing, give {key}=VALUE")
            if key in groups and PLAIN_VALUES.fullmatch(value):
                self.check_choices(key, value.split(","))

    def check_choices(self, group: str, names: Sequence[str]) -> None:
        choices = self.group_choices(group)
        for name in names:
            if name not in choices:
                raise ConfigError(
                    f"{group}: {name!r} is not one of {', '.join(choices)}{nearest(name, choices)}"
                )

    def describe(self) -> str:
        """The overrides for a command's help: groups with choices, settings with defaults."""
        introduction = (
            "Overrides of the config, as in Hydra: GROUP=CHOICE, SETTING=VALUE, and "
            f"GROUP.FIELD=VALUE for any field of a group ({self.example}):"
        )
        lines = textwrap.wrap(introduction, WIDTH)
        return "\n".join([*lines, *self.described_groups(), *self.described_settings()])

    def described_groups(self) -> Iterator[str]:
        for group, default in self.group_defaults().items():
            yield wrapped(f"{group}={default}", ", ".join(self.group_choices(group)))

    def described_settings(self) -> Iterator[str]:
        text = (self.folder / "config.yaml").read_text()
        for name, default in self.plain_settings().items():
            # the comments of the file say what a setting is for
            comment = re.search(rf"^{name}:[^#\n]*# *(.*)$", text, re.MULTILINE)
            shown = "null" if default is None else default
            yield wrapped(f"{name}={shown}", comment[1] if comment else "")


RUN = Overrides(CONF, example="method.gps=false, calib.n=64")
TRAINING = Overrides(CONF / "train_zoo", example="model.schedule.steps=100")
