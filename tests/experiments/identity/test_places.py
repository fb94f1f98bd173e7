"""Runs of other defaults, devices or quantized models that ask for one folder are not mixed."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.config.schema import RunConfig
from experiments.identity import parts, places, resolved
from experiments.identity.migrate import Options
from experiments.identity.places import (
    MIGRATION,
    choose_place,
    read_identity,
    require_same_model,
    write_identity,
)
from experiments.identity.results import state_identity, stored_result
from experiments.identity.whole import identity_digest, whole_identity
from experiments.options import parse_options
from experiments.run import cell
from experiments.run.preparation import Run, prepare_run
from experiments.sample.sampling import require_same_run
from experiments.store import results
from ptq.types import ConfigError
from tests.experiments.cells import tiny


def change_default(monkeypatch: pytest.MonkeyPatch, group: str, name: str, value: Any) -> None:
    """Change a default of a method's settings, as an edit of the code would."""
    changed = copy.deepcopy(resolved.default_settings())
    changed["method"]["options"][group][name] = value
    monkeypatch.setattr(resolved, "default_settings", lambda: changed)


def finish(run: Run) -> dict[str, Any]:
    """Write the result of a run that never happened."""
    result = {
        "cell": {"model": "rar_twin"},
        "seed": 0,
        "metrics": {"kl": 0.5},
        "cost": {},
        "provenance": {
            "hash": run.hash,
            "identity": run.departures,
            **state_identity(run.whole),
        },
    }
    cell.begin_run(run)
    results.write_result(run.folder / results.RESULT, result)
    return result


def kill(run: Run) -> None:
    """Leave what a run leaves that was killed after its first images."""
    cell.begin_run(run)
    write_identity(run.folder, run.whole, "0123456789abcdef")
    (run.folder / "shards").mkdir()
    (run.folder / "shards" / "00000.npz").write_bytes(b"images")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    places.announce_place.cache_clear()
    return tiny(tmp_path, "method=os_plus")


