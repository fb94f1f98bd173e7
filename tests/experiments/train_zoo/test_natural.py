"""The natural models end to end at toy size: trained in pieces, measured, quantized, shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import models
from experiments.evaluate import likelihood
from models import registry
from models.registry import PRESETS
from models.weights.checkpoints import CheckpointError
from tests.experiments.train_zoo.naturals import FAMILIES, natural_zoo


def parameters_of(name: str) -> int:
    return sum(
        parameter.numel() for parameter in registry.build_outline(name).transformer.parameters()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_natural_models_have_the_released_sequences_and_twenty_million_weights(family: str) -> None:
    preset = PRESETS[f"{family}_natural"]
    released = PRESETS[{"rar": "rar_b", "var": "var_d16"}[family]]
    assert 20e6 < parameters_of(preset.name) < 25e6
    assert (preset.image_size, preset.classes, preset.tokens) == (64, 200, released.tokens)
    for layout in ("image_seq_len", "patch_nums"):
        assert preset.transformer.get(layout) == released.transformer.get(layout)
    assert preset.dataset == "tiny_imagenet"
    with pytest.raises(CheckpointError, match=f"train_zoo model={family}_natural"):
        registry.locate_weights(preset.weights)


def test_training_in_pieces_fills_a_zoo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    train = natural_zoo(tmp_path, monkeypatch)
    zoo = registry.ZOO
    train("natural_reference")
    reference = json.loads((zoo / "records" / "natural_reference.json").read_text())["figures"]
    assert reference["images"] == 6
    for family in FAMILIES:
        name = f"{family}_natural"
        train(f"{name}_tokenizer")
        train(f"{name}_heldout")
        train(name)
        generator = models.load(name)
        held_out = likelihood.load_held_out(generator.preset, 4)
        assert held_out["tokens"].shape == (4, generator.preset.tokens)
        pinned = (zoo / "SHA256SUMS").read_text()
        for file in (f"{name}/transformer", f"{name}_tokenizer", f"{name}_heldout"):
            assert f"{file}.safetensors" in pinned
        record = json.loads((zoo / "records" / f"{name}.json").read_text())
        assert record["figures"]["parameters"] == sum(
            parameter.numel() for parameter in generator.transformer.parameters()
        )
        assert "planted" not in record["config"]
    assert not list(zoo.glob("*.checkpoint.pt"))
