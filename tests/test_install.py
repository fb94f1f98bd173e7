"""The README's "Use", as printed, with a wheel that is built and installed as a user would, outside
the checkout."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.pages import ROOT

SOURCES = ("ptq", "models", "experiments", "conf", "pyproject.toml", "README.md")
USE = (ROOT / "README.md").read_text().partition("\n## Use\n")[2].partition("\n## ")[0]
(SNIPPET,) = re.findall(r"^```python\n(.*?)^```", USE, re.MULTILINE | re.DOTALL)
(COMMAND,) = re.findall(r"`python -m (experiments\.sample [^`]*)`", USE)
ROWS = 8  # that calibrate here, in place of 128

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, folder: Path) -> str:
    """Run a command to its end outside the checkout; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, which sees this suite's packages too."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # links: building leaves nothing in the checkout, and copies less
    source.mkdir()
    for name in SOURCES:
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    run(*pip, *build, folder=folder)
    (wheel,) = folder.glob("*.whl")

    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    (packages / "suite.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["--python", python, "install", "--no-deps", "--no-index", wheel]
    run(*pip, *install, folder=folder)
    return python


INSTALLED = f"""
import sys
from ptq.use.quantizing import quantize
quantize.__wrapped__.__kwdefaults__["num_samples"] = {ROWS}
{SNIPPET}
import experiments.sample.__main__ as command
from experiments.store.provenance import code_revision
from ptq.config.files import CONF
assert [image.size for image in images] == [(32, 32), (32, 32)]
for place in (models.__file__, CONF, models.registry.ZOO, command.__file__):
    assert str(place).startswith(sys.prefix), place
assert code_revision() is None
sys.argv = {["sample", *shlex.split(COMMAND)[1:]]}
command.main()
"""


def test_the_five_lines_and_the_command_run_as_printed(installed: Path, tmp_path: Path) -> None:
    """Packages, configs and shipped weights are found where they are installed."""
    printed = run(installed, "-c", INSTALLED, folder=tmp_path)
    assert "16 images: runs/samples/rar_twin-ptq4arvg-w8a8-int8-s0-" in printed
    (grid,) = tmp_path.glob("runs/samples/*/grid.png")
    assert grid.stat().st_size > 0
    assert "method=ptq4arvg" in run(installed, "-m", "experiments.run", "--help", folder=tmp_path)


def test_the_wheel_has_what_the_report_is_made_with(installed: Path) -> None:
    (wheel,) = installed.parents[2].glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"experiments/render/assets/report.{kind}" for kind in ("css", "js")} <= set(names)


def test_what_is_pinned_lies_in_the_ranges() -> None:
    """`requirements.txt` has the versions that are tested, `pyproject.toml` those allowed."""
    from packaging.requirements import Requirement

    pinned = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned[name] = version
    allowed = {found.name: found for found in map(Requirement, PROJECT["dependencies"])}
    assert allowed.keys() == pinned.keys()
    for name, version in pinned.items():
        assert allowed[name].specifier.contains(version), name
        assert len(allowed[name].specifier) >= 1, name
