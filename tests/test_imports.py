"""Who may import whom: arrows point downward, between packages, rooms and files."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("ptq", "models", "experiments")
FLOORS = (  # rooms of `experiments`, each of which knows the floors above it in this list
    {"options", "store"},  # which know nothing of each other
    {"plotting", "data"},
    {"config", "images"},
    {"identity"},
    {"registry", "evaluate"},
    {"estimate"},
    {"run"},
    {"sample", "export", "analyses", "speed"},
    {"train_zoo"},
    {"render", "statistics", "doctor", "allocation"},
    {"table"},
)
MOST_FILES = 20  # of code in one folder


def is_module(path: Path) -> bool:
    return path.name != "__init__.py"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {
    module_name(path): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if is_module(path)
}


def imported_files(path: Path) -> set[str]:
    """The project's files that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names & FILES.keys()


IMPORTS = {module: imported_files(path) for module, path in FILES.items()}


def importers_of(module: str) -> list[str]:
    return [name for name, imports in IMPORTS.items() if module in imports]


def floor_of(module: str) -> int:
    """The floor of the room that a module of `experiments` lies in."""
    room = module.split(".")[1]
    (floor,) = (number for number, rooms in enumerate(FLOORS) if room in rooms)
    return floor


def test_ptq_knows_no_model_and_models_know_data_types_in_adapters_alone() -> None:
    for module, imports in IMPORTS.items():
        package = module.split(".")[0]
        foreign = {name for name in imports if name.split(".")[0] != package}
        if package == "ptq":
            assert not foreign, module
        if package == "models":
            allowed = {"ptq.types"} if module.endswith(".adapter") else set()
            if module == "models.__main__":
                allowed = {"ptq.errors"}  # a command ends as all commands do
            assert foreign <= allowed, module


def test_a_room_of_experiments_knows_itself_and_the_floors_below() -> None:
    upward = []
    for module, imports in IMPORTS.items():
        if not module.startswith("experiments."):
            continue
        for other in imports:
            same_room = other.split(".")[:2] == module.split(".")[:2]
            if not other.startswith("experiments.") or same_room:
                continue
            if floor_of(other) >= floor_of(module):
                upward.append(f"{module} -> {other}")
    assert not upward


def test_no_file_imports_itself_on_a_detour() -> None:
    order = list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError
    chain = ["ptq.spec", "ptq.gps", "ptq.pipeline", "experiments.run.cell"]
    chain.append("experiments.table.__main__")
    assert sorted(chain, key=order.index) == chain


def test_numbers_know_specs_and_segments_alone() -> None:
    for module, imports in IMPORTS.items():
        if module.startswith("ptq.numbers."):
            others = {name for name in imports if not name.startswith("ptq.numbers.")}
            assert others <= {"ptq.spec", "ptq.sites", "ptq.registry.entries"}, module


def test_the_front_for_adapters_is_no_detour_inside_ptq() -> None:
    assert not [name for name in importers_of("ptq.types") if name.startswith("ptq.")]


def test_the_registry_knows_nothing_of_what_is_registered() -> None:
    for module, imports in IMPORTS.items():
        if module.startswith("ptq.registry."):
            assert all(name.startswith("ptq.registry.") for name in imports), module


def test_no_folder_is_a_drawer() -> None:
    for package in PACKAGES:
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
            assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder
