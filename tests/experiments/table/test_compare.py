"""Two folders side by side, and a table beside its committed results: what counts as a difference.

The results are made up: figures of a cell depend on its row, point and seed.
"""

from __future__ import annotations

import copy
import csv
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from experiments.store import results
from experiments.store.files import write_json
from experiments.table.compare import command as compare
from experiments.table.compare import expected
from experiments.table.compare.agreement import (
    AGREES,
    DIFFERS,
    UNDECIDED,
    Agreement,
    share_deviation,
)
from ptq.files import seal_object
from tests.experiments.render.rendering import commit, results_of


def changed(found: list[dict[str, Any]], row: str, **figures: float) -> list[dict[str, Any]]:
    """The results with other figures of a row."""
    copies = copy.deepcopy(found)
    for result in copies:
        if result["table"]["row"] == row:
            result["metrics"] |= figures
    return copies


def write_table(folder: Path, found: list[dict[str, Any]]) -> Path:
    """Results as a table leaves them below `runs/tables`."""
    folder.mkdir(parents=True)
    write_json(folder / "results.json", [seal_object(result) for result in found])
    return folder


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return results_of("reproduce", seeds=3)


@pytest.fixture
def committed(tmp_path: Path, found: list[dict[str, Any]]) -> Path:
    commit(tmp_path / "committed", "reproduce", found)
    return tmp_path / "committed" / "reproduce"


def run(*arguments: object) -> int:
    """The exit status of the command."""
    try:
        compare.main(list(map(str, arguments)))
    except SystemExit as stopped:
        if isinstance(stopped.code, str):  # which Python prints
            print(stopped.code, file=sys.stderr)
            return 1
        return int(stopped.code or 0)
    return 0


def test_one_seed_may_lie_within_what_three_allow() -> None:
    seeds = [1.0, 1.1, 1.2]  # deviation .1
    allowed = stats.t.ppf(0.995, 2) * 0.1 * math.sqrt(4 / 3)
    assert Agreement(seeds, [1.1]).allowed == pytest.approx(allowed)
    assert allowed == pytest.approx(11.5 * 0.1, rel=0.01)
    assert Agreement(seeds, [1.1 + 0.99 * allowed]).verdict == AGREES
    assert Agreement(seeds, [1.1 + 1.01 * allowed]).verdict == DIFFERS
    assert Agreement([1.1 - 1.01 * allowed], seeds).verdict == DIFFERS


def test_seeds_that_are_alike_leave_room_for_rounding_alone() -> None:
    assert Agreement([3.0, 3.0, 3.0], [3.029]).verdict == AGREES
    assert Agreement([3.0, 3.0, 3.0], [3.04]).verdict == DIFFERS
    assert Agreement([3.0], [3.04]).verdict == UNDECIDED
    assert Agreement([3.0], [3.0]).verdict == AGREES


def test_a_share_of_few_images_may_differ_by_what_draws_do() -> None:
    deviation = share_deviation(0.9, 256)
    assert deviation == pytest.approx(0.01875)
    allowed = 2.5758 * deviation * math.sqrt(1 / 2 + 1 / 3)
    alike = ([0.9, 0.9], [0.9 + 0.99 * allowed] * 3)
    assert Agreement(*alike).verdict == DIFFERS
    assert Agreement(*alike, deviation).verdict == AGREES
    assert Agreement([0.9, 0.9], [0.9 + 1.01 * allowed] * 3, deviation).verdict == DIFFERS
    assert stats.norm.ppf(0.995) == pytest.approx(2.5758, abs=1e-4)


