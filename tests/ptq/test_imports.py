"""Inside `ptq` arrows point downward: no circle of imports, numbers stand on plain values alone."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted((ROOT / "ptq").rglob("*.py"))
    if path.name != "__init__.py"
}


def imported_files(path: Path) -> set[str]:
    """The files of `ptq` that a file imports, whether as a module or names of it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names & FILES.keys()


def test_no_file_imports_itself_on_a_detour() -> None:
    graph = {name: imported_files(path) for name, path in FILES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("ptq.spec") < order.index("ptq.gps") < order.index("ptq.pipeline")


def test_numbers_know_specs_and_segments_alone() -> None:
    for name, path in FILES.items():
        if name.startswith("ptq.numbers."):
            others = {n for n in imported_files(path) if not n.startswith("ptq.numbers.")}
            assert others <= {"ptq.spec", "ptq.sites"}, name


def test_the_front_for_adapters_is_no_detour_inside() -> None:
    assert not [name for name, path in FILES.items() if "ptq.types" in imported_files(path)]


def test_only_the_pipeline_reads_the_registry_of_methods() -> None:
    readers = [
        name for name, path in FILES.items() if "ptq.methods.registry" in imported_files(path)
    ]
    assert readers == ["ptq.pipeline"]
