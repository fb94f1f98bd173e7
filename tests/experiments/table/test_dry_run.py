"""What `dry_run=true` says: cells, what is done, what is left, and that nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from experiments.run import __main__ as run_command
from experiments.run import cell
from experiments.run.preparation import prepare_run
from experiments.table import __main__ as table_command
from tests.experiments.cells import TINY, config_of


def price(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: str) -> list[str]:
    """The lines of `experiments.table dry_run=true`."""
    monkeypatch.setattr(sys, "argv", ["table", "dry_run=true", *words])
    table_command.main()
    return capsys.readouterr().out.splitlines()


def files_below(folder: Path) -> dict[Path, int]:
    """All files with the time of their last change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_table_is_priced_and_what_is_done_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    # a machine that nothing committed was measured on
    monkeypatch.setattr(torch, "get_num_threads", lambda: 977)
    runs = tmp_path / "runs"
    words = ("name=reproduce", f"runs={runs}", *TINY)
    lines = price(monkeypatch, capsys, *words)
    assert not list(tmp_path.iterdir())
    assert any(line.startswith("in all: 7 cells, 0 done, 7 to do: ") for line in lines)
    cell.run_cell(config_of("model=rar_twin", "method=fp", f"runs={runs}", *TINY))
    before = files_below(tmp_path)
    lines = price(monkeypatch, capsys, *words)
    assert files_below(tmp_path) == before
    assert any(line.startswith("in all: 7 cells, 1 done, 6 to do: ") for line in lines)
    (full_precision,) = (line for line in lines if line.startswith("rar_twin FP32 s0"))
    assert full_precision.split()[3] == "done"
    # of full precision the run of this machine is nearer than anything that is committed
    lines = price(monkeypatch, capsys, *words, "row=FP32", "seeds=[1]")
    assert any(f"({runs}: rar_twin on " in line for line in lines)


def test_a_benchmark_is_priced_by_what_its_committed_results_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ("name=generate", "model=rar_b", "baseline=former", f"runs={tmp_path}")
    lines = price(monkeypatch, capsys, *words)
    assert any(line.startswith("in all: 2 cells, 0 done, 2 to do: ") for line in lines)
    (cell_line,) = (line for line in lines if line.startswith("rar_b generate s0"))
    assert "(committed generate" in "".join(lines), cell_line


def test_a_part_counts_the_full_precision_cell_that_is_made_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ("name=main", "model=rar_twin", "row=RTN", f"runs={tmp_path}", *TINY)
    lines = price(monkeypatch, capsys, *words)
    names = [line.partition(" s0 ")[0] for line in lines if " s0 " in line]
    assert names == ["rar_twin full precision", "rar_twin w8a8 RTN", "rar_twin w6a6 RTN"]
    assert any(line.startswith("in all: 3 cells, 0 done") for line in lines)


def test_a_cell_that_was_begun_has_its_images_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ("name=reproduce", "row=FP32", f"runs={tmp_path}", *TINY)
    run = prepare_run(config_of("model=rar_twin", "method=fp", f"runs={tmp_path}", *TINY))
    cell.begin_run(run)
    (run.folder / "shards").mkdir()
    (run.folder / "shards" / "00000.npz").touch()
    lines = price(monkeypatch, capsys, *words)
    assert any("begun, 8 images" in line for line in lines)


def test_released_models_are_priced_without_weights_reference_or_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("AR_PTQ_CACHE", str(tmp_path))
    lines = price(
        monkeypatch,
        capsys,
        "name=rar",
        "scale=paper",
        "model=rar_b",
        f"runs={tmp_path}",
        "engine=slurm",
        "engine.gpus=4",
        "engine.jobs=2",
    )
    assert any("15 to do: " in line and "4 x NVIDIA H200 in each of 2" in line for line in lines)
    # 50,000 images of 256 pixels, their tokens and features
    assert all(" 11 GB " in line for line in lines if line.startswith("rar_b "))
    assert not list(tmp_path.iterdir())


def test_analyses_take_what_their_committed_results_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lines = price(monkeypatch, capsys, "name=outliers", f"runs={tmp_path}", "device=cpu")
    assert any("measured elsewhere (committed outliers)" in line for line in lines)


def test_a_run_and_a_grid_of_runs_are_priced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["-m", "method=fp,rtn", f"runs={tmp_path / 'runs'}", *TINY]
    monkeypatch.setattr(sys, "argv", ["run", "dry_run=true", *words])
    run_command.main()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("in all: 2 cells, 0 done, 2 to do: ") for line in lines)
    assert not list(tmp_path.iterdir())
