"""Every notebook runs from its first cell to its last on the CPU, and is committed without
outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIMIT = 120  # seconds a cell, several times what it needs


def test_there_are_six() -> None:
    assert [p.name[:2] for p in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_outputs_are_committed_and_no_cell_may_fail(path: Path) -> None:
    cells = [c for c in nbformat.read(path, nbformat.NO_CONVERT).cells if c.cell_type == "code"]
    assert cells
    assert all(c.outputs == [] and c.execution_count is None for c in cells)
    # what would hide an error
    assert not any("raises-exception" in c.metadata.get("tags", ()) for c in cells)


@pytest.fixture(scope="module")
def kernel() -> Iterator[AsyncKernelManager]:
    """One process for all notebooks: imports take as long as what they compute."""
    manager = AsyncKernelManager(kernel_name="python3")
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_from_top_to_bottom(path: Path, kernel: AsyncKernelManager) -> None:
    notebook = nbformat.read(path, as_version=4)
    # no notebook lives on the names of the one before it
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    place = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, kernel, timeout=LIMIT, resources=place).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert any(o.output_type in ("stream", "display_data") for o in outputs)
    if not path.stem.startswith("05"):  # it draws what is measured, which may be nothing
        assert any("image/png" in o.get("data", {}) for o in outputs)
