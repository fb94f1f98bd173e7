"""Result files that do not count are named and left out, never averaged in; cells whose file is
damaged run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from experiments.config.compose import configure
from experiments.config.schema import RunConfig
from experiments.identity.results import committed_results, read_counting, stored_result
from experiments.identity.whole import whole_identity
from experiments.registry import tables
from experiments.run import cell, preparation
from experiments.store import results
from experiments.store.results import RESULT_VERSION, ResultError
from models.registry import Generator
from ptq.files import seal_object, value_digest
from tests.experiments.cells import tiny
from tests.experiments.identity.identities import made_origin


def made(kl: float = 0.5, version: int = RESULT_VERSION) -> dict[str, Any]:
    return {
        "cell": {"model": "m"},
        "seed": 0,
        "metrics": {"kl": kl},
        "cost": {},
        "provenance": made_origin(version=version),
    }


def sealed(result: dict[str, Any]) -> dict[str, Any]:
    """With its digest, unless it holds a number that has none."""
    try:
        return seal_object(result)
    except ValueError:
        return result


def save(folder: Path, result: dict[str, Any], name: str | None = None) -> Path:
    path = folder / f"m-s0-{name or result['provenance']['hash']}" / results.RESULT
    path.parent.mkdir()
    path.write_text(json.dumps(sealed(result)))
    return path


def test_a_whole_file_of_this_version_and_hash_counts(tmp_path: Path) -> None:
    path = save(tmp_path, made())
    folder = path.parent
    assert results.read_result(path) == made()
    origin = made()["provenance"]
    whole = whole_identity(origin["identity"], origin["device_class"])
    assert stored_result(folder, whole) == made()


def older(result: dict[str, Any]) -> dict[str, Any]:
    return made(version=RESULT_VERSION - 1)


def without_identity(result: dict[str, Any]) -> dict[str, Any]:
    del result["provenance"]["identity"]
    return result


def without_metrics(result: dict[str, Any]) -> dict[str, Any]:
    del result["metrics"]
    return result


def of_another_run(result: dict[str, Any]) -> dict[str, Any]:
    result["provenance"]["identity"]["model"] = "other"
    return result


def not_finite(result: dict[str, Any]) -> dict[str, Any]:
    result["metrics"]["kl"] = float("nan")
    return result


def in_words(result: dict[str, Any]) -> dict[str, Any]:
    result["metrics"]["kl"] = "0.1"
    return result


def without_number(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "seed": "0"}


def without_row(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "table": {"name": "t", "point": {}}}


def without_place(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "table": None}


def without_mapping(result: dict[str, Any]) -> dict[str, Any]:
    result["metrics"] = [result["metrics"]]
    return result


@pytest.mark.parametrize(
    ("change", "expected_fault"),
    [
        (without_mapping, "is no result, its metrics is no mapping"),
        (older, f"is of RESULT_VERSION {RESULT_VERSION - 1}, this code's is {RESULT_VERSION}"),
        (without_identity, "is of RESULT_VERSION 1"),
        (without_metrics, "is no result, it lacks metrics"),
        (of_another_run, "is of run"),
        (not_finite, "cannot be read (it is truncated or damaged)"),
        (in_words, "is no result, its kl is '0.1'"),
        (without_number, "is no result, its seed is '0'"),
        (without_row, "its table has no row or no point"),
        (without_place, "its table has no row or no point"),
    ],
)
def test_a_file_that_does_not_count_is_named_with_the_reason(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], expected_fault: str
) -> None:
    key = change(made())["provenance"]["hash"]
    path = save(tmp_path, change(made()), key)
    with pytest.raises(ResultError, match=f"^{path}: ") as refused:
        read_counting(path)
    assert expected_fault in str(refused.value)


def test_a_file_under_another_runs_name_and_a_truncated_one_are_refused(tmp_path: Path) -> None:
    renamed = save(tmp_path, made(), "01234567")
    with pytest.raises(ResultError, match="is named after another"):
        read_counting(renamed)
    cut = save(tmp_path, made())
    cut.write_text(cut.read_text()[:-5])
    with pytest.raises(ResultError, match="truncated or damaged"):
        read_counting(cut)


def committed_file(folder: Path) -> Path:
    """A file of three results of a model."""
    path = folder / "t" / "m.jsonl"
    copies = []
    for number in range(3):
        place = {"name": "t", "scale": "twin", "row": f"row {number}", "point": {"model": "m"}}
        copies.append(made() | {"schema": 1, "provenance": made_origin(n=number), "table": place})
    results.write_committed(path, copies)
    return path


def test_committed_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    found, fault = results.read_committed(committed_file(tmp_path))
    assert [result["table"]["row"] for result in found] == ["row 0", "row 1", "row 2"]
    assert [result["provenance"] for result in found] == [made_origin(n=n) for n in range(3)]
    assert not fault


def copy_of(row: str, **more: Any) -> dict[str, Any]:
    """A copy that has everything as results of tables have it."""
    origin = made_origin(eval={"name": "full", "n": 10000}, row=row)
    versions = {"torch": "2.11.0", "device": "a device"}
    return {
        "schema": 1,
        "cell": {"model": "m", "method": "fp", "eval": "full"},
        "seed": 0,
        "metrics": {"kl": 0.5, "fid": None},
        "cost": {"cell_s": 1},
        "provenance": {**origin, "revision": "abc", "versions": versions, "images": 10000},
        "table": {"name": "t", "scale": "twin", "row": row, "point": {"model": "m"}},
        **more,
    }


def analysis_of(row: str) -> dict[str, Any]:
    """A result of another shape: null and less where the others have more."""
    result = copy_of(row, detail={"blocks": [{"kl": 1}, {"kl": 1.0}]})
    result["provenance"] |= {"images": None, "versions": {"torch": "2.11.0"}}
    del result["schema"]
    del result["provenance"]["revision"]
    return result


COPIES = {
    "none": [],
    "one": [copy_of("a")],
    "similar": [copy_of(str(number)) for number in range(9)],
    "of two shapes": [copy_of("a"), copy_of("b"), analysis_of("c")],
    "of equal numbers": [copy_of("a"), copy_of("b", schema=1.0), copy_of("c", schema=True)],
}


def as_texts(found: list[dict[str, Any]]) -> list[str]:
    """For comparison: as values, 1 and 1.0 and true are equal."""
    return [json.dumps(result, sort_keys=True) for result in found]


@pytest.mark.parametrize("copies", COPIES.values(), ids=COPIES.keys())
def test_committed_results_come_back_whole_whatever_they_have_in_common(
    copies: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "m.jsonl"
    results.write_committed(path, copies)
    found, fault = results.read_committed(path)
    assert as_texts(found) == as_texts(copies)
    assert not fault
    for result, written in zip(found, copies):
        assert list(result["metrics"]) == list(written["metrics"])
    text = path.read_text()
    results.write_committed(path, found)
    assert path.read_text() == text, "what is read and written again is the same file"


def test_what_results_have_in_common_stands_once_in_their_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    copies = [copy_of(str(number)) for number in range(100)]
    results.write_committed(path, copies)
    head, *lines = path.read_text().splitlines()
    common = json.loads(head)["common"]
    assert common["provenance"]["versions"] == {"torch": "2.11.0", "device": "a device"}
    assert common["provenance"]["identity"]["eval"] == {"name": "full", "n": 10000}
    assert json.loads(lines[7]) == {
        "provenance": {
            "hash": copies[7]["provenance"]["hash"],
            "identity": {"row": "7"},
            "identity_digest": copies[7]["provenance"]["identity_digest"],
        },
        "table": {"row": "7"},
        "seed": 0,
        "metrics": {"kl": 0.5, "fid": None},  # what was measured stays together
        "cost": {"cell_s": 1},
        "digest": seal_object(copies[7])["digest"],
    }
    assert path.stat().st_size < 0.6 * len(former_text(copies))


def former_text(copies: list[dict[str, Any]]) -> str:
    """A file of committed results as former code wrote it, with whole results in its lines."""
    wholes = [seal_object(result) for result in copies]
    digests = [result["digest"] for result in wholes]
    head = {"results": len(wholes), "digest": value_digest(digests)}
    return "\n".join(json.dumps(line) for line in (head, *wholes)) + "\n"


def test_files_of_former_code_are_read(tmp_path: Path) -> None:
    copies = COPIES["of two shapes"]
    path = tmp_path / "m.jsonl"
    path.write_text(former_text(copies))
    assert results.read_committed(path) == (copies, "")
    _, *lines = former_text(copies).splitlines()
    path.write_text("\n".join(["{}", *lines]))
    fault = f"{path}: line 1: is damaged (it is not the first line of committed results)"
    assert results.read_committed(path) == (copies, fault), "its lines are whole without the first"


def test_results_of_a_file_share_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    results.write_committed(path, COPIES["similar"])
    first, second, *_ = results.read_committed(path)[0]
    first["provenance"]["versions"]["torch"] = "other"
    assert second["provenance"]["versions"]["torch"] == "2.11.0"


def without_a_line(lines: list[str]) -> list[str]:
    return lines[:-1]


def with_a_line_twice(lines: list[str]) -> list[str]:
    return [*lines, lines[1]]


def with_another_figure(lines: list[str]) -> list[str]:
    return [*lines[:2], lines[2].replace('"kl":0.5', '"kl":0.4'), lines[3]]


def with_another_schema(lines: list[str]) -> list[str]:
    return [*lines[:2], lines[2].replace('"seed"', '"schema":2,"seed"'), lines[3]]


def with_a_line_that_is_no_mapping(lines: list[str]) -> list[str]:
    return [*lines[:2], "[1]", lines[3]]


def with_a_truncated_first_line(lines: list[str]) -> list[str]:
    return [lines[0][:-1], *lines[1:]]


def without_the_first(lines: list[str]) -> list[str]:
    return lines[1:]


def without_any(lines: list[str]) -> list[str]:
    return []


NO_FIRST = "line 1: is damaged (it is not the first line of committed results) (and 2 more)"


@pytest.mark.parametrize(
    ("change", "rows", "expected_fault"),
    [
        (without_a_line, ["row 0", "row 1"], "is damaged (its first line is not that of"),
        (with_a_line_twice, ["row 0", "row 1", "row 2"], "is damaged (its first line is not that"),
        (with_another_figure, ["row 0", "row 2"], "line 3: is damaged (its content has the digest"),
        (with_another_schema, ["row 0", "row 2"], "line 3: is damaged (its content has"),
        (with_a_line_that_is_no_mapping, ["row 0", "row 2"], "line 3: is no result, it lacks cell"),
        (with_a_truncated_first_line, [], "line 1: cannot be read (it is truncated or damaged)"),
        (without_the_first, [], NO_FIRST),
        (without_any, [], "line 1: cannot be read (it is truncated or damaged)"),
    ],
)
def test_what_changed_in_a_committed_file_is_named_and_the_rest_counts(
    tmp_path: Path, change: Callable[[list[str]], list[str]], rows: list[str], expected_fault: str
) -> None:
    path = committed_file(tmp_path)
    path.write_text("\n".join(change(path.read_text().splitlines())))
    found, fault = results.read_committed(path)
    assert [result["table"]["row"] for result in found] == rows
    assert fault.startswith(f"{path}: {expected_fault}")


def other_value(head: dict[str, Any]) -> None:
    head["common"]["cell"]["model"] = "other"


def unsealed(head: dict[str, Any]) -> None:
    del head["common"]["digest"]


def a_list(head: dict[str, Any]) -> None:
    head["common"] = [head["common"]]


def under_another_name(head: dict[str, Any]) -> None:
    head["commom"] = head.pop("common")


def gone(head: dict[str, Any]) -> None:
    del head["common"]


@pytest.mark.parametrize(
    ("change", "expected_fault"),
    [
        (other_value, "line 1: common: is damaged (its content has the digest"),
        (unsealed, "line 1: common: is damaged (it has no digest)"),
        (a_list, "line 1: common: is damaged (it has no digest)"),
        (under_another_name, "line 1: is damaged (it is not the first line of committed results)"),
        (gone, "line 2: is "),  # as if its lines were whole
    ],
)
def test_a_damaged_common_part_is_named_and_nothing_of_the_file_counts(
    change: Callable[[dict[str, Any]], None], expected_fault: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.jsonl"
    results.write_committed(path, COPIES["similar"])
    line, *lines = path.read_text().splitlines()
    head = json.loads(line)
    change(head)
    path.write_text("\n".join([json.dumps(head), *lines]))
    found, fault = results.read_committed(path)
    assert not found
    assert fault.startswith(f"{path}: {expected_fault}")
    assert "\n" not in fault


def test_a_committed_file_of_another_model_is_ignored(tmp_path: Path) -> None:
    path = committed_file(tmp_path)
    renamed = path.rename(path.with_name("other.jsonl"))
    assert results.read_committed(renamed) == ([], f"{renamed}: line 2: is of model m (and 2 more)")


def test_a_result_of_another_table_is_named_and_not_averaged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    place = {"row": "PTQ4ARVG", "point": {"model": "rar_twin", "quant": "w6a6"}}
    copies = []
    for n, (name, scale) in enumerate([("rar", "twin"), ("main", "twin"), ("rar", "paper")]):
        table = {"name": name, "scale": scale, **place}
        copies.append(made() | {"provenance": made_origin(n=n), "table": table})
    results.write_committed(tmp_path / "rar" / "m.jsonl", copies)
    found, ignored = committed_results("rar")
    assert [r["table"]["name"] for r in found] == ["rar"]
    assert sorted(line.rpartition(" is of ")[2] for line in ignored) == ["main", "rar-paper"]


def test_a_finished_cell_whose_result_is_damaged_is_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path, "method=fp", "eval.n=8", "eval.sequences=4")
    first = cell.run_cell(config)
    path = cell.prepare_run(config).folder / "metrics.json"
    path.write_text(path.read_text()[:200])
    again = cell.run_cell(config)
    assert again["metrics"] == first["metrics"]
    assert capsys.readouterr().err.count(f"ignored: {path}") == 1
    assert results.read_result(path)["metrics"] == first["metrics"]


MADE = [
    name
    for name, table in tables.load_tables().items()
    if "twin" in table.models and (results.ROOT / name).is_dir()
]


@cache
def shipped(name: str) -> Generator:
    return models.load(name)


def load_once(config: RunConfig, device: torch.device) -> Generator:
    """Takes the place of `load_model`: the identities of hundreds of cells ask for eight twins."""
    assert (config.model.weights, config.dtype) == (None, "float32")
    return shipped(config.model.name)


@pytest.mark.parametrize("name", MADE)
def test_committed_results_are_those_of_the_registrys_cells(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All places, and of every row and model one identity; widths and seeds take turns."""
    monkeypatch.setattr(preparation, "load_model", load_once)
    table = tables.find_table(name)
    found = {}
    for result in committed_results(name)[0]:
        place = result["table"]
        key = (place["row"], tuple(sorted(place["point"].items())), result["seed"])
        assert key not in found
        found[key] = result["provenance"]["identity"]
    groups: dict[tuple[str, str], list[tables.Cell]] = {}
    # what `make reproduce` compares itself with is of its own size
    size = [] if name == "reproduce" else ["eval=full"]
    for one in tables.table_cells(table, "twin", (0, 1, 2), size):
        if (key := (one.row, tuple(sorted(one.point.items())), one.seed)) in found:
            groups.setdefault((one.row, one.point["model"]), []).append(one)
    assert sum(len(group) for group in groups.values()) == len(found)
    for turn, group in enumerate(groups.values()):
        one = group[turn % len(group)]
        identity = found[one.row, tuple(sorted(one.point.items())), one.seed]
        if table.what == "speed":
            left = [o for o in one.overrides if o.split("=")[0] not in ("seed", "sampler", "eval")]
            assert sorted(identity["overrides"]) == sorted(left)
            continue
        expected = cell.prepare_run(configure(list(one.overrides))).departures
        if table.what != "run":
            expected |= {"what": table.what, "options": dict(table.options)}
        assert identity == json.loads(json.dumps(expected)), one


@pytest.mark.parametrize(
    ("metric", "images", "shown"),
    [
        ("fid", 256, False),
        ("fid", 2000, True),
        ("lite0_fid", 256, False),
        ("agreement", 256, True),
        ("agreement", 4, False),
        ("kl", 4, True),
        ("fid", None, True),
    ],
)
def test_metrics_of_a_set_are_shown_from_so_many_images_on(
    metric: str, images: int | None, shown: bool
) -> None:
    assert results.is_shown(metric, images) is shown


@pytest.mark.parametrize("folder", sorted(path.name for path in results.ROOT.glob("*/")))
def test_committed_files_are_as_they_are_written(folder: str, tmp_path: Path) -> None:
    for path in (results.ROOT / folder).glob(f"*{results.COMMITTED}"):
        committed, fault = results.read_committed(path)
        assert not fault
        again = tmp_path / path.name
        results.write_committed(again, committed)
        assert again.read_bytes() == path.read_bytes(), path.name
