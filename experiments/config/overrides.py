"""What may follow the options of a command that composes a config: Hydra overrides.

Their names are checked against the files of `conf/` and the schema before anything is composed, so
that a misspelt one is refused at once. Values are `compose.py`'s to check.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from experiments.config.schema import listed_fields
from experiments.options import WIDTH, nearest, wrapped
from ptq.config.files import CONF, group_files
from ptq.registry.plugins import add_folder
from ptq.spec import ConfigError

PLAIN_VALUES = re.compile(r"[\w-]+(,[\w-]+)*")  # names of a group; more is for Hydra to read
FIELD_PATH = re.compile(r"\w+(\.\w+)+")  # `method.gps`, without signs of Hydra's grammar
HYDRA_KEY = "hydra"
PLUGINS = "plugins"  # the setting that names a folder of them


@cache
def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a file, without Hydra: help does not wait for it. They are shared."""
    return yaml.safe_load(path.read_text()) or {}


@dataclass(frozen=True)
class Overrides:
    """The overrides of the config whose `config.yaml` lies in a folder.

    Attributes:
        example: some of them.
        list_fields: gives all fields; without it, the files say which there are.
    """

    folder: Path
    example: str
    list_fields: Callable[[], dict[str, Any]] | None = None

    def read_config(self) -> dict[str, Any]:
        return read_yaml(self.folder / "config.yaml")

    def group_defaults(self) -> dict[str, str]:
        """The groups of the config with the choice that each has by default."""
        defaults = {}
        for entry in self.read_config()["defaults"]:
            if isinstance(entry, dict):
                for group, name in entry.items():
                    if not group.startswith("override "):  # of Hydra's own settings
                        defaults[group] = name
        return defaults

    def group_files(self, group: str) -> dict[str, Path]:
        """The files of a group by name, of a run's config those of plugins, too."""
        if self.folder == CONF:
            return group_files(group)
        return {path.stem: path for path in sorted((self.folder / group).glob("*.yaml"))}

    def group_choices(self, group: str) -> list[str]:
        return list(self.group_files(group))

    def stands_alone(self, group: str, choice: str) -> bool:
        """Whether a group's file exists, builds on no other and sets nothing outside its group."""
        path = self.group_files(group).get(choice)
        if path is None or "@package" in path.read_text():
            return False
        return "defaults" not in read_yaml(path)

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
        if PLUGINS in self.plain_settings():
            add_plugins(arguments)
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
        self.check_fields(arguments, groups)

    def check_fields(self, arguments: Sequence[str], groups: Mapping[str, str]) -> None:
        """Refuse overrides of fields that a group has not, such as `method.gsp`.

        Raises:
            ConfigError: one line that names the nearest field, and all of them.
        """
        choices = dict(groups)
        paths = []
        for argument in arguments:
            key, _, value = argument.partition("=")
            # a field that the schema has not cannot be added, either
            path = key if self.list_fields is None else key.lstrip("+")
            if key in groups:
                choices[key] = value
            elif FIELD_PATH.fullmatch(path) and path.split(".")[0] in groups:
                paths.append(path)
        known = self.known_fields(choices)
        for path in paths:
            require_field(path, known)

    def known_fields(self, choices: Mapping[str, str]) -> dict[str, Any]:
        """All fields of the config, with some values."""
        if self.list_fields is not None:
            return self.list_fields()
        known = self.plain_settings()
        for group, choice in choices.items():
            path = self.folder / group / f"{choice}.yaml"
            # several choices, or one that an interpolation stands for, are Hydra's to read
            known[group] = read_yaml(path) if path.is_file() else {}
        return known

    def check_choices(self, group: str, names: Sequence[str]) -> None:
        choices = self.group_choices(group)
        for name in names:
            if name not in choices:
                raise ConfigError(
                    f"{group}: {name!r} is not one of {', '.join(choices)}{nearest(name, choices)}"
                )

    def describe(self, **own_defaults: str) -> str:
        """The overrides for a command's help: groups with choices, settings with defaults.

        Args:
            own_defaults: by group, where the command's default is not the config's.
        """
        introduction = (
            "Overrides of the config, as in Hydra: GROUP=CHOICE, SETTING=VALUE, and "
            f"GROUP.FIELD=VALUE for any field of a group ({self.example}):"
        )
        lines = textwrap.wrap(introduction, WIDTH)
        groups = self.described_groups(self.group_defaults() | own_defaults)
        return "\n".join([*lines, *groups, *self.described_settings()])

    def described_groups(self, defaults: Mapping[str, str]) -> Iterator[str]:
        for group, default in defaults.items():
            yield wrapped(f"{group}={default}", ", ".join(self.group_choices(group)))

    def described_settings(self) -> Iterator[str]:
        text = (self.folder / "config.yaml").read_text()
        for name, default in self.plain_settings().items():
            # the comments of the file say what a setting is for
            comment = re.search(rf"^{name}:[^#\n]*# *(.*)$", text, re.MULTILINE)
            shown = "null" if default is None else default
            yield wrapped(f"{name}={shown}", comment[1] if comment else "")


def add_plugins(arguments: Sequence[str]) -> None:
    """Take in the folders of plugins that overrides name (`ptq/registry/plugins.py`).

    Raises:
        ConfigError: there is no such folder.
    """
    for argument in arguments:
        key, _, folder = argument.lstrip("+").partition("=")
        if key == PLUGINS and folder not in ("", "null"):
            add_folder(Path(folder.strip("'\"")))


def require_field(path: str, known: Mapping[str, Any]) -> None:
    """Refuse a field that is not among the known ones; a group without fields may have any.

    Raises:
        ConfigError: the line names the nearest field, and all beside it.
    """
    group: Any = known
    for name in path.split("."):
        if not isinstance(group, Mapping) or not group:
            return
        if name not in group:
            raise ConfigError(describe_unknown(path, known))
        group = group[name]


def describe_unknown(path: str, known: Mapping[str, Any]) -> str:
    """The refusal of a field that is not among the known ones: the nearest, and all beside it."""
    *parents, name = path.split(".")
    group: Any = known
    for parent in parents:
        # an unknown parent leaves the fields of the one before it
        group = group.get(parent, group) if isinstance(group, Mapping) else group
    allowed = list(group) if isinstance(group, Mapping) else []
    return f"{path}: no such field, allowed are {', '.join(allowed)}{nearest(name, allowed)}"


RUN = Overrides(CONF, example="method.gps=false, calib.n=64", list_fields=listed_fields)
TRAINING = Overrides(CONF / "train_zoo", example="model.schedule.steps=100")
