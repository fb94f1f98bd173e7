"""Who may import whom: `ptq` knows no model, and of `ptq` models know the data types alone, in
their adapters."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for package in ("ptq", "models") for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_what_its_package_may_know(path: Path) -> None:
    modules = {m for m in imported(path) if m.split(".")[0] in ("ptq", "models", "experiments")}
    package = path.relative_to(ROOT).parts[0]
    others = {m for m in modules if m.split(".")[0] != package}
    assert others <= ({"ptq.types"} if path.name == "adapter.py" else set())
