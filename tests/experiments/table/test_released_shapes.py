"""The way of a user with official files, at full size: made-up weights of the smallest preset of
each family are added, listed, priced, and two cells of the paper's table are made of them, four
images each. Gigabytes on disk, and minutes a model; with `-s` the commands show what they print,
and how long they took."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ptq.files import read_json
from tests.experiments.cells import ROOT
from tests.official import save_inception, save_reference, save_released

Run = Callable[..., str]
ROW = "PTQ4ARVG"  # needs the full-precision cell, which is made before it
# of 64 steps of MAR and 100 of its diffusion head, which would take hours on a CPU
SHORTER = {
    "mar_b": ("sampler.settings.num_iter=4", "sampler.settings.diffusion_steps=ddim25"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is removed at once: pytest would keep the last three."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture
def run(folder: Path) -> Run:
    """Runs a command of the project as a process, with a cache of its own and no network."""
    variables = {"AR_PTQ_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}

    def run_command(*command: str) -> str:
        started = time.perf_counter()
        process = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - started
        print(f"{seconds:7.1f} s  python -m {' '.join(command)}\n{process.stdout}")
        assert process.returncode == 0, process.stderr
        return process.stdout

    return run_command


@pytest.mark.slow
@pytest.mark.parametrize("name", ["var_d16", "rar_b", "par_xl_4x", "mar_b"])
def test_two_cells_of_the_papers_table(name: str, folder: Path, run: Run) -> None:
    (folder / "weights").mkdir()
    save_released(name, folder / "weights")
    assert run("models", "add", str(folder / "weights")).count("added: ") == 2
    listed = next(
        line for line in run("models", "list").splitlines() if line.startswith(f"{name} ")
    )
    assert listed.split()[-2:] == ["added", "added"]

    table = (
        "experiments.table",
        f"name={name.partition('_')[0]}",
        "scale=paper",
        f"model={name}",
        f"row={ROW}",
        "quant=w6a6",
        "eval=tiny",
        f"reference={save_reference(folder / 'reference.npz')}",
        f"inception={save_inception(folder)}",
        f"runs={folder / 'runs'}",
        *SHORTER.get(name, ()),
    )
    assert "in all: 2 cells, 0 done, 2 to do" in run(*table, "dry_run=true")
    assert f"| `{name}` |" in run(*table)  # of the gate
    cells = [read_json(path) for path in (folder / "runs").glob(f"{name}-*/metrics.json")]
    assert sorted(cell["cell"]["method"] for cell in cells) == ["fp", "ptq4arvg"]
    for cell in cells:
        assert cell["provenance"]["images"] == 4
        assert cell["metrics"]["fid"] > 0
    assert "in all: 2 cells, 2 done, 0 to do" in run(*table, "dry_run=true")
