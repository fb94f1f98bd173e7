"""`models/ADDING.md` as it stands there: its files are LlamaGen's, and its commands run in a copy
of the repository whose LlamaGen is written from the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.pages import ROOT, page_commands, run_command, write_files

PAGE = ROOT / "models" / "ADDING.md"
COMMANDS = list(page_commands(PAGE))
QUOTED = {"transformer.py", "adapter.py", "generator.py", "llamagen_b_256.yaml"}


def link_all(source: Path, target: Path, own: tuple[str, ...] = ()) -> None:
    """A folder with links to what another one holds; of its folders `own` are made anew, too."""
    target.mkdir()
    for path in source.iterdir():
        if path.name in own:
            link_all(path, target / path.name)
        elif path.name != "__pycache__":
            (target / path.name).symlink_to(path)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages and configs, without what the page is to write, and then with it."""
    folder = tmp_path_factory.mktemp("copy")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    link_all(ROOT / "ptq", folder / "ptq")
    (folder / "ptq" / "conf").unlink()  # where it leads are the repository's own configs
    (folder / "ptq" / "conf").symlink_to(folder / "conf")
    link_all(ROOT / "models", folder / "models", own=("llamagen",))
    link_all(ROOT / "conf", folder / "conf", own=("model",))
    for name in QUOTED:
        places = [path for path in folder.glob(f"*/*/{name}") if "llamagen" in str(path)]
        assert len(places) == 1, name
        places[0].unlink()
    # written without following links
    assert {path.name for path in write_files(PAGE, folder)} == {*QUOTED, "try_llamagen.py"}
    return folder


def test_the_files_that_are_quoted_are_llamagens(copy: Path) -> None:
    for path in [*copy.glob("models/llamagen/*.py"), copy / "conf/model/llamagen_b_256.yaml"]:
        assert path.read_text() == (ROOT / path.relative_to(copy)).read_text()
        assert path.is_symlink() == (path.name not in QUOTED)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run_in_such_a_copy(command: str, copy: Path) -> None:
    done = run_command(command, copy, path=copy)
    assert done.returncode == 0, done.stderr[-2000:]
    if "try_llamagen" in command:
        error = float(re.search(r"at W8A8: ([0-9.]+)", done.stdout)[1])
        assert 0 < error < 0.1
    elif "info" in command:
        assert "published FID 5.46" in done.stdout
    elif "--cfg" in command:
        assert "name: llamagen_b_256" in done.stdout
    else:
        assert "llamagen_3b_384" in done.stdout
