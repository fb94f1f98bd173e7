"""`experiments.evaluate`: its figures are those of the library, features are kept by content, bad input is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from experiments import evaluate, extractor, features, metrics, paired
from experiments.config import RESULT_VERSION
from experiments.evaluate import METRICS, Options, parse
from experiments.images import write_npz, write_pngs
from experiments.manifold import precision_recall
from models.registry import ZOO
from ptq.types import ConfigError
from tests.experiments.test_images import parts, save_shards
from tests.reference import made_up, made_up_ints

LAYERS = {"pool": 12, "logits": 10, "spatial": 20}


class Linear:
    """An extractor whose layers are linear in the pixels: as quick as it gets. Counts the images it has seen."""

    image_size: int | None = None

    def __init__(self, digest: str = "6726825d00000000") -> None:
        self.digest, self.seen = digest, 0

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        self.seen += len(images)
        x = images.float().flatten(1) / 127.5 - 1
        return tuple(x @ made_up(name, (x.shape[1], d)) / x.shape[1]**0.5 for name, d in LAYERS.items())

    def convert_features_tuple_to_dict(self, found: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(LAYERS, found))


def pictures(n: int, salt: str = "", size: int = 8) -> np.ndarray:
    return made_up_ints("pictures", (n, 3, size, size), 256, salt).byte().numpy()


def save(path: Path, images: np.ndarray, **more: np.ndarray) -> Path:
    np.savez(path, arr_0=images.transpose(0, 2, 3, 1), **more)
    return path


def moments(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return x.double().numpy().mean(0), np.cov(x.double().numpy().T)


def scipy_frechet(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    (m, s), (n, t) = one, other
    return float(((m - n)**2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real))


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Linear:
    """Takes the place of Inception (and of Lite0)."""
    found, original = Linear(), evaluate.load_extractor
    monkeypatch.setattr(
        evaluate, "load_extractor", lambda o: original(o) if o.extractor == "fashion" else (found, LAYERS)
    )
    return found


class Case:
    """Samples and an ADM reference batch: statistics of a training set, and ten of its images."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.net = folder, Linear()
        self.images, self.training = pictures(40), pictures(60, "training")
        self.of_images, self.of_training = self.features(self.images), self.features(self.training)
        self.mu, self.sigma = moments(self.of_training["pool"])
        self.mu_s, self.sigma_s = moments(self.of_training["spatial"])
        self.samples = save(folder / "samples.npz", self.images)

    def features(self, images: np.ndarray) -> dict[str, Tensor]:
        return self.net.convert_features_tuple_to_dict(self.net(torch.from_numpy(images)))

    def reference(self, *names: str, **changed: np.ndarray) -> Path:
        """An npz of the named statistics, or of all of them and ten images."""
        whole = {"mu": self.mu, "sigma": self.sigma, "mu_s": self.mu_s, "sigma_s": self.sigma_s} | changed
        path = self.folder / "reference.npz"
        if names:
            np.savez(path, **{name: whole[name] for name in names})
            return path
        return save(path, self.training[:10], **whole)

    def run(self, **options: object) -> dict:
        defaults = {"samples": str(self.samples), "cache": str(self.folder / "cache"), "device": "cpu"}
        return evaluate.evaluate(Options(**(defaults | {k: v if v is None else str(v) if isinstance(v, Path) else v
                                                        for k, v in options.items()})))


@pytest.fixture
def case(tmp_path: Path, net: Linear) -> Case:
    return Case(tmp_path)


def test_against_a_reference_batch_of_adm(case: Case) -> None:
    result = case.run(reference=case.reference())
    pool, spatial = moments(case.of_images["pool"]), moments(case.of_images["spatial"])
    found = result["metrics"]
    assert found["fid"] == pytest.approx(scipy_frechet(pool, (case.mu, case.sigma)), rel=1e-6)
    assert found["sfid"] == pytest.approx(scipy_frechet(spatial, (case.mu_s, case.sigma_s)), rel=1e-6)
    expected = precision_recall(case.of_images["pool"], case.of_training["pool"][:10], torch.float64)
    assert (found["precision"], found["recall"]) == pytest.approx(expected, abs=1e-6)
    assert list(found) == list(METRICS)
    assert result["provenance"]["images"] == 40
    assert result["provenance"]["lacking"] == {}
    assert result["provenance"]["evaluator"]["weights"] == "6726825d00000000"
    assert (result["cell"], result["seed"]) == (None, None)
    assert json.loads(json.dumps(result)) == result


