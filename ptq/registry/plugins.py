"""Where methods come from: what ships, packages that are installed, and folders that are named.

A folder of plugins holds Python files, which register what they define (`entries.py`), and a
folder `conf` like the repository's, with recipes (`conf/method/NAME.yaml`), other groups, and
tables (`conf/table/*.yaml`). Files whose name begins with `_` are for the others to import.

An installed package offers the same by an entry point of the group `ar_ptq`, whose value is a
package: it is imported, and `conf` lies in its folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
import zlib
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from ptq.registry.refusals import ConfigError

PACKAGES = Path(__file__).parents[2]
ENTRY_POINTS = "ar_ptq"
FOLDERS = ("ptq.methods", "ptq.rivals")  # every module in them is imported
# what else registers something
SHIPPED = (
    "ptq.rounding",
    "ptq.staq.gptaq",
    "ptq.numbers.numerics",
    "ptq.numbers.formats",
    "ptq.numbers.small_floats",
    "ptq.staq.numerators",
    "ptq.dgc",
    "ptq.calibration",
    "ptq.gps",
    "ptq.staq.geometric",
    "ptq.staq.block_hadamard",
    "ptq.staq.sink_shift",
    "ptq.omniquant.omniquant",
)

_shipped_imported = False
_folders: list[Path] = []  # of plugins, in the order in which they were named
_waiting: list[Path] = []  # those of them that are not imported yet


def add_folder(folder: Path) -> None:
    """Take in a folder of plugins; its files are imported when a name is asked for.

    Raises:
        ConfigError: there is no such folder, or nothing for us in it.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise ConfigError(f"plugins: {folder} is not a folder")
    if not plugin_files(folder) and not (folder / "conf").is_dir():
        raise ConfigError(f"plugins: {folder} has neither Python files nor a folder conf")
    if folder not in _folders:
        _folders.append(folder)
        _waiting.append(folder)


@cache
def installed_packages() -> dict[str, Path]:
    """The folders of installed packages with plugins, by the package's name; none is imported."""
    found = {}
    for point in entry_points(group=ENTRY_POINTS):
        spec = importlib.util.find_spec(point.module)
        if spec is not None and spec.submodule_search_locations:
            found[point.module] = Path(spec.submodule_search_locations[0])
    return found


def plugin_folders() -> tuple[Path, ...]:
    """The folders of all plugins, installed ones first."""
    return (*installed_packages().values(), *_folders)


def is_of_plugin(path: Path) -> bool:
    """Whether a file lies in the folder of a plugin."""
    return any(path.is_relative_to(folder) for folder in plugin_folders())


def import_all() -> list[Path]:
    """Import what is not imported yet: what ships, installed packages, folders that were added.
    Gives the files of the latter.

    Raises:
        ConfigError: one cannot be imported; one line.
    """
    import_shipped()
    paths: list[Path] = []
    while _waiting:
        paths += import_folder(_waiting[0])
        _waiting.pop(0)  # one that cannot be imported is refused again
    return paths


def import_shipped() -> None:
    """Import, once, all modules that ship and the installed packages."""
    global _shipped_imported
    if _shipped_imported:
        return
    _shipped_imported = True  # first: what is imported here asks for names, too
    for name in SHIPPED:
        importlib.import_module(name)
    for folder in FOLDERS:
        package = importlib.import_module(folder)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{folder}.{module.name}")
    for name in installed_packages():
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ConfigError(f"plugins: {name} cannot be imported ({error!r})") from error


def declared_switches() -> list[str]:
    """The names that shipped files register transforms under, read from their text: nothing is
    imported."""
    switches: list[str] = []
    for path in shipped_files():
        switches += re.findall(r'^@register_transform\(\s*"(\w+)"', path.read_text(), re.MULTILINE)
    return switches


def shipped_files() -> list[Path]:
    """The files that ship and register something."""
    paths = [PACKAGES / f"{name.replace('.', '/')}.py" for name in SHIPPED]
    for folder in FOLDERS:
        paths += sorted((PACKAGES / folder.replace(".", "/")).glob("*.py"))
    return paths


def import_folder(folder: Path) -> list[Path]:
    """Import the Python files of a folder of plugins; gives them."""
    paths = plugin_files(folder)
    package = ModuleType(package_name(folder))
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    for path in paths:
        try:
            importlib.import_module(f"{package.__name__}.{path.stem}")
        except ConfigError as error:
            raise ConfigError(f"plugins: {path}: {error}") from error
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"plugins: {path} cannot be imported ({reason})") from error
    return paths


def plugin_files(folder: Path) -> list[Path]:
    """The Python files of a folder, but for those that the others import."""
    return [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]


def package_name(folder: Path) -> str:
    """The package that a folder's files are imported as: its own, so that no name of a file is
    that of another module."""
    return f"ar_ptq_plugins_{zlib.crc32(str(folder).encode()):08x}"
