"""`experiments.doctor`: what it finds is there, what it misses is named with a remedy, and a
terminal of 80 columns shows it all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.doctor import __main__ as doctor
from experiments.doctor import machine, own_files
from experiments.doctor.abilities import judge_ability, list_abilities
from experiments.doctor.findings import MISSING, OK, PART, Finding, worst_state
from experiments.evaluate.extractors import inception
from models import registry, user_files
from models.weights import added


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights, logins or data sets of this machine."""
    from huggingface_hub import constants

    monkeypatch.setenv("AR_PTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AR_PTQ_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *options: str) -> str:
    monkeypatch.setattr(sys, "argv", ["doctor", *options])
    doctor.main()
    return capsys.readouterr().out


def test_all_is_shown_in_80_columns_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = set(tmp_path.rglob("*"))
    out = show(monkeypatch, capsys, f"runs={tmp_path}/new/runs")
    assert set(tmp_path.rglob("*")) == before
    assert max(map(len, out.replace(str(tmp_path), "/tmp/x").splitlines())) <= 80
    here, works = out.split("\n\n")
    for name in ("Python", "packages", "GPU", "Triton", "torchrun", "W&B login", "Slurm"):
        assert f" {name} " in here
    assert "ok       models/zoo" in here
    assert "yes      tables of the twins    experiments.table name=reproduce" in works
    assert "no       paper's table of rar" in works
    assert "weights of rar, Inception, reference" in works


def test_weights_count_once_they_are_added(tmp_path: Path) -> None:
    assert own_files.check_weights("mar").state == MISSING
    stand_ins = {}
    for source in user_files.released_sources("mar_b"):
        path = tmp_path / source.file
        path.write_bytes(b"weights")
        stand_ins[source] = added.AddedFile(path, "0" * 64)
    added.add_entries(stand_ins)
    finding = own_files.check_weights("mar")
    assert finding.state == PART
    assert finding.text.startswith("mar_b; not here: mar_l, mar_h; python -m models add FOLDER")
    added.entries_file().write_text("{")
    finding = own_files.check_weights("mar")
    assert (finding.state, "is damaged" in finding.text) == (MISSING, True)


def test_every_released_model_of_a_table_is_looked_for() -> None:
    assert own_files.paper_models()["rar"] == ["rar_b", "rar_l", "rar_xl", "rar_xxl"]
    assert list(own_files.paper_models()) == [*registry.PAPER_FAMILIES]


def test_a_reference_is_told_by_its_arrays(tmp_path: Path) -> None:
    assert own_files.check_reference(None).state == MISSING
    path = tmp_path / "batch.npz"
    np.savez(path, mu=0, sigma=0, arr_0=0)
    finding = own_files.check_reference(str(path))
    assert (finding.state, finding.text) == (PART, f"{path} holds no mu_s, sigma_s")
    np.savez(path, mu=0, sigma=0, mu_s=0, sigma_s=0, arr_0=0)
    assert own_files.check_reference(str(path)).state == OK
    path.write_bytes(b"<html>")
    finding = own_files.check_reference(str(path))
    assert (finding.state, "HTML page" in finding.text) == (MISSING, True)
    assert own_files.check_reference(str(tmp_path / "none.npz")).state == MISSING


def test_validation_images_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_files.check_held_out(None).state == MISSING
    monkeypatch.setattr(own_files, "IMAGENET_CLASSES", 1)
    assert "0 sub-folders" in own_files.check_held_out(str(tmp_path)).text
    (tmp_path / "n01440764").mkdir()
    assert own_files.check_held_out(str(tmp_path)).state == MISSING
    (tmp_path / "n01440764" / "a.JPEG").write_bytes(b"not looked at")
    finding = own_files.check_held_out(str(tmp_path))
    assert (finding.state, finding.text) == (OK, f"1 in {tmp_path}")
    assert own_files.check_held_out(str(tmp_path / "nowhere")).state == MISSING


def test_inception_is_named_where_it_is_missing(tmp_path: Path) -> None:
    assert inception.FILE in own_files.check_inception(None).text
    path = tmp_path / "weights.pth"
    path.write_bytes(b"no weights")
    assert own_files.check_inception(str(path)).text.startswith(f"{path} does not load as")


def test_a_login_is_seen_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_tracker_login().state == MISSING
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password made-up\n")
    finding = machine.check_tracker_login()
    assert (finding.state, "made-up" in finding.text) == (OK, False)
    (tmp_path / "netrc").write_text("no netrc")
    assert machine.check_tracker_login().state == MISSING
    monkeypatch.setenv("WANDB_API_KEY", "made-up")
    assert machine.check_tracker_login().state == OK


def test_packages_of_other_versions_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tmp_path / "requirements.txt"
    monkeypatch.setattr(machine, "REQUIREMENTS", wanted)
    assert machine.check_packages().state == OK
    wanted.write_text("# heading\nnumpy==0.1\n")
    finding = machine.check_packages()
    assert (finding.state, "(not 0.1)" in finding.text) == (PART, True)
    monkeypatch.setattr(machine, "OPTIONAL", {"no-such-tracker"})
    wanted.write_text("no-such-tracker==1\n")
    assert machine.check_packages().state == PART, "nothing but tracking needs it"
    wanted.write_text("numpy==0.1\nno-such-package==1\n")
    finding = machine.check_packages()
    assert finding.state == MISSING
    assert finding.text == "not here: no-such-package; pip install -r requirements.txt"


@pytest.mark.parametrize(
    ("answer", "state", "text"),
    [
        ((0, "gpu* 2 idle\nlong 1 down\n", ""), OK, "gpu* 2 idle, long 1 down"),
        ((1, "", "slurm_load_partitions: Unable to contact\n"), MISSING, "Unable to contact"),
    ],
)
def test_slurm_is_asked(
    answer: tuple[int, str, str], state: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(
        machine.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], *answer)
    )
    finding = machine.check_slurm()
    assert (finding.state, text in finding.text) == (state, True)


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine.check_disk("disk", tmp_path / "a" / "b").state == OK
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)  # tests may run as root
    finding = machine.check_disk("disk", tmp_path / "a" / "b")
    assert (finding.state, finding.text) == (MISSING, f"{tmp_path} cannot be written")