def test_equal_folders_agree_whatever_they_are(
    tmp_path: Path, committed: Path, found: list[dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    table = write_table(tmp_path / "tables" / "reproduce", found[::-1])
    assert run(committed, table) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"A: {committed}, 7 cells"
    # KL, NLL, FID, IS and FID to FP, of full precision those that are its own
    assert said[-1] == "figures: 33 agrees"


def test_what_differs_beyond_the_spread_is_listed_and_ends_with_status_1(
    tmp_path: Path, committed: Path, found: list[dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    others = write_table(tmp_path / "others", changed(found, "RTN", nll=20.0))
    table = tmp_path / "figures.csv"
    assert run(committed, others, f"csv={table}") == 1
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "figures: 32 agrees, 1 differs"
    (listed,) = (line for line in said.splitlines() if line.endswith("differs") and "RTN" in line)
    assert listed.split()[:5] == ["rar_twin", "W6A6", "RTN", "nll", listed.split()[4]]
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 33
    (line,) = (line for line in lines if line["verdict"] == "differs")
    assert (line["method"], line["metric"], line["B"], line["B std"]) == (
        "RTN",
        "nll",
        "20.0",
        "0.0",
    )
    assert float(line["difference"]) == pytest.approx(20 - float(line["A"]))
    assert abs(float(line["difference"])) > float(line["allowed"])


def test_cells_of_one_folder_alone_are_named(
    tmp_path: Path, committed: Path, found: list[dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    fewer = [result for result in found if result["table"]["row"] not in ("RTN", "PTQ4ARVG")]
    assert run(committed, write_table(tmp_path / "others", fewer)) == 1
    said = capsys.readouterr().out.splitlines()
    assert "only in A: rar_twin W6A6: PTQ4ARVG, RTN" in said
    assert said[-1].endswith("2 cells in one folder alone")


def test_other_sizes_and_conditions_are_named_and_not_compared(
    tmp_path: Path, committed: Path, found: list[dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    others = copy.deepcopy(found)
    for result in others:
        result["provenance"] |= {"sequences": 8, "revision": "abc", "images": 2000}
        result["metrics"]["nll"] = 99.0
    assert run(committed, write_table(tmp_path / "others", others)) == 0
    said = capsys.readouterr().out.splitlines()
    assert "all cells: revision is None in A, abc in B" in said
    assert said[-1] == "figures: 20 agrees, 13 other sizes"


def test_damaged_results_are_named_and_folders_without_any_refused(
    tmp_path: Path, committed: Path, capsys: pytest.CaptureFixture
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(committed, damaged)
    (path,) = damaged.glob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1].replace("STWQ", "STWX"))
    run(committed, damaged)
    assert f"ignored: {path}" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for folders, message in (
        ((committed, tmp_path / "empty"), "holds no results"),
        ((committed, tmp_path / "nowhere"), "is not a folder"),
        ((committed,), "1 are given, expected two"),
    ):
        assert run(*folders) == 1
        assert message in capsys.readouterr().err


def end_of(found: list[dict[str, Any]], folder: Path) -> list[str]:
    return list(expected.describe_end("reproduce", found, folder))


def test_what_was_expected_is_of_the_sizes_of_the_models_that_were_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    both = results_of("methods", seeds=3, scale="natural")
    of_var = [result for result in both if result["cell"]["model"] == "var_natural"]
    for result in of_var:
        result["provenance"]["sequences"] = 25
    commit(tmp_path, "methods-natural", both)
    first, *_ = expected.describe_end("methods-natural", of_var, tmp_path)
    assert first == (
        "expected: committed results of methods-natural (3 seeds, 2,000 images and 25 held-out "
        "sequences per run; a device)"
    )


def test_a_table_ends_with_what_was_expected_and_whether_it_agrees(
    tmp_path: Path,
    committed: Path,
    found: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(results, "ROOT", committed.parent)
    (tmp_path / "samples.png").touch()
    first_seed = [result for result in found if result["seed"] == 0]
    lines = end_of(first_seed, tmp_path)
    assert lines[0] == f"picture: {tmp_path / 'samples.png'}"
    assert lines[1] == (
        "expected: committed results of reproduce (3 seeds, 2,000 images and 50 held-out "
        "sequences per run; a device)"
    )
    assert lines[2].startswith("  rar_twin FP32: NLL ")
    assert lines[-1] == "agrees: 33 of 33 figures within the spread"
    assert len(lines) == 10

    lines = end_of(changed(first_seed, "RTN", kl=50.0), tmp_path)
    assert lines[2].startswith("  rar_twin W6A6 RTN: KL to FP 50.0000, expected 0.")
    assert lines[3] == "differs: 32 of 33 figures within the spread"

    other_size = copy.deepcopy(first_seed)
    for result in other_size:
        result["provenance"] |= {"images": 256, "sequences": 256}
    assert end_of(other_size, tmp_path)[1] == (
        "expected: nothing to compare with, committed results of reproduce are of 2,000 images "
        "and 50 held-out sequences per run"
    )
    # analyses have no images
    without_images = copy.deepcopy(first_seed[0])
    without_images["provenance"] = {"images": None}
    (line,) = expected.describe_figures("outliers", [], [without_images])
    assert line.endswith(
        "nothing to compare with, committed results of outliers are of other cells"
    )

    # a table without committed results says nothing
    assert len(list(expected.describe_end("main", first_seed, tmp_path))) == 1
