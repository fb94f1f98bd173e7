"""The files and commands of a page, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def write_files(page: Path, folder: Path) -> list[Path]:
    """Write the files that a page shows (blocks with a path in their first line) below a folder."""
    paths = []
    for head, text in BLOCK.findall(page.read_text()):
        _, _, name = head.partition(" ")
        if name:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            paths.append(path)
    return paths


def page_commands(page: Path) -> Iterator[str]:
    """The commands that a page shows (in blocks without a language), a line each."""
    for head, text in BLOCK.findall(page.read_text()):
        if not head:
            yield from text.splitlines()


def run_command(command: str, folder: Path, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a page's command in a folder outside of the checkout, with the packages of `path`."""
    program, *arguments = command.split()
    assert program == "python"
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
