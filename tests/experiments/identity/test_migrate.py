"""What was written before there were whole identities gets one, or is named with the reason."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from experiments.config.schema import RunConfig
from experiments.identity.migrate import FOLDERS, require_folders
from experiments.identity.older import migrate_folders
from experiments.identity.parts import RAISED_VERSIONS
from experiments.identity.places import read_identity, stated_digest
from experiments.identity.results import find_identity_fault, read_counting, stored_result
from experiments.identity.whole import identity_digest, whole_identity
from experiments.run.preparation import Run, prepare_run
from experiments.store import files, results
from experiments.store.results import RESULT_VERSION
from ptq.files import seal_fault, value_digest
from ptq.int8.exports.export_files import Export, read_export, save_export
from ptq.types import ConfigError
from tests.experiments.cells import tiny

GPU = {"device": "NVIDIA H200"}
CPU = {"device": "x86_64 CPU, 1 threads"}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny(tmp_path / "runs", "method=os_plus")


def older_result(run: Run, **origin: Any) -> dict[str, Any]:
    provenance = {
        "hash": run.hash,
        "identity": run.departures,
        "config": asdict(run.config),
        "revision": "0123456789ab",
        "versions": CPU,
        **origin,
    }
    return {
        "cell": {"model": "rar_twin", "method": "os_plus"},
        "seed": 0,
        "metrics": {"kl": 0.1 + 0.2},
        "cost": {},
        "provenance": provenance,
    }


def migrated(folder: Path) -> list[str]:
    return list(migrate_folders([str(folder)]))


def test_a_finished_run_is_found_and_counts_afterwards(config: RunConfig, tmp_path: Path) -> None:
    run = prepare_run(config)
    folder = run.folder
    result = older_result(run)
    files.write_sealed(folder / results.RESULT, result)
    assert migrated(tmp_path) == ["results: 1 given their whole identity"]
    found = stored_result(prepare_run(config).folder, run.whole)
    assert found is not None
    assert found["metrics"] == result["metrics"]
    assert found["provenance"]["device_class"] == "cpu"
    assert read_identity(folder)["identity"] == run.whole
    assert seal_fault(json.loads((folder / results.RESULT).read_text())) == ""
    before = (folder / results.RESULT).read_bytes()
    assert migrated(tmp_path) == ["nothing to do"]
    assert (folder / results.RESULT).read_bytes() == before


def test_a_result_grows_by_digest_and_device_alone(config: RunConfig, tmp_path: Path) -> None:
    run = prepare_run(config)
    result = older_result(run, versions=GPU, revision="0123456789ab+")
    path = tmp_path / f"a-{run.hash}" / results.RESULT
    files.write_sealed(path, result)
    size = path.stat().st_size
    assert migrated(tmp_path) == [
        "results: 1 given their whole identity",
        "not known of 1: the code: its tree had uncommitted changes",
    ]
    assert read_counting(path)["provenance"]["device_class"] == "cuda"
    assert 0 < path.stat().st_size - size < 100


def test_tables_samples_and_exports_state_theirs(config: RunConfig, tmp_path: Path) -> None:
    run = prepare_run(config)
    failed = {"error": "out of luck"}
    table = tmp_path / "tables" / "a" / "results.json"
    files.write_json(table, [older_result(run), failed])
    values = {key: value for key, value in run.departures.items() if key != "eval"}
    manifest = {
        "run": value_digest(values),
        "images": 4,
        "classes": 10,
        "microbatch": 2,
        "cell": {},
        "seed": 0,
        "identity": values,
        "provenance": {"config": asdict(config), "versions": [GPU, CPU]},
    }
    files.write_sealed(tmp_path / "samples" / "manifest.json", manifest)
    about = {"run": run.hash, "weights": run.weights, "config": asdict(config), "versions": GPU}
    plain = {"rest": "float32", "segments": [], "layers": {}, "products": {}, "modules": {}}
    path = tmp_path / "int8" / "rar_twin.json"
    save_export(Export(plain, {"a": torch.zeros(2)}), path, about)
    lines = migrated(tmp_path)
    given = {line.partition(" given")[0] for line in lines}
    assert {"tables: 1", "samples: 1", "exports: 1"} <= given
    entries = json.loads(table.read_text())
    assert find_identity_fault(entries[0]) == ""
    assert entries[1] == failed
    found = json.loads((tmp_path / "samples" / "manifest.json").read_text())
    assert found["identity_digest"] == identity_digest(whole_identity(values, "cpu"))
    stated = read_export(path).plain["about"]
    assert stated["identity_digest"] == identity_digest(whole_identity(run.departures, "cuda"))
    assert migrated(tmp_path) == ["nothing to do"]


def test_a_killed_run_is_kept_and_not_continued(config: RunConfig, tmp_path: Path) -> None:
    run = prepare_run(config)
    folder = run.folder
    files.write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    (folder / "shards").mkdir()
    lines = migrated(tmp_path)
    assert lines[0] == "killed runs: 1 given their whole identity"
    assert "begins anew beside it" in lines[1]
    assert stated_digest(folder) not in (None, identity_digest(run.whole))
    assert prepare_run(config).folder != folder


def of_another_default(origin: dict[str, Any]) -> None:
    origin["config"]["method"]["options"]["os_plus"]["rows"] = 99


def of_another_hash(origin: dict[str, Any]) -> None:
    origin["hash"] = "01234567"


def of_no_device(origin: dict[str, Any]) -> None:
    origin["versions"] = {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_another_default, "method.options.os_plus.rows is 99 there, 16 here"),
        (of_another_hash, "its hash is not that of its identity"),
        (of_no_device, "the device that it was made on is not known"),
    ],
)
def test_what_cannot_be_given_one_stays_and_is_named(
    config: RunConfig, tmp_path: Path, change: Any, said: str
) -> None:
    run = prepare_run(config)
    result = older_result(run)
    change(result["provenance"])
    path = tmp_path / "a-0" / results.RESULT
    files.write_sealed(path, result)
    before = path.read_bytes()
    assert migrated(tmp_path) == [f"left as it is: {path}: {said}"]
    assert path.read_bytes() == before


def test_results_of_a_part_that_changed_since_are_not_given_one(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare_run(config)
    files.write_sealed(tmp_path / "a-0" / results.RESULT, older_result(run))
    monkeypatch.setitem(RAISED_VERSIONS, "method.os_plus", RESULT_VERSION + 1)
    (line,) = migrated(tmp_path)
    assert line.endswith(f"is of version {RESULT_VERSION} of method.os_plus, this code's is 3")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    require_folders([*FOLDERS, str(tmp_path)])
    with pytest.raises(ConfigError, match=f"folders: {tmp_path}/absent is not a folder"):
        require_folders([f"{tmp_path}/absent"])


def test_a_damaged_result_is_not_made_whole(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "a-0" / results.RESULT
    files.write_sealed(path, older_result(prepare_run(config)))
    path.write_text(path.read_text().replace("0.30000000000000004", "0.2"))
    (line,) = migrated(tmp_path)
    assert line.startswith(f"left as it is: {path}: it is damaged")