def test_statistics_alone_are_accepted_and_what_needs_images_is_refused_with_the_reason(case: Case) -> None:
    whole = case.run(reference=case.reference())["metrics"]
    for names, null in ((("mu", "sigma", "mu_s", "sigma_s"), {"precision", "recall"}),
                        (("mu", "sigma"), {"sfid", "precision", "recall"})):
        result = case.run(reference=case.reference(*names))
        assert result["metrics"] == {k: None if k in null else v for k, v in whole.items()}
        assert set(result["provenance"]["lacking"]) == null
        assert "statistics only, no images" in result["provenance"]["lacking"]["precision"]
    assert result["provenance"]["lacking"]["sfid"] == "reference.npz holds no mu_s and sigma_s"


def test_a_reference_of_images_alone_gives_their_statistics(case: Case) -> None:
    result = case.run(reference=save(case.folder / "training.npz", case.training))
    pool = moments(case.of_images["pool"])
    assert result["metrics"]["fid"] == pytest.approx(scipy_frechet(pool, (case.mu, case.sigma)), rel=1e-6)
    expected = precision_recall(case.of_images["pool"], case.of_training["pool"], torch.float64)
    assert (result["metrics"]["precision"], result["metrics"]["recall"]) == pytest.approx(expected, abs=1e-6)
    origin = result["provenance"]["evaluator"]["reference"]
    assert origin["images"] == 60
    assert "statistics" not in origin  # what experiments.gate asks for


def test_formats_of_the_distances(case: Case) -> None:
    expected = {
        name: precision_recall(case.of_images["pool"], case.of_training["pool"][:10], getattr(torch, name))
        for name in ("float16", "float32", "float64")
    }
    for name, value in expected.items():
        found = case.run(reference=case.reference(), prc_dtype=name)
        assert (found["metrics"]["precision"], found["metrics"]["recall"]) == value
        assert found["provenance"]["evaluator"]["prc_dtype"] == name


def test_figures_of_lite0_are_called_so_and_it_takes_images_only(case: Case) -> None:
    result = case.run(extractor="lite0", reference=case.reference())
    figures = {k for k, v in result["metrics"].items() if v is not None}
    assert figures == {f"lite0_{k}" for k in ("fid", "sfid", "is", "is_file_order", "precision", "recall")}
    of_images = moments(case.of_training["pool"][:10])  # not the statistics, which are of Inception
    expected = scipy_frechet(moments(case.of_images["pool"]), of_images)
    assert result["metrics"]["lite0_fid"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigError, match="holds statistics of Inception and no images, lite0 needs images"):
        case.run(extractor="lite0", reference=case.reference("mu", "sigma"))


# --- where features are kept


