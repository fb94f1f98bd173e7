"""A model is loaded once for a run, and not at all for one that is done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import models
from experiments.run import cell
from experiments.run.preparation import duplicate_generator
from models.weights.digests import module_digest
from tests.experiments.cells import tiny


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that are loaded from now on."""
    names: list[str] = []
    original = models.load

    def load(name: str, *args: object) -> object:
        names.append(name)
        return original(name, *args)

    monkeypatch.setattr(models, "load", load)
    return names


def test_one_load_serves_a_run_and_its_full_precision_one(
    tmp_path: Path, loaded: list[str]
) -> None:
    small = ("method=rtn", "calib=random", "eval.n=8", "eval.sequences=4")
    config = tiny(tmp_path, *small)
    result = cell.run_cell(config)
    assert loaded == ["rar_twin"]  # of both runs
    assert cell.run_cell(config) == result
    assert cell.run_cell(cell.full_precision_config(config))["metrics"]["kl"] is None
    assert loaded == ["rar_twin"]  # what is done is found by the digests of files
    cell.run_cell(tiny(tmp_path, *small, "mode=int8"))
    assert loaded == ["rar_twin"] * 2  # the int8 model is made of a copy


@pytest.mark.parametrize("name", ["rar_twin", "var_twin", "par_twin"])
def test_a_duplicate_is_the_same_model_with_weights_of_its_own(name: str) -> None:
    generator = models.load(name)
    before = module_digest(generator.transformer)
    twin = duplicate_generator(generator)
    assert module_digest(twin.transformer) == before
    assert twin.adapter.model is twin.transformer
    assert twin.tokenizer is generator.tokenizer
    with torch.no_grad():
        for parameter in twin.transformer.parameters():
            parameter.add_(1)
    assert module_digest(generator.transformer) == before
