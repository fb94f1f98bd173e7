"""Local files are the record; W&B mirrors them, is read back here, and can fail without harm."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from experiments.registry.sweeps import sweep_path
from experiments.registry.tables import find_table
from experiments.run import cell
from experiments.store.tracking import Tracker, sync_command
from experiments.table.tables import run_request
from experiments.table.tracked import track_table
from ptq.types import ConfigError
from tests.experiments.cells import ROOT, TINY, tiny
from tests.experiments.table.requests import request_of

FIGURES = {"kl": 0.02, "nll": 3.2}
SMALL = ("eval.n=8", "eval.sequences=4")


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home folder in which nothing may appear."""
    home = tmp_path / "home"
    home.mkdir()
    for name, value in (("HOME", home), ("WANDB_CONFIG_DIR", tmp_path / "wandb_config")):
        monkeypatch.setenv(name, str(value))
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture(scope="module")
def full_precision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with the full-precision one that the others are compared with."""
    runs = tmp_path_factory.mktemp("full_precision")
    cell.run_cell(tiny(runs, "method=fp", *SMALL))
    return runs


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def mirrored(folder: Path, mode: str, steps: int) -> None:
    """A run that does everything a tracker can."""
    with Tracker(folder, mode) as tracker:
        for step in range(steps):
            tracker.log(FIGURES, step=step)
        tracker.summary(FIGURES)


def records(folder: Path) -> list[dict]:
    """All records of the one offline run below a folder."""
    (run,) = (folder / "wandb").glob("offline-run-*")
    return read_records(run)


def read_records(run: Path) -> list[dict]:
    """All records of an offline run, read once its log is complete."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(run)]
    for _ in range(50):
        found = [
            json.loads(x)
            for x in subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        ]
        if any(r["type"] == "exit" for r in found):
            break
        time.sleep(0.2)
    return found


def test_every_log_appends_a_line_and_a_second_start_keeps_the_first(tmp_path: Path) -> None:
    for start in range(2):
        with Tracker(tmp_path / "run") as tracker:
            tracker.log({"loss": 1.5 - start}, step=start)
            assert len(lines(tmp_path / "run")) == start + 1  # at once, not at the end
            tracker.summary(FIGURES)
            tracker.image("grid", tmp_path / "missing.png")
    assert [(x["step"], x["loss"]) for x in lines(tmp_path / "run")] == [(0, 1.5), (1, 0.5)]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def summary_of(found: list[dict]) -> dict[str, object]:
    """The summary that the records of a run add up to."""
    summary: dict[str, object] = {}
    for record in found:
        if record["type"] == "summary":
            summary |= record["summary"].get("update", {})
    return summary


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="tracker: 'offline' is not one of none, wandb_offline, wandb"
    ):
        Tracker(tmp_path, "offline")


