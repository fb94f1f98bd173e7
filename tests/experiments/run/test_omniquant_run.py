"""A run whose method trains block by block: killed in between, it goes on with the next block and
ends the same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from experiments.run import calibration, cell
from experiments.run.calibration import TRAINED
from ptq.omniquant import block_files
from tests.experiments.cells import tiny


class Killed(BaseException):
    """As abrupt as a signal: nothing catches it."""


def test_a_killed_training_continues_and_leaves_no_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (
        "method=omniquant_paper",
        "quant=w4a4",
        "calib=random",
        "method.options.omniquant.epochs=1",
    )
    config = tiny(tmp_path, *settings, "calib.n=4", "eval.n=8", "eval.sequences=4")
    blocks = []

    def track(items: Iterable, what: str) -> Iterable:
        if what.startswith("omniquant, "):
            blocks.append(what)
            if len(blocks) == 4:
                raise Killed
        return items

    folder = cell.prepare_run(config).folder
    with pytest.raises(Killed):
        cell.run_cell(config, track)
    assert (folder / TRAINED).is_file()
    assert not (folder / "metrics.json").exists()
    assert 0 < block_files.training_seconds(folder / TRAINED) < 600
    # as if the first part had taken so long
    monkeypatch.setattr(block_files, "training_seconds", lambda path: 1000.0)
    cost = cell.run_cell(config, track)["cost"]
    assert 1000 < cost["calibration_s"] < cost["cell_s"]
    assert cost["calibration_peak_mb"] is None
    assert blocks == [f"omniquant, blocks.{i}" for i in (0, 1, 2, 3, 3, 4)]
    assert not (folder / TRAINED).exists()
    # all blocks, without a file
    report = calibration.quantize_model(cell.prepare_run(config), lambda items, what: items).report
    stored = load_file(folder / "quantization.safetensors")
    assert stored.keys() == report.tensors.keys()
    assert all(bool((stored[name] == value).all()) for name, value in report.tensors.items())
