"""A table's grid through Hydra's launchers: the same cells as `experiments.table` has, and finished
runs that it reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.registry.tables import find_table, table_cells
from experiments.run import __main__ as run_command
from experiments.run.table_grid import own_words, table_grid
from ptq.spec import ConfigError
from tests.experiments.cells import ROOT
from tests.experiments.table.slurm import cluster, lacking

LINE = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "eval=full", "runs=elsewhere"]


def test_the_grid_is_the_cells_of_the_table() -> None:
    grid = table_grid("methods", "[0,2]", [*LINE, "model=rar_twin,mar_twin", "quant=w6a6"])
    settings = ["model=rar_twin,mar_twin", "quant=w6a6", "eval=full", "runs=elsewhere"]
    cells = table_cells(find_table("methods"), "twin", [0, 2], [*settings, "tracker.group=methods"])
    assert grid == [list(cell.overrides) for cell in cells]
    assert len(grid) == 2 * (25 + 24)  # the released method has no cell on MAR
    assert own_words([*LINE, "quant=w6a6"]) == [*LINE[:3], "runs=elsewhere"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("reproduce", [], "^table: the cells of reproduce are several runs, give -m$"),
        ("outliers", ["-m"], "^table: outliers is made of no runs but of outliers; python -m"),
        ("reproduc", ["-m"], "did you mean reproduce"),
        ("reproduced", ["-m"], "^table: 'reproduced' is not one of .*; did you mean reproduce"),
        ("reproduce", ["-m", "row=none"], "^row: 'none' is not one of FP32, RTN"),
        ("reproduce", ["-m", "method=rtn"], "^method: the rows and seeds of a table are its own"),
        ("reproduce", ["-m", "evil=1"], "^evil: no such option or setting"),
    ],
)
def test_what_is_no_grid_is_refused(name: str, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        table_grid(name, "[0]", arguments)


def test_seeds_without_a_table_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "seeds=3", f"runs={tmp_path}", "eval=tiny"])
    with pytest.raises(SystemExit, match="^error: seeds: 3 is of a table alone, give table=NAME"):
        run_command.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.slurm
@pytest.mark.skipif(bool(lacking()), reason=lacking())
def test_a_grid_on_slurm_leaves_runs_that_the_table_reads(tmp_path: Path) -> None:
    settings = ("row=RTN", "eval=tiny", "device=cpu", f"runs={tmp_path / 'runs'}")
    launcher = (
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=cpu",
        "hydra.launcher.timeout_min=10",
        "hydra.launcher.cpus_per_task=1",
    )
    with cluster(tmp_path / "cluster") as environment:
        grid = subprocess.run(
            [sys.executable, "-m", "experiments.run", "-m", "table=reproduce", "seeds=2"]
            + [*settings, *launcher],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=480,
        )
    assert grid.returncode == 0, grid.stderr
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.json")}
    assert len(written) == 4  # of two seeds, with full precision
    table = subprocess.run(
        [sys.executable, "-m", "experiments.table", "name=reproduce", "seeds=2", *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert table.returncode == 0, table.stderr
    assert written == {path: path.stat().st_mtime_ns for path in written}
    (results,) = (tmp_path / "runs" / "tables").glob("*/results.json")
    assert [entry["seed"] for entry in json.loads(results.read_text())] == [0, 1]