def test_an_ability_is_as_good_as_the_worst_of_what_it_needs() -> None:
    names = {name for ability in list_abilities() for name in ability.needs}
    findings = {name: Finding(name, OK, "") for name in names}
    states = {judge_ability(ability, findings)[0] for ability in list_abilities()}
    assert states == {OK}
    findings["weights of rar"] = Finding("weights of rar", PART, "")
    ability = next(one for one in list_abilities() if one.title == "paper's table of rar")
    assert judge_ability(ability, findings) == (PART, ["weights of rar"])
    findings["GPU"] = Finding("GPU", MISSING, "")
    assert judge_ability(ability, findings) == (MISSING, ["weights of rar", "GPU"])
    assert worst_state([]) == OK


def test_a_folder_of_weights_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert own_files.check_weights_folder() == []
    monkeypatch.setenv("AR_PTQ_WEIGHTS", str(tmp_path))
    assert own_files.check_weights_folder()[0].state == OK
    monkeypatch.setenv("AR_PTQ_WEIGHTS", str(tmp_path / "gone"))
    finding = own_files.check_weights_folder()[0]
    assert finding.state == MISSING
    assert finding.text == f"{tmp_path}/gone is missing, expected a folder or a file"


@pytest.mark.parametrize(("free", "state"), [(int(machine.LEAST_FREE), OK), (0, PART)])
def test_a_disk_that_is_nearly_full_is_not_called_well(
    free: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = machine.shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
    assert machine.check_disk("disk of runs", tmp_path).state == state
