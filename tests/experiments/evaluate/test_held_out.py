"""Held-out images of released models: how a folder is read, cut and encoded, and what it judges."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from experiments.analyses.data import scoring_sequences
from experiments.evaluate import held_out, likelihood
from experiments.evaluate.held_out import choose_images, crop_adm, crop_var, read_image
from experiments.run import cell
from experiments.run.dry_run import has_held_out
from experiments.run.preparation import load_model, prepare_run
from models import registry
from ptq.types import ConfigError
from tests.experiments.cells import config_of
from tests.experiments.run.test_families import configured, toy
from tests.experiments.table.requests import request_of

CLASSES = 10
WNIDS = [f"n{100 + 7 * label:08d}" for label in range(CLASSES)]
# official numbers are in another order than wnids
NUMBERS = {wnid: (3 * label) % CLASSES + 1 for label, wnid in enumerate(WNIDS)}


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AR_PTQ_CACHE", str(tmp_path / "cache"))
    choose_images.cache_clear()


def save_picture(path: Path, number: int) -> None:
    """An image of its own size and colours."""
    pixels = np.random.default_rng(number).integers(0, 256, (30 + number, 41, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="PNG")


@pytest.fixture
def by_class(tmp_path: Path) -> Path:
    """Twelve images in sub-folders by wnid: two of the first two classes, one of the others."""
    for number in range(12):
        name = f"ILSVRC2012_val_{number:08d}.PNG"
        save_picture(tmp_path / "classes" / WNIDS[number % CLASSES] / name, number)
    return tmp_path / "classes"


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """The same images as they are published."""
    folder = tmp_path / "flat"
    for number in range(12):
        save_picture(folder / f"ILSVRC2012_val_{number:08d}.PNG", number)
    numbers = [NUMBERS[WNIDS[number % CLASSES]] for number in range(12)]
    (folder / held_out.GROUND_TRUTH).write_text("\n".join(map(str, numbers)))
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    entries = [(NUMBERS[wnid], wnid, 0) for wnid in WNIDS] + [(11, "n99999999", 4)]  # a group
    savemat(folder / held_out.META, {"synsets": np.array(entries, dtype=fields)})
    return folder


def test_both_forms_of_a_folder_give_the_same_images_class_by_class(
    by_class: Path, flat: Path
) -> None:
    chosen = choose_images(by_class, CLASSES, 11)
    assert chosen.labels == (*range(CLASSES), 0)
    assert [path.stem[-2:] for path in chosen.paths[-2:]] == ["09", "10"]
    published = choose_images(flat, CLASSES, 11)
    assert (published.labels, published.digest) == (chosen.labels, chosen.digest)


def test_images_are_known_by_what_they_hold_and_not_by_where(by_class: Path) -> None:
    digest = choose_images(by_class, CLASSES, 12).digest
    moved = by_class.with_name("moved")
    shutil.move(by_class, moved)
    assert choose_images(moved, CLASSES, 12).digest == digest
    assert choose_images(moved, CLASSES, 11).digest != digest
    save_picture(moved / WNIDS[3] / "ILSVRC2012_val_00000003.PNG", 99)
    choose_images.cache_clear()
    assert choose_images(moved, CLASSES, 12).digest != digest


def test_a_folder_of_another_form_is_refused_in_one_line(by_class: Path, flat: Path) -> None:
    with pytest.raises(ConfigError, match="has 10 sub-folders, expected one for each of 1000"):
        choose_images(by_class, 1000, 4)
    with pytest.raises(ConfigError, match="eval.sequences: 13 is more than the 12 images in"):
        choose_images(by_class, CLASSES, 13)
    with pytest.raises(ConfigError, match="heldout: nowhere is no folder"):
        choose_images(Path("nowhere"), CLASSES, 4)
    (flat / "one_more.png").touch()
    with pytest.raises(ConfigError, match="holds 13 images, but ILSVRC2012_.* is of 12"):
        choose_images(flat, CLASSES, 4)
    (flat / "one_more.png").unlink()
    with pytest.raises(ConfigError, match="has 10 classes, expected 12"):
        choose_images(flat, 12, 4)
    (flat / held_out.META).write_text("no matlab")
    with pytest.raises(ConfigError, match="meta.mat cannot be read"):
        choose_images(flat, CLASSES, 4)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ConfigError, match=r"heldout: .*a\.png is no image"):
        read_image(tmp_path / "a.png", registry.PRESETS["rar_b"])


def test_the_middle_is_cut_as_the_authors_cut_it() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    # twice too large: boxes of four are averaged, and nothing is left to resize
    averages = pixels.reshape(32, 2, 48, 2, 3).mean(axis=(1, 3))
    middle = np.array(crop_adm(image, 32)).astype(float)
    assert np.abs(middle - averages[:, 8:40]).max() <= 1  # rounded along both axes
    # of the right size already, the middle is cut out and nothing changed
    assert np.array_equal(np.array(crop_adm(image, 64)), pixels[:, 16:80])
    enlarged = image.resize((108, 72), Image.Resampling.LANCZOS)
    assert np.array_equal(np.array(crop_var(image, 64)), np.array(enlarged)[4:68, 22:86])


@pytest.mark.parametrize("name", ["rar_b", "var_d16", "mar_b"])
def test_a_released_model_is_judged_by_the_images_that_are_named(
    name: str, by_class: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.PRESETS, name, toy(name))
    words = ("method=rtn", "eval.sequences=11")
    config = configured(name, tmp_path, *words, f"heldout={by_class}")
    result = cell.run_cell(config)
    assert result["metrics"]["kl"] > 0
    assert result["provenance"]["identity"]["held_out"] == choose_images(by_class, 10, 11).digest
    # full precision, by the tokens of the model's own tokenizer
    original = load_model(config, torch.device("cpu"))
    chosen = choose_images(by_class, 10, 11)
    images = torch.stack([read_image(path, original.preset) for path in chosen.paths])
    full_precision = cell.run_cell(cell.full_precision_config(config))
    scores = likelihood.score_likelihood(
        original, original.encode(images), torch.tensor(chosen.labels), config.eval.batch
    )
    assert full_precision["metrics"]["nll"] == pytest.approx(scores["nll"], rel=1e-5)
    # without images the run is another one, and has neither
    without = configured(name, tmp_path, *words)
    assert prepare_run(without).folder != prepare_run(config).folder
    assert cell.run_cell(without)["metrics"]["kl"] is None


def test_images_are_encoded_once(
    by_class: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.PRESETS, "rar_b", toy("rar_b"))
    config = configured("rar_b", tmp_path, "eval.sequences=4", f"heldout={by_class}")
    run = prepare_run(config)
    runs = Path(config.runs)
    arguments = (run.held_out, run.tokenizer_digest, runs, lambda items, what: items)
    first = held_out.encode_held_out(run.generator, *arguments)
    run.generator.encode = None  # would be called
    again = held_out.encode_held_out(run.generator, *arguments)
    assert torch.equal(first["tokens"], again["tokens"])
    assert again["labels"].tolist() == [0, 1, 2, 3]
    # analyses score on the same ones
    tokens, labels = scoring_sequences(run, lambda items, what: items)
    assert torch.equal(tokens, first["tokens"])
    assert torch.equal(labels, first["labels"])


@pytest.mark.parametrize(("words", "expected"), [([], False), (["heldout=images"], True)])
def test_likelihoods_are_priced_where_there_are_images(words: list[str], expected: bool) -> None:
    assert has_held_out(config_of("model=rar_b", *words)) is expected
    assert has_held_out(config_of("model=rar_twin"))


def test_a_twin_has_its_own() -> None:
    with pytest.raises(ConfigError, match="heldout: rar_twin ships its held-out tokens"):
        prepare_run(config_of("model=rar_twin", "heldout=images"))


def test_a_table_says_at_once_what_goes_without_and_what_is_no_folder(
    capsys: pytest.CaptureFixture,
) -> None:
    words = ("name=rar", "scale=paper", "model=rar_b,rar_l", "dry_run=true")
    request_of(*words)
    said = "heldout: no validation images are named, so KL and NLL of rar_b, rar_l are null"
    assert capsys.readouterr().err.strip() == said
    with pytest.raises(ConfigError, match="heldout: .*nowhere is no folder"):
        request_of(*words, "heldout=nowhere")
