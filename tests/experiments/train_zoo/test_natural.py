"""The natural models end to end at toy size: trained in pieces, measured, quantized, shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

import models
from experiments import statistics
from experiments.config.compose import configure
from experiments.data import tiny_imagenet
from experiments.evaluate import likelihood, small_images
from experiments.evaluate.features import Features
from experiments.evaluate.judges import find_judge
from experiments.registry.tables import find_table, split_label, table_cells
from experiments.run.preparation import prepare_run
from experiments.table.__main__ import main
from experiments.train_zoo import trainers, twin_quality
from experiments.train_zoo.quality import refuse_own_groups
from experiments.train_zoo.quality_report import report_quality
from models import registry
from models.preset import Source
from models.registry import PRESETS
from models.weights import hub
from models.weights.checkpoints import CheckpointError, read_checkpoint
from ptq.spec import ConfigError
from tests.experiments.train_zoo.naturals import FAMILIES, chosen, natural_zoo

TINY = (
    *("eval.n=6", "eval.sequences=4", "eval.batch=4", "sampler.microbatch=6"),
    *("calib.n=4", "device=cpu"),
)


def parameters_of(name: str) -> int:
    return sum(
        parameter.numel() for parameter in registry.build_outline(name).transformer.parameters()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_natural_models_have_released_sequences_and_20_million_weights(family: str) -> None:
    preset = PRESETS[f"{family}_natural"]
    released = PRESETS[{"rar": "rar_b", "var": "var_d16"}[family]]
    assert 20e6 < parameters_of(preset.name) < 25e6
    assert (preset.image_size, preset.classes, preset.tokens) == (64, 200, released.tokens)
    for layout in ("image_seq_len", "patch_nums"):
        assert preset.transformer.get(layout) == released.transformer.get(layout)
    assert preset.dataset == "tiny_imagenet"
    with pytest.raises(CheckpointError, match=f"train_zoo model={family}_natural"):
        registry.locate_weights(preset.weights)
    with pytest.raises(CheckpointError, match=f"model={family}_natural_heldout makes it"):
        likelihood.load_held_out(preset, 2)


def test_a_published_copy_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    source = replace(PRESETS["rar_natural"].weights, mirror="owner/natural")
    monkeypatch.setattr(hub, "cached_file", lambda source: None)

    def fetch(source: Source) -> None:
        asked.append(source)
        raise CheckpointError("not reached")

    monkeypatch.setattr(hub, "fetch_file", fetch)
    with pytest.raises(CheckpointError, match="not reached"):
        registry.locate_weights(source)
    assert [(source.repo, source.file) for source in asked] == [
        ("owner/natural", "rar_natural/transformer.safetensors")
    ]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A zoo of toy natural models, trained by their recipes; what it took is undone at the end."""
    folder = tmp_path_factory.mktemp("natural")
    with pytest.MonkeyPatch.context() as patch:
        train = natural_zoo(folder, patch)
        train("natural_reference")
        for family in FAMILIES:
            for part in ("_tokenizer", "_heldout", ""):
                train(f"{family}_natural{part}")
        patch.setenv("AR_PTQ_TINY_IMAGENET", str(folder / "tiny-imagenet-200.zip"))
        patch.chdir(folder)
        yield registry.ZOO


def read_record(zoo: Path, name: str) -> dict[str, Any]:
    return json.loads((zoo / "records" / f"{name}.json").read_text())


def test_recipes_fill_a_zoo(zoo: Path) -> None:
    assert read_record(zoo, "natural_reference")["figures"]["images"] == 6
    pinned = (zoo / "SHA256SUMS").read_text()
    for family in FAMILIES:
        name = f"{family}_natural"
        generator = models.load(name)
        held_out = likelihood.load_held_out(generator.preset, 4)
        assert held_out["tokens"].shape == (4, generator.preset.tokens)
        for file in (f"{name}/transformer", f"{name}_tokenizer", f"{name}_heldout"):
            assert f"{file}.safetensors" in pinned
        record = read_record(zoo, name)
        weights = generator.transformer.parameters()
        assert record["figures"]["parameters"] == sum(weight.numel() for weight in weights)
        assert "planted" not in record["config"]
    assert not list(zoo.glob("*.checkpoint.pt"))