def test_a_finished_run_of_another_default_is_not_returned_nor_lost(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    former = prepare_run(config)
    result = finish(former)
    assert stored_result(former.folder, former.whole) == result
    change_default(monkeypatch, "os_plus", "rows", 32)
    run = prepare_run(config)
    assert run.hash == former.hash
    assert run.folder != former.folder
    assert run.folder.name.endswith(f".{identity_digest(run.whole)[:8]}-{run.hash}")
    assert stored_result(run.folder, run.whole) is None
    said = capsys.readouterr().err
    assert "method.options.os_plus.rows is 16 there, 32 here" in said
    assert len(said.splitlines()) == 1
    # both are there from now on
    renewed = finish(run)
    assert stored_result(prepare_run(config).folder, run.whole) == renewed
    assert stored_result(former.folder, former.whole) == result


def test_a_killed_run_is_not_continued_under_another_default(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = prepare_run(config)
    kill(former)
    assert prepare_run(config).folder == former.folder
    change_default(monkeypatch, "os_plus", "rows", 32)
    run = prepare_run(config)
    assert run.folder != former.folder
    cell.begin_run(run)
    assert not (run.folder / "shards").exists()
    assert (former.folder / "shards" / "00000.npz").read_bytes() == b"images"


def test_a_run_of_another_class_of_devices_is_another_run(config: RunConfig) -> None:
    run = prepare_run(config)
    folder = run.folder
    result = finish(run)
    on_gpu = whole_identity(run.departures, "cuda")
    assert choose_place(folder, on_gpu) != folder
    assert stored_result(folder, on_gpu) is None
    assert stored_result(folder, run.whole) == result


def test_a_folder_that_another_run_took_meanwhile_is_refused(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare_run(config)
    folder = run.folder  # chosen while it was free
    with monkeypatch.context() as patch:
        change_default(patch, "os_plus", "rows", 32)
        other = prepare_run(config)
        finish(other)
    assert other.folder == folder
    with pytest.raises(ConfigError, match="is now of another run .*rows is 32 there, 16 here"):
        cell.begin_run(run)


def test_images_are_continued_by_the_quantized_model_that_made_them_alone(
    config: RunConfig,
) -> None:
    run = prepare_run(config)
    require_same_model(run.folder, "anything")  # no images yet
    kill(run)
    cell.begin_run(run)  # what began it knows no model yet, and forgets none
    require_same_model(run.folder, "0123456789abcdef")
    with pytest.raises(ConfigError) as caught:
        require_same_model(run.folder, "fedcba9876543210")
    assert "0123456789abcdef, this one is fedcba9876543210" in str(caught.value)
    assert "\n" not in str(caught.value)
    (run.folder / places.IDENTITY).write_text("{")
    with pytest.raises(ConfigError, match="quantized model unknown, this one is"):
        require_same_model(run.folder, "0123456789abcdef")


def folders_of_advice(line: str) -> list[str]:
    """The folders that the migration would look in which a refusal names."""
    command = line.split("`")[1]
    assert command.startswith(f"{MIGRATION} ")
    options, others = parse_options(Options, command.removeprefix(MIGRATION).split())
    assert not others
    return options.folders


@pytest.mark.parametrize("left", ["shards", "trained.safetensors", "trials.json", "result"])
def test_what_does_not_say_what_it_is_of_is_refused_and_stays(config: RunConfig, left: str) -> None:
    run = prepare_run(config)
    folder = run.folder
    if left == "result":
        finish(run)
        path = folder / results.RESULT
        older = json.loads(path.read_text())
        del older["provenance"]["identity_digest"], older["digest"]
        path.write_text(json.dumps(older))
        (folder / places.IDENTITY).unlink()
    else:
        (folder / left).mkdir(parents=True)
    with pytest.raises(ConfigError, match="does not state the whole identity") as caught:
        prepare_run(config).folder  # noqa: B018
    assert folders_of_advice(str(caught.value)) == [str(folder.parent)]
    assert folder.exists()


def test_a_damaged_identity_beside_a_result_is_no_obstacle(config: RunConfig) -> None:
    run = prepare_run(config)
    result = finish(run)
    (run.folder / places.IDENTITY).write_text("{}")
    assert read_identity(run.folder) is None
    again = prepare_run(config)
    assert again.folder == run.folder
    assert stored_result(again.folder, again.whole) == result


def manifest(run: Run, device: str) -> dict[str, Any]:
    whole = whole_identity(run.departures, device)
    return {"run": run.hash, "identity": run.departures, "whole": whole, **state_identity(whole)}


def test_samples_are_continued_under_the_same_identity_alone(
    config: RunConfig, tmp_path: Path
) -> None:
    run = prepare_run(config)
    ours = manifest(run, "cpu")
    require_same_run(tmp_path, ours, ours)
    with pytest.raises(ConfigError, match="samples of another run .device is cuda there, cpu here"):
        require_same_run(tmp_path, manifest(run, "cuda"), ours)
    older = {key: value for key, value in ours.items() if key != "identity_digest"}
    with pytest.raises(ConfigError) as caught:
        require_same_run(tmp_path, older, ours)
    assert folders_of_advice(str(caught.value)) == [str(tmp_path)]


def test_a_raised_version_makes_a_run_anew_and_one_line_says_which(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    former = prepare_run(config)
    finish(former)
    cell.begin_run(prepare_run(config))  # nothing is raised yet
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(parts.RAISED_VERSIONS, "method.os_plus", 9)
    for _ in range(2):
        cell.begin_run(prepare_run(config))
    line = f"made anew: {former.folder}: versions.method.os_plus is 2 there, 9 here\n"
    assert capsys.readouterr().err == line
    # another seed's run is none of them
    cell.begin_run(prepare_run(replace(config, seed=1)))
    assert capsys.readouterr().err == ""