def test_features_are_kept_by_content(case: Case, net: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CHUNK", 16)
    reference = case.reference("mu", "sigma")
    first = case.run(reference=reference)
    assert net.seen == 40
    write_pngs(parts(case.images), case.folder / "png")
    save_shards(case.folder / "run", case.images, 40)
    save(case.folder / "packed.npz", case.images)
    for other in ("png", "run", "packed.npz"):  # the same images in other files
        result = case.run(samples=case.folder / other, reference=reference)
        assert result["metrics"] == first["metrics"]
        assert result["provenance"]["samples"] == first["provenance"]["samples"]
    assert net.seen == 40
    save(case.samples, np.concatenate((case.images, pictures(7, "more"))))
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
    monkeypatch.setattr(features, "RESULT_VERSION", RESULT_VERSION + 1)
    before = net.seen
    case.run(reference=reference)
    assert net.seen == before + 47
    assert {p.name for p in (case.folder / "cache").iterdir()} == {
        f"inception-{digest}-v{version}" for digest, version in (
            ("6726825d00000000", RESULT_VERSION), ("1111222233334444", RESULT_VERSION),
            ("1111222233334444", RESULT_VERSION + 1),
        )
    }


def test_a_killed_extraction_continues(case: Case, net: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CHUNK", 16)
    reference, original = case.reference("mu", "sigma"), features.extract
    calls = []

    def fatal(*args: object) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(features, "extract", fatal)
        with pytest.raises(KeyboardInterrupt):
            case.run(reference=reference)
    assert net.seen == 16
    case.run(reference=reference)
    assert net.seen == 40


# --- the shipped extractor, and the full-precision model's own images


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of 30 images of 32 pixels, the second one close to the first, without the padding's two."""
    folder = tmp_path_factory.mktemp("grey")
    whole = pictures(32, size=32)
    save_shards(folder / "fp", whole, 30)
    save_shards(folder / "quantized", whole ^ np.uint8(8), 30)
    return folder / "quantized", folder / "fp"


def test_the_shipped_extractor_gives_the_figures_of_a_run(case: Case, grey: tuple[Path, Path]) -> None:
    result = case.run(samples=grey[0], extractor="fashion", prc_dtype="float64")
    net = extractor.load(ZOO / "extractor.safetensors")
    found = metrics.extract(torch.from_numpy(pictures(32, size=32)[:30] ^ np.uint8(8)), net)
    expected = metrics.image_metrics(found, metrics.Reference.load(ZOO / "reference.safetensors", net.digest))
    expected["agreement"] = (found.logits.argmax(1) == torch.arange(30) % 10).double().mean().item()
    assert {k: result["metrics"][k] for k in expected} == pytest.approx(expected, rel=1e-6)
    assert result["provenance"]["hash"] == "0123abcd"
    assert result["provenance"]["evaluator"]["reference"]["images"] == 60_000


def test_against_the_full_precision_models_images(case: Case, grey: tuple[Path, Path]) -> None:
    quantized, fp = grey
    result = case.run(samples=quantized, fp=fp, extractor="fashion")["metrics"]
    net = extractor.load(ZOO / "extractor.safetensors")
    one, other = pictures(32, size=32)[:30] ^ np.uint8(8), pictures(32, size=32)[:30]
    assert result["psnr"] == pytest.approx(10 * np.log10(255**2 / 64), rel=1e-9)
    assert result["token_agreement"] == 1
    distance = paired.paired_distance(torch.from_numpy(one), torch.from_numpy(other), net).mean().item()
    assert result["paired_distance"] == pytest.approx(distance, rel=1e-6)
    pools = [metrics.extract(torch.from_numpy(x), net) for x in (one, other)]
    assert result["fid2fp"] == pytest.approx(metrics.frechet(*pools), rel=1e-4)
    same = case.run(samples=fp, fp=fp, extractor="fashion")["metrics"]
    assert same["fid2fp"] == pytest.approx(0, abs=1e-6)
    assert same["paired_distance"] == 0


def test_no_reference_is_needed_beside_the_full_precision_models_images(case: Case) -> None:
    fp = save(case.folder / "fp.npz", case.training[:40])
    found = case.run(fp=fp)["metrics"]
    figures = {k for k, v in found.items() if v is not None}
    assert figures == {"is", "is_file_order", "fid2fp", "psnr"}  # an npz has no tokens
    pools = [moments(case.features(x)["pool"]) for x in (case.images, case.training[:40])]
    assert found["fid2fp"] == pytest.approx(scipy_frechet(*pools), rel=1e-6)


# --- bad input


def refused(case: Case, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        case.run(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_samples_of_the_wrong_size_or_number_are_refused(case: Case, grey: tuple[Path, Path]) -> None:
    reference = case.reference()
    assert refused(case, reference=reference, n=50).endswith("samples.npz holds 40 images, expected 50")
    case.run(reference=reference, n=40)
    assert "holds 8-pixel images, the fashion extractor takes 32" in refused(case, extractor="fashion")
    large = save(case.folder / "large.npz", pictures(9, size=16))
    assert refused(case, reference=large).endswith("holds 16-pixel images, the samples have 8 pixels")
    said = refused(case, samples=large, reference=reference)
    assert said.endswith("holds 8-pixel images, the samples have 16 pixels")
    assert "fp: " in refused(case, fp=large)
    assert refused(case, samples=save(case.folder / "one.npz", pictures(1)), reference=reference) == (
        "samples: 1 images, expected at least 2"
    )
    single = save(case.folder / "single.npz", pictures(1))
    assert refused(case, reference=single).endswith("single.npz holds 1 images, expected at least 2")


def test_shards_of_other_seeds_are_no_pairs(case: Case, grey: tuple[Path, Path], tmp_path: Path) -> None:
    save_shards(tmp_path / "seed", pictures(32, size=32), 30)
    manifest = json.loads((tmp_path / "seed" / "manifest.json").read_text())
    (tmp_path / "seed" / "manifest.json").write_text(json.dumps(manifest | {"seed": 1}))
    said = refused(case, samples=grey[0], fp=tmp_path / "seed", extractor="fashion")
    assert said == "fp: seed is 1, of the samples 0"


BAD_STATISTICS = {
    "short": ({"mu": np.zeros(11)}, r"mu of .* is (11,), expected (12,)"),
    "misshapen": ({"sigma": np.zeros((12, 11))}, "is (12, 11), expected (12, 12)"),
    "nan": ({"sigma_s": np.full((20, 20), np.nan)}, "has values that are not finite"),
    "lopsided": ({"sigma": np.triu(np.ones((12, 12)))}, "is not symmetric, as a covariance is"),
    "without sigma": (None, "reference: "),
}


@pytest.mark.parametrize("kind", BAD_STATISTICS)
def test_bad_statistics_are_refused(case: Case, kind: str) -> None:
    changed, said = BAD_STATISTICS[kind]
    path = case.reference("mu", "mu_s") if changed is None else case.reference(**changed)
    with pytest.raises(ValueError, match="reference: ") as caught:
        case.run(reference=path)
    assert said.split(" .* ")[-1] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_bad_references_are_refused(case: Case) -> None:
    said = refused(case, reference=case.folder / "none.npz")
    assert said.endswith("none.npz is missing, expected an npz file or a folder")
    assert refused(case).startswith("reference: missing, give VIRTUAL_imagenet256_labeled.npz or another")
    (case.folder / "text.npz").write_text("text")
    assert "cannot be read as npz" in refused(case, reference=case.folder / "text.npz")
    with pytest.raises(ConfigError, match="was made with the extractor a4bfd00af8f0a426, not with 6726825d00000000"):
        case.run(reference=ZOO / "reference.safetensors")


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "samples: missing, give the path of images"),
    (["samples"], "samples: expected options such as samples=FOLDER"),
    (["samples=a", "extractor=vgg"], "extractor: 'vgg' is not one of inception, fashion, lite0"),
    (["samples=a", "prc_dtype=int8"], "prc_dtype: 'int8' is not one of float16, float32, float64"),
    (["samples=a", "device=tpu"], "device: 'tpu' is not one of auto, cpu, cuda"),
    (["samples=a", "n=all"], "n: Value 'all' of type 'str' could not be converted to Integer"),
    (["samples=a", "refrence=b"], "refrence: no such field, allowed are samples, reference, "),
])
def test_bad_options_are_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(arguments)
    assert str(caught.value).startswith(said)


def test_a_batch_of_nothing_is_refused(case: Case) -> None:
    assert refused(case, reference=case.reference(), batch=0) == "batch: 0 is not a positive integer"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    evaluate.main()


def test_the_command_prints_its_figures_and_writes_them_beside_the_samples(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], grey: tuple[Path, Path]
) -> None:
    cache = f"cache={case.folder / 'cache'}"
    command(monkeypatch, f"samples={case.samples}", f"reference={case.reference('mu', 'sigma')}", cache, "device=cpu")
    said = capsys.readouterr().out
    result = json.loads((case.folder / "samples.npz-evaluation-inception.json").read_text())
    assert f"fid                  {result['metrics']['fid']:.6g}\n" in said
    assert "precision            not computed: reference.npz holds statistics only, no images\n" in said
    assert "fid2fp" not in said
    command(monkeypatch, f"samples={grey[0]}", "extractor=fashion", cache, "device=cpu")
    assert json.loads((grey[0] / "evaluation-fashion.json").read_text())["metrics"]["fid"] > 0
    command(monkeypatch, f"samples={grey[0]}", "extractor=fashion", cache, f"out={case.folder / 'a' / 'b.json'}")
    assert (case.folder / "a" / "b.json").is_file()


