"""The table command: what it refuses, failures that do not stop the rest, and what it publishes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments.identity.results import committed_results
from experiments.registry import tables
from experiments.registry.seeds import parse_seeds
from experiments.store import results
from experiments.table import __main__ as table
from experiments.table import job_queue, request
from experiments.table.options import absolute_path
from experiments.table.publish import publish_results
from experiments.table.tables import folder_name, run_request, write_table
from models.weights.checkpoints import CheckpointError
from ptq.types import ConfigError
from tests.experiments.cells import TINY
from tests.experiments.table.requests import request_of


@pytest.mark.parametrize("key", ["plugins", "heldout", "model.weights", "model.tokenizer_weights"])
def test_workers_find_files_wherever_they_run(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_path(f"{key}=a/b.pt") == f"{key}={tmp_path}/a/b.pt"
    assert absolute_path(f"{key}=null") == f"{key}=null"
    assert absolute_path(f"{key}='a b.pt'") == f"{key}='a b.pt'"
    assert absolute_path("runs=a") == "runs=a"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("name=nope", "name: 'nope' is not one of reproduce, main"),
        ("scale=toy", "scale: 'toy' is not one of"),
        ("seeds=[]", "seeds: [] is not a list"),
        ("seeds=0", "seeds: 0 is not a list"),
        ("seeds=1000000000", "seeds: 1000000000 is not a list of integers such as [0,1,2], nor"),
        ("seeds=-1", "seeds: -1 is not a list"),
        ("seeds=[-1]", "seeds: -1 is not an integer from 0 to 9223372036854775807"),
        ("seeds=[9223372036854775808]", "seeds: 9223372036854775808 is not an integer from 0"),
        ("workers=1000000", "workers: 1000000 is not an integer from 1 to 10000"),
        ("engine.jobs=1000000000", "engine.jobs: 1000000000 is not an integer from 1 to 10000"),
        ("seeds=[x]", "seeds: [x] is not"),
        ("seeds=[1,1]", "seeds: [1,1] has a seed twice"),
        ("workers=0", "workers: 0 is not an integer from 1 to 10000"),
        ("workers=two", "workers: two is not an integer from 1 to 10000"),
        ("jobs=0", "workers: 0 is not an integer from 1 to 10000"),  # its former name
        ("publish=maybe", "publish: 'maybe' is not a boolean, allowed are true and false"),
        ("nam=rar", "nam: no such option or setting, allowed are name, "),
        ("methd=rtn", "; did you mean method?"),
        ("engine=cloud", "engine: 'cloud' is not one of"),
        ("engine.jobs=0", "engine.jobs: 0 is not"),
        ("quant.weights.bits=1", "bits: 1 is not"),
        ("eval=nope", "eval: 'nope' is not one of"),
        ("row=nope", "row: 'nope' is not one of FP32"),
        ("reference=x.npz", "reference: x.npz changes nothing at scale=twin, it is of scale=paper"),
        ("extractor=fashion", "extractor: fashion changes nothing at scale=twin"),
    ],
)
def test_a_bad_argument_is_refused_in_one_line_before_anything_runs(
    argument: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["table", argument])
    with pytest.raises(SystemExit) as stopped:
        table.main()
    assert str(stopped.value).startswith("error: ")
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_a_table_of_the_twins_alone_is_refused_at_the_papers_scale() -> None:
    with pytest.raises(
        ConfigError, match="scale: reproduce is not made at 'paper', allowed is twin"
    ):
        request_of("scale=paper")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "reference: missing"),
        (["reference=nowhere.npz"], "reference: nowhere.npz is no file"),
        (
            [f"reference={__file__}", "inception=/dev/null"],
            "^inception: /dev/null is missing; get .* and give inception=PATH$",
        ),
        (
            [f"reference={__file__}", f"inception={__file__}"],
            "^inception: ",
        ),
    ],
)
def test_at_paper_scale_a_missing_reference_is_said_before_sampling(
    arguments: list[str], message: str
) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message):
        request_of("name=w4a8", "scale=paper", "model=rar_b", "row=PTQ4ARVG", *arguments)


@pytest.mark.parametrize(("text", "seeds"), [("[0]", (0,)), ("3", (0, 1, 2)), ("[4,7]", (4, 7))])
def test_seeds_are_a_list_or_how_many(text: str, seeds: tuple[int, ...]) -> None:
    assert parse_seeds(text) == seeds


def test_several_workers_are_local_unless_another_engine_is_named() -> None:
    def engine(*arguments: str) -> tuple[str, int]:
        found = request_of("row=RTN", *arguments).engine
        return found.name, found.jobs

    assert engine() == ("inproc", 1)
    assert engine("workers=3") == ("local", 3)
    assert engine("jobs=3") == ("local", 3)  # the former name
    assert engine("workers=1") == ("inproc", 1)
    assert engine("workers=3", "engine=slurm") == ("slurm", 3)
    assert engine("engine=local", "engine.jobs=4") == ("local", 4)


def test_all_names_every_table_of_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        request, "configure", lambda overrides: None
    )  # composed by test_registry.py
    every = request_of("name=all", "seeds=3")
    assert set(every.names) == set(tables.load_tables())
    assert len(every.cells["rar"]) == 3 * 2 * 15
    assert {c.seed for c in every.cells["methods"]} == {0, 1, 2}
    assert {c.seed for c in every.cells["perturbation"]} == {0}
    assert all("tracker.group=rar" in c.overrides for c in every.cells["rar"])


def test_a_failed_cell_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = tables.parse_entry(
        "t",
        {
            "title": "T",
            "cost": "",
            "expected": "",
            "models": {"twin": ["rar_twin"]},
            "grid": {"quant": ["w6a6"]},
            "rows": {
                "FP32": "method=fp",
                "A": "method=rtn model.weights=missing.safetensors",
                "B": "method=stwq",
            },
        },
    )
    monkeypatch.setattr(tables, "load_tables", lambda: {"t": entry})
    request = request_of("name=t", *TINY, "eval.n=8", "eval.sequences=4", f"runs={tmp_path}")
    found = run_request(request)["t"]
    assert ["error" in r for r in found] == [False, True, False]
    assert "missing.safetensors" in found[1]["error"]
    assert "Traceback" in found[1]["traceback"]
    folder = write_table(entry, found, request)
    assert "missing.safetensors" in (folder / "results.json").read_text()
    assert [r["table"]["row"] for r in json.loads((folder / "results.json").read_text())] == [
        "FP32",
        "A",
        "B",
    ]
    quality = (folder / "table.csv").read_text()
    assert "sampling_s" not in quality
    assert "cell_s" not in quality
    assert all(r["cost"]["cell_s"] > 0 for r in found if "error" not in r)


def test_published_results_replace_the_former_ones_and_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.experiments.store.test_results import made

    monkeypatch.setattr(results, "ROOT", tmp_path)
    place = {"name": "t", "row": "rtn", "point": {"model": "m"}}
    result = made() | {"table": place}
    publish_results([result], "t")
    publish_results([{**result, "seed": 2}], "t")
    assert [f.name for f in (tmp_path / "t").iterdir()] == ["m.jsonl"]
    found, ignored = committed_results("t")
    assert [r["seed"] for r in found] == [2]
    assert not ignored
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    with pytest.raises(ConfigError, match="^publish: 0 results of t would replace 1"):
        publish_results([], "t")


def test_a_publication_that_was_killed_between_its_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.experiments.store.test_results import made

    monkeypatch.setattr(results, "ROOT", tmp_path)
    result = made() | {"table": {"name": "t", "row": "rtn", "point": {"model": "m"}}}
    publish_results([result], "t")
    (tmp_path / "t").rename(tmp_path / ".t.old1234")
    with pytest.raises(ConfigError, match="^publish: 0 results of t would replace 1"):
        publish_results([], "t")
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_part_of_a_table_leaves_the_files_of_the_whole_alone() -> None:
    def folder(*arguments: str) -> str:
        request = request_of("name=components", *arguments)
        return folder_name(tables.find_table("components"), request)

    assert folder() == folder("eval.n=8") == "components"
    assert folder("row=+GPS+STWQ", "model=rar_twin") == "components-row=+GPS+STWQ-model=rar_twin"
    assert "/" not in folder("row=SmoothQuant")


def test_a_pick_that_the_table_leaves_out_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["table", "name=par", "row=SQ+STWQ", "quant=w8a8", f"runs={tmp_path}"]
    )
    table.main()
    assert "par: no cell has all the values" in capsys.readouterr().out
    assert not (tmp_path / "tables" / "par").exists()


def test_a_published_part_takes_the_place_of_the_same_cells_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.experiments.store.test_results import made

    def result(row: str, seed: int, nll: float) -> dict[str, object]:
        place = {"name": "t", "scale": "twin", "row": row, "point": {"model": "m", "quant": "w6a6"}}
        cell = {"model": "m", "method": row, "quant": "w6a6"}
        return {**made(), "cell": cell, "seed": seed, "table": place, "metrics": {"nll": nll}}

    monkeypatch.setattr(results, "ROOT", tmp_path)
    publish_results([result("rtn", 0, 1.0), result("rtn", 1, 1.0), result("gps", 0, 1.0)], "t")
    publish_results([result("rtn", 1, 2.0), result("staq", 0, 2.0)], "t", part=True)
    found, ignored = committed_results("t")
    figures = {(r["table"]["row"], r["seed"]): r["metrics"]["nll"] for r in found}
    assert figures == {("rtn", 0): 1.0, ("rtn", 1): 2.0, ("gps", 0): 1.0, ("staq", 0): 2.0}
    assert not ignored


def test_a_trial_does_not_replace_committed_results_of_more_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.experiments.store.test_results import made

    def result(images: int) -> dict[str, object]:
        place = {"name": "t", "scale": "twin", "row": "rtn", "point": {"model": "m"}}
        of_images = {**made()["provenance"], "images": images}
        return {**made(), "table": place, "provenance": of_images}

    monkeypatch.setattr(results, "ROOT", tmp_path)
    publish_results([result(10_000)], "t")
    refused = (
        "^publish: a result of 4 images would replace one of 10000 in t, allowed are no fewer$"
    )
    with pytest.raises(ConfigError, match=refused):
        publish_results([result(4)], "t")
    assert committed_results("t")[0][0]["provenance"]["images"] == 10_000
    publish_results([result(10_001)], "t")


def test_a_queue_that_is_being_made_is_not_taken_for_a_stale_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = job_queue.JobQueue.create

    def slow(folder: Path, todo: list) -> object:
        monkeypatch.setattr(job_queue.JobQueue, "create", original)
        with job_queue.temporary_queue(tmp_path, []):  # another command, which removes stale queues
            assert folder.is_dir()
        return original(folder, todo)

    monkeypatch.setattr(job_queue.JobQueue, "create", slow)
    with job_queue.temporary_queue(tmp_path, []) as made:
        assert (made.folder / "jobs.json").is_file()


def test_queues_of_killed_commands_are_removed_and_those_in_use_are_not(tmp_path: Path) -> None:
    root = tmp_path / "tables"
    (root / ".board-1-1").mkdir(parents=True)
    with (
        job_queue.temporary_queue(tmp_path, []) as first,
        job_queue.temporary_queue(tmp_path, []) as second,
    ):
        assert not (root / ".board-1-1").exists()
        assert first.folder.is_dir()
        assert second.folder.is_dir()
    assert [path.name for path in root.iterdir()] == [".lock"]