def test_an_offline_run_reads_back_with_config_history_image_and_summary(
    tmp_path: Path, own_home: Path
) -> None:
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    folder.mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "grid.png")
    config = {"method": {"name": "ptq4arvg", "gps": True}, "seed": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with Tracker(
            folder, "wandb_offline", config, name="a run", group="rar_twin", tags=("rtn",)
        ) as tracker:
            for step in range(3):
                tracker.log({"kl": 0.1 / (step + 1)}, step=step)
            tracker.image("samples", folder / "grid.png")
            tracker.summary(FIGURES)
    found = json.dumps(records(folder))
    by_type = {r["type"] for r in records(folder)}
    assert {"run", "history", "summary", "exit"} <= by_type
    for said in ("a run", "rar_twin", "ptq4arvg", "samples"):
        assert said in found
    assert [x["step"] for x in lines(folder)] == [0, 1, 2]
    assert not [p for p in own_home.rglob("*") if p.is_file()]


def test_a_cell_reads_back_with_group_tags_pairs_and_errors_per_layer(
    tmp_path: Path, full_precision: Path
) -> None:
    pytest.importorskip("wandb")
    shutil.copytree(full_precision, tmp_path / "runs")
    request = request_of(
        "name=rar",
        "row=PTQ4ARVG",
        "model=rar_twin",
        "quant=w6a6",
        *TINY,
        *SMALL,
        "tracker=wandb_offline",
        "tracker.project=mine",
        "tracker.entity=a-team",
        f"runs={tmp_path / 'runs'}",
    )
    (result,) = run_request(request)["rar"]
    (folder,) = (tmp_path / "runs").glob("rar_twin-ptq4arvg-*")
    found = []
    for run in (tmp_path / "runs" / "wandb").glob("offline-run-*"):  # full precision's, too
        run_records = read_records(run)
        if folder.name in json.dumps(run_records):
            found = run_records
    (started,) = [r["run"] for r in found if r["type"] == "run"]
    assert started["run_group"] == "rar"
    assert (started["project"], started["entity"]) == ("mine", "a-team")
    assert set(started["tags"]) == {"rar_twin", "ptq4arvg", "w6a6"}
    said = json.dumps(found)
    kinds = ("table-file", "histogram", "images/separated")
    assert all(kind in said for kind in kinds)
    assert f'"kl": {result["metrics"]["kl"]}'[:12] in said
    summary = summary_of(found)
    assert (summary["paper/fid"], summary["paper/model"]) == (5.13, "RAR-B")
    assert not (folder / "wandb").exists()  # one folder for all runs
    media = tmp_path / "runs" / "wandb"
    assert len(list(media.rglob("media/images/full precision*"))) == 8
    (layers,) = media.rglob("media/table/layers*.table.json")
    kept = json.loads((folder / "layers.json").read_text())
    shown = json.loads(layers.read_text())
    assert shown["columns"] == ["site", "kind", "input_error"]
    assert [line[0] for line in shown["data"]] == [line["site"] for line in kept["layers"]]
    assert all(0 < line["input_error"] < 0.5 for line in kept["layers"])
    assert all(0 < line["output_error"] < 1 for line in kept["blocks"])
    assert all(sum(h["counts"]) > 0 for h in kept["histograms"].values())


def test_a_finished_table_is_a_run_of_its_group_with_figures_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    folder = tmp_path / "tables" / "rar"
    folder.mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "samples.png")
    (folder / "table.csv").write_text(
        "table,scale,model,row,quant,metric,paper_model,paper,mean,std,seeds,state\n"
        "rar,twin,rar_twin,RepQ*,w6a6,fid,RAR-B,82.31,0.5,0.1,3,measured\n"
        "rar,twin,rar_twin,RepQ*,w6a6,kl,,,0.07,,1,measured\n"
        "rar,twin,rar_twin,FP32,,fid,RAR-B,1.95,,,0,not run\n"
    )
    request = request_of("name=rar", "model=rar_twin", "tracker=wandb_offline", f"runs={tmp_path}")
    track_table(find_table("rar"), "rar", folder, request)
    found = records(tmp_path)
    (started,) = [r["run"] for r in found if r["type"] == "run"]
    assert (started["run_group"], started["job_type"]) == ("rar", "table")
    summary = summary_of(found)
    assert summary["rar_twin/w6a6/RepQ*/fid"] == 0.5
    assert summary["rar_twin/w6a6/RepQ*/fid/paper"] == 82.31
    assert summary["rar_twin/w6a6/RepQ*/kl"] == 0.07
    assert summary["rar_twin/FP32/fid/paper"] == 1.95
    assert "rar_twin/FP32/fid" not in summary
    kept = [r["artifact"] for r in found if r["type"] == "artifact"]
    (table,) = [artifact for artifact in kept if artifact["type"] == "table"]
    assert table["name"] == "table-rar"
    names = {entry["path"] for entry in table["manifest"]["contents"]}
    assert names == {"samples.png", "table.csv"}
    assert not (folder / "metrics.jsonl").exists()

    monkeypatch.setenv("WANDB_RUN_ID", "abc123")  # an agent's call is of one cell
    track_table(find_table("rar"), "rar", folder, request)
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.slow
def test_what_an_agent_of_a_sweep_starts_is_a_tracked_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's own agent, given a command as its server would give it."""
    agents = pytest.importorskip("wandb.wandb_agent")
    config = yaml.safe_load(sweep_path("reproduce").read_text())
    for name, value in (
        ("WANDB_MODE", "offline"),
        ("WANDB_SWEEP_ID", "sweep1"),
        ("WANDB_DIR", str(tmp_path)),
        ("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}"),
    ):
        monkeypatch.setenv(name, value)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # which the agent sets
        monkeypatch.setenv(name, "")
    monkeypatch.chdir(ROOT)
    agent = agents.Agent(None, None, "sweep1")
    size = ["eval=tiny", "device=cpu", f"runs={tmp_path / 'runs'}"]
    fixed = [word for word in config["command"] if word != "eval=full"]
    agent._sweep_command = [*fixed, *size]
    chosen = {"model": "rar_twin", "quant": "w6a6", "row": "RTN dynamic", "seeds": "[0]"}
    arguments = {name: {"value": value} for name, value in chosen.items()}
    order = {"id": 1, "type": "run", "run_id": "r1", "program": None, "args": arguments}
    answer = agent._process_command(order)
    assert "exception" not in answer
    assert agent._run_processes["r1"].wait(timeout=300) == 0
    found = records(tmp_path / "runs")  # of one run: full precision beside it is not tracked
    (started,) = [r["run"] for r in found if r["type"] == "run"]
    assert (started["run_id"], started["sweep_id"]) == ("r1", "sweep1")
    assert started["run_group"] == "reproduce"
    assert "rtn_dynamic" in started["tags"]


