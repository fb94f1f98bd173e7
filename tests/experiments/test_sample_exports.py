"""`experiments.sample` for who looks at images: labels by hand, exports, one picture of all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models
import ptq
from experiments.plotting.grids import save_grid
from experiments.sample import __main__ as command
from experiments.sample.options import parse
from models import registry
from ptq.files import read_json
from tests.families import calibration

LABELS = (3, 7)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the RAR twin."""
    model = models.load("rar_twin")
    rows = calibration("rar", model.adapter, 2)
    ptq.quantize(model, "rtn", "w8a8", calibration=rows)
    return ptq.save(model, tmp_path_factory.mktemp("export"))


def sample(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    """`python -m experiments.sample ARGUMENTS` in a folder outside the checkout."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["sample", "device=cpu", "out=images", *arguments])
    command.main()


def test_images_of_an_export_are_those_that_python_gives(
    export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parts: list[str] = []
    original = registry.state_of

    def record(source: object, explicit: object, part: str) -> object:
        parts.append(part)
        return original(source, explicit, part)

    monkeypatch.setattr(registry, "state_of", record)
    sample(monkeypatch, tmp_path, f"quantized={export}", "labels=3,7", "n=3", "format=png")
    assert parts == ["tokenizer"]  # no full-precision checkpoint
    model = ptq.load(export, models.outline("rar_twin", tokenizer=True))
    expected = model.generate(labels=[3, 7, 3], seed=0)
    for number, picture in enumerate(expected):
        with Image.open(tmp_path / "images" / "png" / f"{number:06d}.png") as written:
            assert np.array_equal(written, picture)
    with Image.open(tmp_path / "images" / "grid.png") as grid:
        assert grid.size == (64, 64)
        assert np.array_equal(np.asarray(grid)[:32, 32:], expected[1])
        assert (np.asarray(grid)[32:, 32:] == 255).all()

    manifest = read_json(tmp_path / "images" / "manifest.json")
    assert manifest["labels"] == [3, 7]
    assert manifest["microbatch"] == 3  # not 128, of which 125 would be thrown away
    names = {key: manifest["cell"][key] for key in ("model", "method", "quant", "mode", "eval")}
    assert names == {
        "model": "rar_twin",
        "method": "rtn",
        "quant": "w8a8",
        "mode": "int8",
        "eval": None,
    }
    captured = capsys.readouterr()
    assert captured.out == "3 images: images/png\ntogether: images/grid.png\n"
    assert captured.err.startswith("sampling: 3 of 3 images, ")


def test_without_a_method_the_model_is_in_full_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parse(["model=rar_b"])[1] == ["method=fp", "model=rar_b"]
    for given in ("method=rtn", "method.gps=false", "+method.alpha=0.4"):
        assert parse([given])[1] == [given]
    assert parse(["quantized=folder"])[1] == []
    sample(monkeypatch, tmp_path, "model=rar_twin", "labels=7", "n=2")
    expected = models.load("rar_twin").generate(labels=[7, 7], output="tensor")
    stored = np.load(tmp_path / "images" / "samples.npz")["arr_0"]  # (2, 32, 32, 3)
    pixels = (expected * 255).round().byte().permute(0, 2, 3, 1)
    assert torch.equal(torch.from_numpy(stored), pixels)


REFUSED = {
    "labels: 10 is not a class from 0 to 9 of rar_twin": ["labels=3,10"],
    "labels, n_per_class: both are given": ["labels=3", "n_per_class=2"],
    "method: the export in ": ["quantized=EXPORT", "method=rtn"],
    "quant.weights.bits: the export in ": ["quantized=EXPORT", "quant.weights.bits=4"],
    "model.weights: the export in ": ["quantized=EXPORT", "model.weights=other.pth"],
    "model: 'var_twin' is not rar_twin, which ": ["quantized=EXPORT", "model=var_twin"],
    "export: none cannot be read": ["quantized=none"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_wrong_is_said_in_one_line(
    message: str, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [text.replace("EXPORT", str(export)) for text in REFUSED[message]]
    with pytest.raises(SystemExit) as caught:
        sample(monkeypatch, tmp_path, "n=4" if "n_per" not in message else "seed=0", *arguments)
    assert str(caught.value).startswith(f"error: {message}")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_export_of_an_unknown_model_is_refused(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptq.int8.exports.export_files import read_export, save_export

    found = read_export(export / "config.json")
    about = json.loads(json.dumps(found.plain["about"])) | {"model": "dit_xl"}
    save_export(found, tmp_path / "export" / "config.json", about)
    with pytest.raises(SystemExit, match=r"^error: quantized: .* is of dit_xl, no model of"):
        sample(monkeypatch, tmp_path, f"quantized={tmp_path / 'export'}", "n=4")


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (5, 3, 2), (64, 8, 8)])
def test_a_picture_of_all_is_nearly_a_square(
    count: int, columns: int, rows: int, tmp_path: Path
) -> None:
    save_grid(np.zeros((count, 3, 4, 4), np.uint8), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (4 * columns, 4 * rows)
