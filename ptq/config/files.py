"""The configs that come with the project: where they lie, and what one of them says.

They are the folder `conf` beside the packages, and `ptq/conf` is a link to it: so an installed
`ptq` has them inside.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ptq.registry.plugins import plugin_folders
from ptq.spec import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

PACKAGE = Path(__file__).parents[1]
PACKAGES = PACKAGE.parent  # the folder that `ptq`, `models` and `experiments` lie in
CONF = (PACKAGE / "conf").resolve()
if not CONF.is_dir():  # a checkout on a system without links
    CONF = PACKAGES / "conf"


def conf_folders() -> list[Path]:
    """Where configs lie: the project's folder, and those of plugins."""
    folders = [CONF]
    for folder in plugin_folders():
        if (folder / "conf").is_dir():
            folders.append(folder / "conf")
    return folders


def group_files(group: str) -> dict[str, Path]:
    """The files of a group by name.

    Raises:
        ConfigError: two folders have one of the same name.
    """
    files: dict[str, Path] = {}
    for folder in conf_folders():
        for path in (folder / group).glob("*.yaml"):
            if path.stem in files:
                other = files[path.stem]
                raise ConfigError(f"{group}: {path.stem} is there twice, as {other} and as {path}")
            files[path.stem] = path
    return dict(sorted(files.items()))


def group_choices(group: str) -> list[str]:
    """The names of a group's files."""
    return list(group_files(group))


def read_choice(group: str, name: str) -> DictConfig:
    """What the file `<group>/<name>.yaml` says, interpolations not resolved yet. It is shared, so
    nobody may change it.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """
    config = read_file(group, name)
    # a file that sets fields of other groups, too, has its own under the group's name
    return config.get(group, config)


def read_other_group(group: str, name: str, other: str) -> DictConfig | dict:
    """What the file `<group>/<name>.yaml` says of another group.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """
    config = read_file(group, name)
    return config.get(other, {}) if group in config else {}


@cache
def read_file(group: str, name: str) -> DictConfig:
    """The file `<group>/<name>.yaml`; it is shared, too.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """
    # late: a command's help asks for names alone
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    files = group_files(group)
    if name not in files:
        raise ConfigError(f"{group}: {name!r} is not one of {', '.join(files)}")
    path = files[name]
    try:
        config = OmegaConf.load(path)
    except (OSError, ValueError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{group}: {path} cannot be read ({reason})") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{group}: {path} holds no fields")
    return config
