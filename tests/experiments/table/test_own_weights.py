"""The way of a user with released weights, on a twin in RAR-B's place: files of any name are added,
the paper's table is priced, begun, killed, continued, and rendered beside the paper's values."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import models
from experiments.identity.results import committed_results
from experiments.images import shards
from experiments.registry import tables
from experiments.render import html, readme, report
from experiments.sample import __main__ as sample_command
from experiments.speed import random_models
from experiments.store import results as stored
from experiments.table import __main__ as table_command
from experiments.table import paper_scale
from experiments.table.tables import announce_missing_weights
from models import __main__ as models_command
from models import registry
from models.weights.digests import module_digest
from ptq.files import read_json
from tests.experiments.cells import TINY, config_of
from tests.experiments.table.requests import request_of
from tests.official import save_official

ROWS = ("FP32", "RepQ*")
KILLED_AT = 3  # the second micro-batch of the quantized cell


@pytest.fixture
def twin_as_rar_b(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """RAR-B of the twin's size, and the paper's table of it with two rows."""
    released = models.PRESETS["rar_b"]
    small = replace(
        models.PRESETS["rar_twin"],
        name="rar_b",
        weights=released.weights,
        tokenizer_weights=released.tokenizer_weights,
        published_fid=released.published_fid,
    )
    monkeypatch.setitem(registry.PRESETS, "rar_b", small)
    registry.released_modules.cache_clear()
    table = tables.find_table("rar")
    rows = {label: table.rows[label] for label in ROWS}
    short = replace(table, rows=rows, grid={"quant": ["w6a6"]})
    monkeypatch.setitem(tables.load_tables(), "rar", short)
    yield
    registry.released_modules.cache_clear()


@pytest.fixture
def weights_folder(tmp_path: Path, twin_as_rar_b: None) -> Path:
    """The twin's weights as official files of other names."""
    folder = tmp_path / "weights"
    folder.mkdir()
    twin = models.load("rar_twin")
    for part in registry.PARTS:
        path = save_official("rar_b", part, getattr(twin, part), folder)
        path.rename(folder / f"{part}.pt")
    return folder


@pytest.fixture
def sampled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling in this process: a new one would know no twin by the name of RAR-B."""

    def run_here(command: list[str], *_: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", command[2:])
        sample_command.main()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(paper_scale, "run_child", run_here)


def killed_at(number: int) -> Callable[..., None]:
    """A `write_shard` that is stopped, as by Ctrl-C, when it is called for the nth time."""
    written = []

    def write_or_stop(*arguments: object) -> None:
        written.append(arguments)
        if len(written) > number:
            raise KeyboardInterrupt
        write_shard(*arguments)

    write_shard = shards.write_shard
    return write_or_stop


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "not here: weights of rar_b, rar_l, rar_xl, rar_xxl; "),
        (("model=rar_l,rar_b",), "not here: weights of rar_l, rar_b; "),
        (("model.weights=mine.pt",), ""),
    ],
)
def test_missing_weights_are_said_once_before_anything_runs(
    more: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("AR_PTQ_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    request = request_of("name=rar", "scale=paper", "extractor=fashion", f"runs={tmp_path}", *more)
    capsys.readouterr()
    announce_missing_weights(request)
    written = capsys.readouterr().err
    assert written.startswith(said)
    assert written.count("\n") == bool(said)


@pytest.mark.usefixtures("sampled_here")
def test_a_paper_table_from_added_files_killed_and_continued(
    weights_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("AR_PTQ_CACHE", str(tmp_path / "cache"))
    runs = tmp_path / "runs"

    def make_table(*more: str) -> str:
        options = ["name=rar", "model=rar_b", "scale=paper", "extractor=fashion"]
        monkeypatch.setattr(sys, "argv", ["table", *options, *TINY, f"runs={runs}", *more])
        table_command.main()
        return capsys.readouterr().out

    models_command.main(["add", str(weights_folder)])
    assert capsys.readouterr().out.count("added: ") == 2
    assert "in all: 2 cells, 0 done, 2 to do" in make_table("dry_run=true")
    assert not runs.exists()

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_shard", killed_at(KILLED_AT))
        with pytest.raises(SystemExit) as ended:
            make_table()
    assert ended.value.code == 130
    finished = {path: path.stat().st_mtime_ns for path in runs.glob("*/images/shards/*.npz")}
    assert len(finished) == KILLED_AT
    assert "in all: 2 cells, 1 done, 1 to do" in make_table("dry_run=true")

    # figures of 16 images mean nothing, and are shown here as those of 50,000 would be
    monkeypatch.setattr(stored, "LEAST_IMAGES", {})
    out = make_table()
    for path, time in finished.items():
        assert path.stat().st_mtime_ns == time
    (results_path,) = runs.glob("tables/*/results.json")
    measured = {result["table"]["row"]: result["metrics"] for result in read_json(results_path)}
    assert list(measured) == list(ROWS)
    assert "| W6A6 | RepQ* | 18.96 | 82.31 |" in out, "the paper's values"
    assert f"{measured['RepQ*']['fid']:.3f}" in out
    assert "| `rar_b` | 1.95 | not run | not run | refused: no full-precision row" in out
    assert (results_path.parent / "gate.md").read_text() in out
    again = make_table()
    assert "images/shards" not in again, "nothing is sampled"
    assert out.endswith(again)

    # a part of a table, this one model, is committed beside the rest, and rendered from there
    committed = tmp_path / "committed"
    monkeypatch.setattr(stored, "ROOT", committed)
    monkeypatch.setattr(readme, "SAMPLES", tmp_path / "pictures")
    assert f"published: {committed / 'rar-paper'}" in make_table("publish=true")
    found, ignored = committed_results("rar-paper")
    assert [result["table"]["row"] for result in found] == list(ROWS)
    assert not ignored
    assert str(tmp_path) not in (committed / "rar-paper" / "rar_b.jsonl").read_text()
    section = report.render_table(tables.find_table("rar"), "paper", tmp_path / "out", runs, "")
    written = tmp_path / "out" / "rar-paper"
    assert (written / "gate.md").read_text() == (results_path.parent / "gate.md").read_text()
    whole = (written / "table.md").read_text()
    assert f"{measured['RepQ*']['fid']:.3f}" in whole
    assert "| `rar_b` | W6A6 | RepQ* | 18.96 | 82.31 |" in whole, "the paper's values beside ours"
    assert "| `rar_l` | W6A6 | RepQ* |" in whole, "not run"
    assert "rar_b (full precision, published FID 1.95): refused: " in html.format_section(section)


def test_benchmarks_take_added_weights_and_random_ones_without(
    weights_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AR_PTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    config = config_of("model=rar_b")
    assert random_models.load_or_fill(config, torch.device("cpu"))[1]
    models_command.main(["add", str(weights_folder)])
    generator, made_up = random_models.load_or_fill(config, torch.device("cpu"))
    twin = models.load("rar_twin")
    assert not made_up
    assert module_digest(generator.transformer) == module_digest(twin.transformer)
