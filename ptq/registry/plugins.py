"""Where methods come from: what ships, packages that are installed, and folders that are named.

A folder of plugins holds Python files, which register what they define (`registry.py`), and a
folder `conf` like the repository's, with recipes (`conf/method/NAME.yaml`), other groups, and
tables (`conf/table/*.yaml`). Files whose name begins with `_` are for the others to import.

An installed package offers the same by an entry point of the group `ar_ptq`, whose value is a
package: it is imported, and `conf` lies in its folder.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
import zlib
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from ptq.registry.refusals import ConfigError

PACKAGES = Path(__file__).parents[2]
ENTRY_POINTS = "ar_ptq"
METHODS = "ptq.methods"  # every module in it is imported
# what else registers something
SHIPPED = (
    "ptq.rounding",
    "ptq.staq.gptaq",
    "ptq.numbers.numerics",
    "ptq.numbers.formats",
    "ptq.staq.numerators",
    "ptq.dgc",
    "ptq.calibration",
    "ptq.gps",
    "ptq.staq.geometric",
    "ptq.staq.block_hadamard",
    "ptq.staq.sink_shift",
    "ptq.omniquant.omniquant",
)

_imported = False
_folders: list[Path] = []  # of plugins, in the order in which they came


def import_all() -> None:
    """Import, once, all modules that ship and those of installed packages.

    Raises:
        ConfigError: one of the latter cannot be imported.
    """
    global _imported
    if _imported:
        return
    _imported = True  # first: what is imported here asks for names, too
    for name in SHIPPED:
        importlib.import_module(name)
    package = importlib.import_module(METHODS)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{METHODS}.{module.name}")
    for point in entry_points(group=ENTRY_POINTS):
        try:
            module = point.load()
        except Exception as error:
            raise ConfigError(f"plugins: {point.value} cannot be imported ({error!r})") from error
        _folders.extend(Path(path) for path in module.__path__)


def declared_switches() -> list[str]:
    """The names that files register transforms under, read from their text: nothing is imported."""
    switches: list[str] = []
    for path in source_files():
        switches += re.findall(r'^@register_transform\(\s*"(\w+)"', path.read_text(), re.MULTILINE)
    return switches


def source_files() -> list[Path]:
    """The files that register something."""
    paths = [PACKAGES / f"{name.replace('.', '/')}.py" for name in SHIPPED]
    folders = [PACKAGES / METHODS.replace(".", "/"), *_folders]
    for folder in folders:
        paths += sorted(folder.glob("*.py"))
    return paths


def import_folder(folder: Path) -> list[Path]:
    """Import the Python files of a folder of plugins; gives them. A second time does nothing.

    Raises:
        ConfigError: there is no such folder, or a file cannot be imported; one line.
    """
    folder = folder.resolve()
    if folder in _folders:
        return []
    if not folder.is_dir():
        raise ConfigError(f"plugins: {folder} is not a folder")
    paths = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]
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
    _folders.append(folder)
    return paths


def package_name(folder: Path) -> str:
    """The package that a folder's files are imported as: its own, so that no name of a file is
    that of another module."""
    return f"ar_ptq_plugins_{zlib.crc32(str(folder).encode()):08x}"


def plugin_folders() -> tuple[Path, ...]:
    """The folders of all plugins, installed ones first."""
    import_all()
    return tuple(_folders)
