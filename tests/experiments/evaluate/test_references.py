"""References as files: read as they were written, refused if they are of something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.evaluate import references
from experiments.evaluate.references import Reference
from experiments.evaluate.small_images import (
    image_metrics,
)
from experiments.store import files
from models import CheckpointError
from ptq.types import ConfigError
from tests.experiments.evaluate.evaluations import (
    made_up_features,
    save_classifier,
)


def test_reference_round_trip(tmp_path: Path) -> None:
    reference = Reference.from_features(made_up_features("real", 40), "0123")
    path = tmp_path / "new" / "reference.safetensors"
    reference.save(path)
    reference.save(path)  # over itself
    loaded = Reference.load(path, "0123")
    for name in ("mu", "sigma", "mu_s", "sigma_s", "pool"):
        assert torch.equal(getattr(loaded, name), getattr(reference, name))
    assert (loaded.n, loaded.extractor) == (40, "0123")
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    fake = made_up_features("fake", 30)
    assert image_metrics(fake, loaded.target()) == image_metrics(fake, reference.target())


def test_reference_keeps_images_from_the_whole_set(monkeypatch: pytest.MonkeyPatch) -> None:
    real = made_up_features("real", 50)
    monkeypatch.setattr(references, "MANIFOLD_IMAGES", 20)
    reference = Reference.from_features(real, "x")
    assert torch.equal(reference.pool, real.pool[(torch.arange(20) * 2.5).long()].half())
    assert reference.n == 50


def test_foreign_and_damaged_references_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        Reference.load(path, "0123")
    Reference.from_features(made_up_features("real", 40), "0123").save(path)
    with pytest.raises(ConfigError, match="was made with the extractor 0123, not with 4567") as run:
        Reference.load(path, "4567")
    assert "\n" not in str(run.value)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Reference.load(path, "0123")
    with pytest.raises(ConfigError, match="is not a file of reference statistics"):
        Reference.load(save_classifier(path), "0123")


def test_an_interrupted_save_leaves_the_old_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "reference.safetensors"
    Reference.from_features(made_up_features("real", 40), "old").save(path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        Reference.from_features(made_up_features("real", 40), "new").save(path)
    assert Reference.load(path, "old").n == 40
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
