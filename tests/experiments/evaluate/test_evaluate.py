"""`experiments.evaluate`: its figures are those of the library, features are kept by content."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.evaluate import features, paired, small_images
from experiments.evaluate.command import FIGURES
from experiments.evaluate.extractors import fashion
from experiments.evaluate.precision_recall import precision_recall
from experiments.evaluate.references import Reference
from experiments.identity.parts import RAISED_VERSIONS
from experiments.images.image_sets import write_npz, write_pngs
from experiments.store.results import RESULT_VERSION
from models.registry import ZOO
from ptq.types import ConfigError
from tests.experiments.evaluate.evaluations import (
    Case,
    Linear,
    pictures,
    run_command,
    save_npz,
)
from tests.experiments.evaluate.numpy_figures import numpy_frechet, numpy_statistics
from tests.experiments.images.test_image_sets import parts, save_shards


def computed(metrics: dict[str, float | None]) -> set[str]:
    """The metrics that are not null."""
    return {name for name, value in metrics.items() if value is not None}


def test_against_a_reference_batch_of_adm(case: Case) -> None:
    result = case.run(reference=case.reference())
    pool = numpy_statistics(case.of_images["pool"])
    spatial = numpy_statistics(case.of_images["spatial"])
    found = result["metrics"]
    assert found["fid"] == pytest.approx(numpy_frechet(pool, (case.mu, case.sigma)), rel=1e-6)
    assert found["sfid"] == pytest.approx(
        numpy_frechet(spatial, (case.mu_s, case.sigma_s)), rel=1e-6
    )
    expected = precision_recall(
        case.of_images["pool"], case.of_training["pool"][:10], torch.float64
    )
    assert (found["precision"], found["recall"]) == pytest.approx(expected, abs=1e-6)
    assert list(found) == list(FIGURES)
    assert result["provenance"]["images"] == 40
    assert result["provenance"]["lacking"] == {}
    assert result["provenance"]["evaluator"]["weights"] == "6726825d00000000"
    assert (result["cell"], result["seed"]) == (None, None)
    assert json.loads(json.dumps(result)) == result


def test_statistics_alone_do_and_what_needs_images_is_refused(
    case: Case,
) -> None:
    whole = case.run(reference=case.reference())["metrics"]
    for names, null in (
        (("mu", "sigma", "mu_s", "sigma_s"), {"precision", "recall"}),
        (("mu", "sigma"), {"sfid", "precision", "recall"}),
    ):
        result = case.run(reference=case.reference(*names))
        assert result["metrics"] == {k: None if k in null else v for k, v in whole.items()}
        assert set(result["provenance"]["lacking"]) == null
        assert "statistics only, no images" in result["provenance"]["lacking"]["precision"]
    assert result["provenance"]["lacking"]["sfid"] == "reference.npz holds no mu_s and sigma_s"


def test_a_reference_of_images_alone_gives_their_statistics(case: Case) -> None:
    result = case.run(reference=save_npz(case.folder / "training.npz", case.training))
    pool = numpy_statistics(case.of_images["pool"])
    assert result["metrics"]["fid"] == pytest.approx(
        numpy_frechet(pool, (case.mu, case.sigma)), rel=1e-6
    )
    expected = precision_recall(case.of_images["pool"], case.of_training["pool"], torch.float64)
    assert (result["metrics"]["precision"], result["metrics"]["recall"]) == pytest.approx(
        expected, abs=1e-6
    )
    origin = result["provenance"]["evaluator"]["reference"]
    assert origin["images"] == 60
    assert "statistics" not in origin  # what experiments.evaluate.fp_gate asks for


def test_formats_of_the_distances(case: Case) -> None:
    expected = {
        name: precision_recall(
            case.of_images["pool"], case.of_training["pool"][:10], getattr(torch, name)
        )
        for name in ("float16", "float32", "float64")
    }
    for name, value in expected.items():
        found = case.run(reference=case.reference(), prc_dtype=name)
        assert (found["metrics"]["precision"], found["metrics"]["recall"]) == value
        assert found["provenance"]["evaluator"]["prc_dtype"] == name


def test_figures_of_lite0_are_called_so_and_it_takes_images_only(case: Case) -> None:
    result = case.run(extractor="lite0", reference=case.reference())
    assert computed(result["metrics"]) == {
        "lite0_fid",
        "lite0_sfid",
        "lite0_is",
        "lite0_is_file_order",
        "lite0_precision",
        "lite0_recall",
    }
    of_images = numpy_statistics(
        case.of_training["pool"][:10]
    )  # not the statistics, which are of Inception
    expected = numpy_frechet(numpy_statistics(case.of_images["pool"]), of_images)
    assert result["metrics"]["lite0_fid"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(
        ConfigError, match="holds statistics of Inception and no images, lite0 needs images"
    ):
        case.run(extractor="lite0", reference=case.reference("mu", "sigma"))


# --- where features are kept


def test_features_are_kept_by_content(
    case: Case, net: Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHUNK", 16)
    reference = case.reference("mu", "sigma")
    first = case.run(reference=reference)
    assert net.seen == 40
    write_pngs(parts(case.images), case.folder / "png")
    save_shards(case.folder / "run", case.images, 40)
    save_npz(case.folder / "packed.npz", case.images)
    for other in ("png", "run", "packed.npz"):  # the same images in other files
        result = case.run(samples=case.folder / other, reference=reference)
        assert result["metrics"] == first["metrics"]
        assert result["provenance"]["samples"] == first["provenance"]["samples"]
    assert net.seen == 40
    save_npz(case.samples, np.concatenate((case.images, pictures(7, "more"))))
    more = case.run(reference=reference)
    assert net.seen == 40 + 15  # the first two chunks are those of before
    assert more["provenance"]["samples"] != first["provenance"]["samples"]
    kept = sorted((case.folder / "cache").rglob("*.safetensors"))
    assert len(kept) == 4
    assert kept[0].parent.name == f"inception-6726825d00000000-v{RESULT_VERSION}"
    kept[0].write_bytes(b"damaged")
    assert case.run(reference=reference)["metrics"] == more["metrics"]
    net.digest = "1111222233334444"
    case.run(reference=reference)
    monkeypatch.setitem(RAISED_VERSIONS, "evaluator.features", RESULT_VERSION + 1)
    before = net.seen
    case.run(reference=reference)
    assert net.seen == before + 47
    assert {p.name for p in (case.folder / "cache").iterdir()} == {
        f"inception-{digest}-v{version}"
        for digest, version in (
            ("6726825d00000000", RESULT_VERSION),
            ("1111222233334444", RESULT_VERSION),
            ("1111222233334444", RESULT_VERSION + 1),
        )
    }


def test_a_killed_extraction_continues(
    case: Case, net: Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHUNK", 16)
    reference = case.reference("mu", "sigma")
    original = features.extract_layers
    calls = []

    def fatal(*args: object) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(features, "extract_layers", fatal)
        with pytest.raises(KeyboardInterrupt):
            case.run(reference=reference)
    assert net.seen == 16
    case.run(reference=reference)
    assert net.seen == 40


# --- the shipped extractor, and the full-precision model's own images


def test_the_shipped_extractor_gives_the_figures_of_a_run(
    case: Case, grey: tuple[Path, Path]
) -> None:
    result = case.run(samples=grey[0], extractor="fashion", prc_dtype="float64")
    net = fashion.load_classifier(ZOO / "extractor.safetensors")
    found = small_images.extract_features(
        torch.from_numpy(pictures(32, size=32)[:30] ^ np.uint8(8)), net
    )
    expected = small_images.image_metrics(
        found, Reference.load(ZOO / "reference.safetensors", net.digest).target()
    )
    expected["agreement"] = (found.logits.argmax(1) == torch.arange(30) % 10).double().mean().item()
    assert {k: result["metrics"][k] for k in expected} == pytest.approx(expected, rel=1e-6)
    assert result["provenance"]["hash"] == "0123abcd"
    assert result["provenance"]["evaluator"]["reference"]["images"] == 60_000


def test_against_the_full_precision_models_images(case: Case, grey: tuple[Path, Path]) -> None:
    quantized, fp = grey
    result = case.run(samples=quantized, fp=fp, extractor="fashion")["metrics"]
    net = fashion.load_classifier(ZOO / "extractor.safetensors")
    one = pictures(32, size=32)[:30] ^ np.uint8(8)
    other = pictures(32, size=32)[:30]
    assert result["psnr"] == pytest.approx(10 * np.log10(255**2 / 64), rel=1e-9)
    assert result["token_agreement"] == 1
    distance = (
        paired.paired_distance(torch.from_numpy(one), torch.from_numpy(other), net).mean().item()
    )
    assert result["paired_distance"] == pytest.approx(distance, rel=1e-6)
    pools = [small_images.extract_features(torch.from_numpy(x), net) for x in (one, other)]
    assert result["fid2fp"] == pytest.approx(small_images.pool_distance(*pools), rel=1e-4)
    same = case.run(samples=fp, fp=fp, extractor="fashion")["metrics"]
    assert same["fid2fp"] == pytest.approx(0, abs=1e-6)
    assert same["paired_distance"] == 0


def test_no_reference_is_needed_beside_the_full_precision_models_images(case: Case) -> None:
    fp = save_npz(case.folder / "fp.npz", case.training[:40])
    found = case.run(fp=fp)["metrics"]
    assert computed(found) == {"is", "is_file_order", "fid2fp", "psnr"}  # an npz has no tokens
    pools = [numpy_statistics(case.features(x)["pool"]) for x in (case.images, case.training[:40])]
    assert found["fid2fp"] == pytest.approx(numpy_frechet(*pools), rel=1e-6)


def test_npz_files_of_ours_are_samples(case: Case) -> None:
    write_npz(parts(case.images), 40, 8, case.folder / "ours.npz")
    whole = case.run(reference=case.reference())
    assert (
        case.run(reference=case.reference(), samples=case.folder / "ours.npz")["metrics"]
        == whole["metrics"]
    )


def test_the_command_prints_figures_and_writes_them_beside_the_samples(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    grey: tuple[Path, Path],
) -> None:
    cache = f"cache={case.folder / 'cache'}"
    run_command(
        monkeypatch,
        f"samples={case.samples}",
        f"reference={case.reference('mu', 'sigma')}",
        cache,
        "device=cpu",
    )
    said = capsys.readouterr().out
    result = json.loads((case.folder / "samples.npz-evaluation-inception.json").read_text())
    assert f"fid                  {result['metrics']['fid']:.6g}\n" in said
    assert (
        "precision            not computed: reference.npz holds statistics only, no images\n"
        in said
    )
    assert "fid2fp" not in said
    run_command(monkeypatch, f"samples={grey[0]}", "extractor=fashion", cache, "device=cpu")
    assert json.loads((grey[0] / "evaluation-fashion.json").read_text())["metrics"]["fid"] > 0
    run_command(
        monkeypatch,
        f"samples={grey[0]}",
        "extractor=fashion",
        cache,
        f"out={case.folder / 'a' / 'b.json'}",
    )
    assert (case.folder / "a" / "b.json").is_file()
