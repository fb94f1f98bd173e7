"""The cost of calibration: what is timed, how it is scaled, and the file that comes out."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import speed, stand_in
from experiments.table import configure
from models import registry
from ptq.modules import QuantLinear
from ptq.recipe import Recipe
from ptq.types import Adapter, CalibrationSet, Track
from tests.experiments.test_families import TOYS, toy

TINY = ("calib.n=4", "device=cpu")


def measured(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> dict:
    """The JSON that the command writes."""
    monkeypatch.setattr(sys, "argv", ["speed", "what=calibrate", *TINY, f"runs={folder}", *arguments])
    speed.main()
    (path,) = (folder / "speed").iterdir()
    return {"file": path.name, **json.loads(path.read_text())}


def test_the_report_of_a_shipped_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(monkeypatch, tmp_path, "model=rar_twin", "methods=[rtn,ptq4arvg]", "repeats=2")
    assert found["file"] == "calibrate-rar_twin-cpu.json"
    assert (found["weights"], found["quant"], found["rows"], found["blocks"]) == ("loaded", "w8a8", 4, 5)
    assert found["threads"] == torch.get_num_threads()
    assert [line["method"] for line in found["methods"]] == ["rtn", "ptq4arvg"]
    for line in found["methods"]:
        assert len(line["measurements"]) == 2
        assert 0 < line["selection_s"] < line["calibration_s"] < 60
        assert line["calibration_peak_mb"] > found["model_mb"] > 10
        assert line["blocks_trained"] is None
    shown = capsys.readouterr().out
    assert "PTQ4ARVG" in shown
    assert "written: " in shown


@pytest.mark.parametrize("name", TOYS)
def test_released_shapes_are_measured_on_random_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.PRESETS, name, toy(name))
    shallow = ("blocks=1", "method.options.omniquant.epochs=1")
    found = measured(monkeypatch, tmp_path, f"model={name}", "methods=[rtn,ptq4arvg,omniquant]", *shallow)
    assert found["weights"] == "random"
    assert [line["blocks_trained"] for line in found["methods"]] == [None, None, 1]
    assert not any("error" in line for line in found["methods"])


def test_the_time_of_some_blocks_is_scaled_to_all_and_the_rest_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: training a block takes 2 seconds, the start 1 and what comes after it 4."""
    now, asked = [0.0], []
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def quantize(adapter: Adapter, chosen: CalibrationSet, recipe: Recipe, batch: int, track: Track) -> None:
        asked.append(len(adapter.blocks))
        assert adapter.last_block == adapter.blocks[-1]
        for seconds, what in ((1, "omniquant"), *((2, f"omniquant, {block}") for block in adapter.blocks)):
            for _ in track([1], what):
                now[0] += seconds
        now[0] += 4

    monkeypatch.setattr(speed, "quantize", quantize)
    config = configure(["model=rar_twin", "method=omniquant", *TINY, "calib=random"])
    device = torch.device("cpu")
    generator, _ = stand_in.load(config, device)
    images = stand_in.pool(generator, 4, device)
    for trained in (2, 1, None):
        cost = speed.measure(copy.deepcopy(generator.adapter), images, config, device, trained)
        assert cost.calibration_s == 1 + 5 * 2 + 4
    assert asked == [2, 1, 5]


@torch.no_grad()
def test_training_of_some_blocks_leaves_a_quantized_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(["model=rar_twin", "method=omniquant_paper", *TINY, "method.options.omniquant.epochs=1"])
    device = torch.device("cpu")
    generator, made_up = stand_in.load(config, device)
    assert not made_up
    adapter = generator.adapter
    speed.measure(adapter, stand_in.pool(generator, 4, device), config, device, 2)
    linears = [m for m in adapter.model.modules() if isinstance(m, QuantLinear)]
    assert len(linears) == len([c for s in adapter.sites if s.kind != "embed" for c in s.consumers])
    assert all(linear.weight_params is not None for linear in linears)


def test_methods_a_family_refuses_are_said_where_all_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    options, overrides = speed.parse(["model=mar_twin"])
    configs = speed.configurations(options, overrides)
    assert list(configs) == speed.METHODS
    assert [name for name, config in configs.items() if isinstance(config, str)] == ["ptq4arvg_released"]
    assert "allowed is released" in configs["ptq4arvg_released"]
    assert {config.quant.name for config in configs.values() if not isinstance(config, str)} == {"w8a8"}


def test_a_method_that_fails_is_reported_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = toy("var_d16")
    monkeypatch.setitem(
        registry.PRESETS, "var_d16", replace(shared, transformer={**shared.transformer, "shared_aln": True})
    )
    with pytest.raises(SystemExit) as stopped:
        measured(monkeypatch, tmp_path, "model=var_d16", "methods=[ptq4arvg_released,rtn]")
    assert stopped.value.code == 1
    (path,) = (tmp_path / "speed").iterdir()
    failed, done = json.loads(path.read_text())["methods"]
    assert "needs a norm or AdaLN" in failed["error"]
    assert done["calibration_s"] > 0


@pytest.mark.parametrize(("argument", "message"), [
    ("what=nope", "what: 'nope' is not one of calibrate"), ("methods=[fp]", "methods: 'fp' is not one of rtn"),
    ("methods=rtn", "methods: rtn is not a list"), ("methods=[", "methods, blocks, repeats: "),
    ("blocks=0", "blocks: 0 is not a positive"), ("repeats=true", "repeats: true is not a positive"),
    ("repeats=null", "repeats: null is not a positive"), ("method=rtn", "allowed is methods=[rtn]"),
    ("blocks=9", "blocks: 9 is more than the 5 of rar_twin"), ("calib.n=5000", "calib.n: 5000 is more than"),
    ("quant=nope", "quant: 'nope' is not one of"),
])
def test_a_bad_argument_is_refused_in_one_line_and_nothing_is_written(
    argument: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = [] if argument.startswith("methods") else ["methods=[rtn]"]
    monkeypatch.setattr(sys, "argv", ["speed", "device=cpu", f"runs={tmp_path}", *methods, argument])
    with pytest.raises(SystemExit) as stopped:
        speed.main()
    assert str(stopped.value).startswith("error: ")
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not list(tmp_path.iterdir())