def test_a_training_pauses_and_goes_on(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = read_checkpoint(zoo / "rar_natural" / "transformer.safetensors")
    data = zoo.parent / "tiny-imagenet-200.zip"
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(trainers.time, "time", lambda: float(next(clock)))
    for done in (1, 2):
        trainers.train_model(chosen(zoo, data, "rar_natural", limit_s=1))
        assert f"paused after {done} of 3 steps" in capsys.readouterr().out
    trainers.train_model(chosen(zoo, data, "rar_natural", limit_s=1))
    monkeypatch.undo()
    after = read_checkpoint(zoo / "rar_natural" / "transformer.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert read_record(zoo, "rar_natural")["figures"]["earlier_s"] > 0


@pytest.mark.parametrize("given", ["method=gptq", "quant=w4a4"])
def test_quality_refuses_what_its_three_runs_have_of_their_own(given: str) -> None:
    with pytest.raises(ConfigError, match="the three runs have their own, leave it out$"):
        refuse_own_groups([given])
    refuse_own_groups(["quant.weights.symmetric=true", "device=cpu"])


def test_quality_and_statistics_make_a_card(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin_quality, "ROUNDED", ("w6a6",))
    report_quality("rar_natural", [*TINY, f"runs={zoo.parent / 'runs'}"], None, record=True)
    options = statistics.Options(model="rar_natural", record=True, sequences=4)
    statistics.measure_statistics(options)
    quality = read_record(zoo, "rar_natural-quality")
    assert quality["validation_images"]["lite0_fid"] == pytest.approx(0, abs=0.01)
    assert quality["full_precision"]["lite0_fid"] > 0.01
    assert quality["rtn"]["w6a6"]["kl"] > 0
    assert "fid" not in {name for name, value in quality["full_precision"].items() if value}
    card = (zoo / "README.md").read_text()
    for text in ("nothing is planted", "records/rar_natural-samples.jpg", "top-1, Lite0"):
        assert text in card
    assert "blocks.0.attn.qkv" in card


def test_tables_of_natural_images(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("methods", "components", "calibration"):
        first = next(table_cells(find_table(name), "natural", [0], ["eval=full"]))
        assert configure(list(first.overrides)).model.name.endswith("_natural")
    assert split_label("methods-natural") == ("methods", "natural")
    assert split_label("methods") == ("methods", "twin")
    for name in ("invariance", "outliers"):
        assert find_table(name).models["natural"] == ["rar_natural", "var_natural"]
    runs = zoo.parent / "runs"
    arguments = ["name=components", "scale=natural", "model=var_natural", *TINY, f"runs={runs}"]
    monkeypatch.setattr(sys, "argv", ["table", *arguments, "row=+GPS+STWQ"])
    main()
    printed = capsys.readouterr().out
    assert "var_natural" in printed


def test_a_reference_is_known_by_its_images_whatever_the_rounding_of_features(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(name: str) -> str:
        config = OmegaConf.create({"name": name, "dataset": "tiny_imagenet", "data": None})
        figures = trainers.build_lite0_reference(config, torch.device("cpu"), tmp_path)
        return figures["digest"]

    def extract_on_another_device(*args: Any, **kwargs: Any) -> Features:
        features = extract(*args, **kwargs)
        return replace(features, pool=features.pool * (1 + 1e-6))

    def other_images(split: str, folder: Path | None = None) -> tuple[Tensor, Tensor]:
        images, labels = load_split(split, folder)
        return images.flip(-1), labels

    extract = small_images.extract_features
    load_split = tiny_imagenet.load_split
    known = read_record(zoo, "natural_reference")["figures"]["digest"]
    assert make("here") == known
    with monkeypatch.context() as patch:
        patch.setattr(small_images, "extract_features", extract_on_another_device)
        assert make("there") == known
    contents = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("here", "there")]
    assert contents[0] != contents[1]
    monkeypatch.setattr(tiny_imagenet, "load_split", other_images)
    assert make("flipped") != known


def test_results_of_natural_images_are_known_by_records(zoo: Path) -> None:
    config = configure(["model=rar_natural", "method=fp", *TINY, f"runs={zoo.parent / 'runs'}"])
    whole = prepare_run(config).whole
    figures = read_record(zoo, "natural_reference")["figures"]
    assert whole["data"] == {
        "held_out": read_record(zoo, "rar_natural_heldout")["figures"]["digest"],
        "reference": figures["digest"],
        "extractor": figures["extractor"],
    }
    path = zoo / "natural_reference.safetensors"
    moved = path.rename(path.with_suffix(".away"))
    with pytest.raises(CheckpointError, match="model=natural_reference makes it"):
        find_judge(PRESETS["rar_natural"], torch.device("cpu"))
    moved.rename(path)
