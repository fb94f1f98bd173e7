"""The README's commands are ones the project understands, its map names every page, and links of
all pages lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from experiments.render.options import parse as parse_render
from tests.experiments.cells import config_of
from tests.experiments.table.requests import request_of
from tests.pages import ROOT

TESTED = ("conf", "experiments", "models", "notebooks", "ptq")
PAGES = sorted([ROOT / "README.md", *(p for f in TESTED for p in (ROOT / f).rglob("*.md"))])
COMMANDS = re.findall(r"^(python -m \S+.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_module_and_a_config_that_composes(command: str) -> None:
    module, *arguments = shlex.split(command.split("#")[0])[2:]
    assert importlib.util.find_spec(module) is not None
    overrides = [a for a in arguments if "=" in a]
    if module == "experiments.run":
        config_of(*(o.split(",")[0] for o in overrides))  # the first of the values of a multirun
    elif module == "experiments.table":
        # cells of other seeds are configured alike
        assert request_of(*(a for a in arguments if not a.startswith("seeds="))).cells
    elif module == "experiments.render":
        assert parse_render(arguments)


def links_of(page: Path) -> list[tuple[Path, str]]:
    """Files inside the repository that a page links to, with the anchor in them."""
    found = []
    prose = re.sub(
        r"```.*?^```|`[^`\n]*`(?!\])", "", page.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            found.append((page.parent / name if name else page, anchor))
    return found


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as the forge makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for target, anchor in links_of(path):
        assert target.exists(), target
        if anchor:
            assert anchor in anchors_of(target), f"{target}#{anchor}"


def test_the_map_names_every_page() -> None:
    page = ROOT / "README.md"
    table = page.read_text().partition("\n## Pages\n")[2]
    named = set(re.findall(r"\]\(([^)#]+)\)", table))
    missing = {str(p.relative_to(ROOT)) for p in PAGES} - named - {"README.md"}
    assert not missing


def test_a_picture_says_what_it_shows() -> None:
    for page in PAGES:
        for words, link in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text()):
            assert len(words) > 20, (page, link)


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
