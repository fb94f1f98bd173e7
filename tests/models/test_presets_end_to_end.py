"""The way of a user with the official files, at full size: made-up weights under the official names, in the official
wrappers, are checked, loaded, converted and loaded again. The smallest preset of each family; gigabytes on disk."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import models
from models import __main__ as cli
from models import cache, checkpoints, registry
from tests.reference import fill

ARGS = argparse.Namespace(lr=1e-4, epochs=800, output_dir="out", distributed=True)
OPTIMIZER = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"params": [0]}]}


@pytest.fixture
def folder(tmp_path: Path, cache_folder: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


def wrapped(family: str, part: str, state: dict[str, Tensor]) -> object:
    """What the authors' training scripts saved around the weights."""
    if family == "par":
        return {"model": state, "optimizer": OPTIMIZER, "steps": 450_000, "args": ARGS}
    if family == "mar" and part == "transformer":
        unaveraged = {k: torch.zeros(1).expand(v.shape) for k, v in state.items()}
        return {
            "model": unaveraged, "model_ema": state, "optimizer": OPTIMIZER, "epoch": 799, "scaler": {"scale": 65536.0},
            "args": ARGS,
        }
    if family == "mar":
        return {"model": {**state, "loss.logvar": torch.zeros(())}}
    return state


@pytest.mark.slow
@pytest.mark.parametrize("name", ["var_d16", "rar_b", "par_xl_4x", "mar_b"])
def test_official_files_load_by_name(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made = models.build(name)
    paths, digests = {}, {}
    for part in registry.PARTS:
        module = fill(getattr(made, part), salt=name)
        paths[part] = folder / Path(registry.source_of(name, part).file).name
        torch.save(wrapped(made.preset.family, part, module.state_dict()), paths[part])
        digests[part] = checkpoints.digest(module)
    del made, module
    files = ["--weights", str(paths["transformer"]), "--tokenizer", str(paths["tokenizer"])]
    assert cli.main(["check", name, *files]) == 0
    assert capsys.readouterr().out.count("keys and shapes agree") == 2
    for _ in range(2):  # the second time from the conversions
        loaded = models.load(name, paths["transformer"], paths["tokenizer"])
        assert {part: checkpoints.digest(getattr(loaded, part)) for part in registry.PARTS} == digests
        del loaded
        monkeypatch.setattr(cache, "read", lambda path: pytest.fail("read the official file again"))
