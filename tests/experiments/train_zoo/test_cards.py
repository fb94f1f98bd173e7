"""The model cards: generated from the records, which are of the shipped weights and agree with a
fresh measurement."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import models
from experiments import statistics
from experiments.analyses.outliers import measure_outliers
from experiments.evaluate import likelihood
from experiments.plotting.grids import save_tiles
from experiments.train_zoo import model_cards
from models.registry import ZOO
from models.weights.digests import module_digest

TWINS = ("mar_twin", "par_twin", "rar_twin", "var_twin")
SHIPPED = (*TWINS, "rar_twin_plain")


def record(name: str, folder: Path = ZOO) -> dict[str, Any]:
    return json.loads((folder / "records" / f"{name}.json").read_text())


def section(text: str, name: str) -> str:
    """The card of one model."""
    return text.split(f"\n## {name}\n")[1].split("\n## ")[0]


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the records that tests may change."""
    shutil.copytree(ZOO / "records", tmp_path / "records")
    monkeypatch.setattr(model_cards, "ZOO", tmp_path)
    return tmp_path


def alter(zoo: Path, name: str, **changes: object) -> None:
    """Set top-level fields of a record of quality, or fields of its full precision."""
    found = record(f"{name}-quality", zoo)
    for key, value in changes.items():
        (found if key in found else found["full_precision"])[key] = value
    (zoo / "records" / f"{name}-quality.json").write_text(json.dumps(found))


def test_the_shipped_cards_are_those_of_the_records() -> None:
    assert model_cards.CARD.read_text() == model_cards.compose_cards()


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_and_its_control_are_measured_alike_and_meet_the_bars(name: str) -> None:
    ours, plain = (record(f"{n}-quality") for n in (name, f"{name}_plain"))
    for field in ("images", "sequences", "sampler_settings", "test_images"):
        assert ours[field] == pytest.approx(plain[field])
    assert (ours["images"], ours["sequences"]) == (10_000, 2000)
    assert all(ours["bars"].values())
    configs = [record(n)["config"] for n in (name, f"{name}_plain")]
    assert configs[0]["planted"].pop("weight") > 0
    assert configs[1]["planted"].pop("weight") == 0
    for field in ("dropout", "label_dropout", "planted", "schedule", "seed"):
        assert configs[0][field] == configs[1][field]


@pytest.mark.parametrize("name", [n for twin in TWINS for n in (twin, f"{twin}_plain")])
def test_the_records_of_a_model_are_of_the_same_weights(name: str) -> None:
    quality = record(f"{name}-quality")
    found = record(f"{name}-statistics")
    assert quality["weights"] == found["weights"]
    assert (min(found["inside_band"].values()) >= 0.5) == (not name.endswith("_plain"))


@pytest.mark.parametrize("name", TWINS)
def test_a_twins_card_has_its_rounding_beside_that_of_its_control(name: str) -> None:
    text = section(model_cards.compose_cards(), name)
    for model in (name, f"{name}_plain"):
        found = record(f"{model}-quality")
        for bits, row in found["rtn"].items():
            start = f"| {model} | {bits.upper()}, round to nearest | "
            assert f"{start}{row['nll']:.4f} | {row['kl']:.2g} | {row['fid']:.3f} |" in text
        assert f"| {model} | full precision | {found['full_precision']['nll']:.4f} |" in text


def test_a_card_says_what_planted_statistics_cost_and_if_that_is_much(zoo: Path) -> None:
    alter(zoo, "var_twin", nll=2.01, fid=0.45)
    alter(zoo, "var_twin_plain", nll=2.0, fid=0.5)
    mixed = section(model_cards.compose_cards(), "var_twin")
    assert (
        "NLL 2.0100 against 2.0000 (+0.5%, at most +1%), "
        "FID 0.450 against 0.500 (-10.0%, at most +10%)"
    ) in mixed
    alter(zoo, "var_twin", nll=2.1, fid=0.56)
    worse = section(model_cards.compose_cards(), "var_twin")
    assert (
        "(+5.0%, **more than +1%**), FID 0.560 against 0.500 (+12.0%, **more than +10%**)" in worse
    )
    assert "Cost of the planted" not in section(model_cards.compose_cards(), "var_twin_plain")


def test_a_twin_is_not_compared_with_a_control_measured_otherwise(zoo: Path) -> None:
    alter(zoo, "par_twin_plain", images=2000)
    text = section(model_cards.compose_cards(), "par_twin")
    assert "No comparison with par_twin_plain: not measured alike (images)." in text
    assert "Cost of the planted" not in text


def agrees(name: str, sequences: int, rows: int, nll: float, ratios: float) -> None:
    """The card's NLL and statistics against those of the first held-out images, up to relative
    errors."""
    generator = models.load(name)
    quality = record(f"{name}-quality")
    found = record(f"{name}-statistics")
    assert module_digest(generator.transformer) == quality["weights"] == found["weights"]
    stored = likelihood.load_held_out(generator.preset, sequences)
    fresh = likelihood.score_likelihood(generator, stored["tokens"], stored["labels"], 100)
    assert fresh["nll"] == pytest.approx(quality["full_precision"]["nll"], rel=nll)
    sites = measure_outliers(generator.adapter, statistics.heldout_rows(generator, rows)[0])
    assert set(sites) == set(found["sites"])
    for site, values in found["sites"].items():
        assert sites[site] == pytest.approx(values, rel=ratios)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_card_agrees_with_a_glance_at_the_shipped_weights(name: str) -> None:
    agrees(name, sequences=100, rows=64, nll=0.05, ratios=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_card_agrees_with_a_fresh_measurement(name: str) -> None:
    agrees(name, sequences=2000, rows=statistics.SEQUENCES, nll=1e-5, ratios=1e-3)


def test_sample_pictures_hold_images_pixel_by_pixel(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 255, (20, 1, 8, 8), dtype=np.uint8)
    save_tiles(np.repeat(grey, 3, axis=1), tmp_path / "new" / "x.png")
    picture = np.asarray(Image.open(tmp_path / "new" / "x.png"))
    assert picture.shape == (16, 80)
    assert np.array_equal(picture[8:, 24:32], grey[13, 0])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.png"]


@pytest.mark.parametrize("name", TWINS)
def test_a_card_shows_samples(name: str) -> None:
    assert Image.open(ZOO / "records" / f"{name}-samples.png").size == (320, 320)
    assert f"](records/{name}-samples.png)" in section(model_cards.compose_cards(), name)