@pytest.mark.parametrize(("make", "said"), [
    (lambda folder: [f"samples={folder / 'none'}", "extractor=fashion"], "error: samples: "),
    (lambda folder: ["samples=x", "n=1.5"], "error: n: "),
    (lambda folder: [f"samples={save(folder / 'a.npz', pictures(3))}", "reference=x", "weights=none.pth"],
     "error: weights: none.pth is missing; get https://"),
])
def test_the_command_line_says_in_one_line_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], list[str]], said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, *make(tmp_path))
    assert str(caught.value.code).startswith(said)
    assert "\n" not in str(caught.value.code)
    assert not list(tmp_path.glob("*.json"))


def test_a_result_that_cannot_be_written_is_said(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    (case.folder / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, f"samples={case.samples}", f"reference={case.reference()}", "device=cpu",
                f"cache={case.folder / 'cache'}", f"out={case.folder / 'file' / 'out.json'}")
    assert str(caught.value.code).startswith("error: out: ")


def test_a_cache_that_cannot_be_written_is_said(case: Case) -> None:
    (case.folder / "file").write_text("")
    assert refused(case, reference=case.reference(), cache=case.folder / "file").startswith("cache: ")


def test_npz_files_of_ours_are_samples(case: Case) -> None:
    write_npz(parts(case.images), 40, 8, case.folder / "ours.npz")
    whole = case.run(reference=case.reference())
    assert case.run(reference=case.reference(), samples=case.folder / "ours.npz")["metrics"] == whole["metrics"]
