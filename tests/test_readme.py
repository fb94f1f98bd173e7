"""The README's commands are ones the project understands, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from experiments.render.options import parse as parse_render
from experiments.table.request import parse_request
from tests.experiments.cells import config_of

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")]
COMMANDS = re.findall(r"^(python -m \S+.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_module_and_a_config_that_composes(command: str) -> None:
    module, *arguments = shlex.split(command.split("#")[0])[2:]
    assert importlib.util.find_spec(module) is not None
    overrides = [a for a in arguments if "=" in a]
    if module == "experiments.run":
        config_of(*(o.split(",")[0] for o in overrides))  # the first of the values of a multirun
    elif module == "experiments.table":
        assert parse_request(arguments).cells
    elif module == "experiments.render":
        assert parse_render(arguments)


@pytest.mark.parametrize("path", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_exist(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("package", ["ptq", "models"])
def test_python_on_the_pages_runs_as_printed(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / package / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, f"{package}/README.md", "exec"), names)
    assert blocks