def test_of_an_agents_run_full_precision_beside_it_is_not_tracked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    cell.run_cell(tiny(tmp_path / "runs", "method=rtn", *SMALL, "tracker=wandb_offline"))
    assert '"rtn"' in json.dumps(records(tmp_path / "runs"))  # of one run alone


def test_one_command_uploads_what_is_offline(tmp_path: Path) -> None:
    assert sync_command(tmp_path) is None
    place = tmp_path / "my runs"
    for name in ("offline-run-1", "offline-run-2", "run-3"):
        (place / "wandb" / name).mkdir(parents=True)
    (place / "wandb" / "offline-run-1" / "run-1.wandb.synced").touch()
    assert sync_command(place) == f"wandb sync '{place}/wandb'/offline-run-*"
    (place / "wandb" / "offline-run-2" / "run-2.wandb.synced").touch()
    assert sync_command(place) is None


def test_tracking_changes_no_figure(tmp_path: Path, full_precision: Path) -> None:
    shutil.copytree(full_precision, tmp_path / "runs")
    own = ("method=ptq4arvg", *SMALL)
    plain = cell.run_cell(tiny(tmp_path / "runs", *own))
    (folder,) = tmp_path.glob("runs/rar_twin-ptq4arvg-*")
    shutil.rmtree(folder)
    tracked = cell.run_cell(tiny(tmp_path / "runs", *own, "tracker=wandb_offline"))
    assert (folder / "layers.json").is_file()
    assert plain["metrics"] == tracked["metrics"]
    assert plain["provenance"]["hash"] == tracked["provenance"]["hash"]


def test_a_missing_wandb_costs_one_warning_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes the import fail
    with pytest.warns(RuntimeWarning, match="Weights & Biases: could not start") as caught:
        mirrored(tmp_path, "wandb_offline", 1)
    assert len(caught) == 1
    assert {k: lines(tmp_path)[0][k] for k in FIGURES} == FIGURES


class Failing:
    """A W&B run whose calls fail."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, *args: object, **kwargs: object) -> None:
        self.calls += 1
        raise OSError("disk full\nand more")

    finish = log


def test_a_failing_wandb_is_dropped_after_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Failing()
    monkeypatch.setattr(Tracker, "_start", lambda self: run)
    with pytest.warns(RuntimeWarning, match=r"could not log \(OSError: disk full\)") as caught:
        mirrored(tmp_path, "wandb", 3)
    assert (len(caught), run.calls, len(lines(tmp_path))) == (1, 1, 3)


def test_an_error_of_the_run_itself_is_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), Tracker(tmp_path):
        raise KeyError("mine")


def test_an_unreachable_server_makes_the_run_offline_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    started = time.perf_counter()
    with pytest.warns(RuntimeWarning, match="cannot be reached; the run is kept offline") as caught:
        mirrored(tmp_path / "run", "wandb", 1)
    assert time.perf_counter() - started < 30
    assert len([w for w in caught if "Weights & Biases" in str(w.message)]) == 1
    assert any(r["type"] == "history" for r in records(tmp_path / "run"))


def test_wandb_mode_disabled_in_the_environment_switches_wandb_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    mirrored(tmp_path, "wandb_offline", 1)
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == ["metrics.jsonl"]


def test_the_environment_is_as_before_when_a_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_CACHE_DIR", "mine")
    before = dict(os.environ)
    tracker = Tracker(tmp_path, "wandb_offline")
    with pytest.warns(RuntimeWarning, match="could not start"):
        tracker.__enter__()
    assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / "wandb")
    assert os.environ["WANDB_CACHE_DIR"] == "mine"
    tracker.__exit__(None, None, None)
    assert dict(os.environ) == before


@pytest.mark.parametrize("letters", [1, 63, 64, 65, 200])
def test_long_tags_groups_and_names_are_shortened_and_stay_different(
    tmp_path: Path, letters: int
) -> None:
    tags = ("t" * letters, "t" * letters + "2", "", "model=rar_twin", "model=rar_twin")
    tracker = Tracker(tmp_path, name="n" * letters, group="g" * 2 * letters, tags=tags)
    kept = tracker._init["tags"]
    assert len(kept) == len(set(kept)) == 3
    assert all(1 <= len(tag) <= 64 for tag in kept)
    assert (kept[0] == tags[0]) == (letters <= 64)
    assert len(tracker._init["name"]) == min(letters, 128)
    assert len(tracker._init["group"]) == min(2 * letters, 128)


def test_figures_that_json_does_not_know_are_null_in_the_log(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.log({"loss": float("nan"), "scale": float("inf"), "kl": 0.5}, step=3)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=pytest.fail)
    assert (found["loss"], found["scale"], found["kl"]) == (None, None, 0.5)
