"""`experiments.evaluate` on bad input: one line that names field, value and what is allowed, and
nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from experiments.evaluate.options import parse
from models.registry import ZOO
from ptq.types import ConfigError
from tests.experiments.evaluate.evaluations import Case, pictures, run_command, save_npz
from tests.experiments.images.test_image_sets import save_shards


def refused(case: Case, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        case.run(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_samples_of_the_wrong_size_or_number_are_refused(
    case: Case, grey: tuple[Path, Path]
) -> None:
    reference = case.reference()
    assert refused(case, reference=reference, n=50).endswith(
        "samples.npz holds 40 images, expected 50"
    )
    case.run(reference=reference, n=40)
    assert "holds 8-pixel images, the fashion extractor takes 32" in refused(
        case, extractor="fashion"
    )
    large = save_npz(case.folder / "large.npz", pictures(9, size=16))
    assert refused(case, reference=large).endswith(
        "holds 16-pixel images, the samples have 8 pixels"
    )
    said = refused(case, samples=large, reference=reference)
    assert said.endswith("holds 8-pixel images, the samples have 16 pixels")
    assert "fp: " in refused(case, fp=large)
    assert refused(
        case, samples=save_npz(case.folder / "one.npz", pictures(1)), reference=reference
    ) == ("samples: 1 images, expected at least 2")
    single = save_npz(case.folder / "single.npz", pictures(1))
    assert refused(case, reference=single).endswith(
        "single.npz holds 1 images, expected at least 2"
    )


def test_shards_of_other_seeds_are_no_pairs(
    case: Case, grey: tuple[Path, Path], tmp_path: Path
) -> None:
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
    assert refused(case).startswith(
        "reference: missing, give VIRTUAL_imagenet256_labeled.npz or another"
    )
    (case.folder / "pointer.npz").write_text("version https://git-lfs.github.com/spec/v1\n")
    said = refused(case, reference=case.folder / "pointer.npz")
    assert "cannot be read as npz (a Git LFS pointer" in said
    (case.folder / "text.npz").write_text("text")
    assert "cannot be read as npz" in refused(case, reference=case.folder / "text.npz")
    with pytest.raises(
        ConfigError, match="was made with the extractor a4bfd00af8f0a426, not with 6726825d00000000"
    ):
        case.run(reference=ZOO / "reference.safetensors")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "samples: missing, give the path of images"),
        (["samples"], "samples: its value is missing, give samples=VALUE"),
        (
            ["samples=a", "extractor=vgg"],
            "extractor: 'vgg' is not one of inception, fashion, lite0",
        ),
        (
            ["samples=a", "prc_dtype=int8"],
            "prc_dtype: 'int8' is not one of float16, float32, float64",
        ),
        (["samples=a", "device=tpu"], "device: 'tpu' is not one of auto, cpu, cuda"),
        (["samples=a", "n=all"], "n: all is not an integer"),
        (["samples=a", "refrence=b"], "refrence: no such option, allowed are samples, reference, "),
    ],
)
def test_bad_options_are_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(arguments)
    assert str(caught.value).startswith(said)


def test_a_batch_of_nothing_is_refused(case: Case) -> None:
    assert (
        refused(case, reference=case.reference(), batch=0) == "batch: 0 is not a positive integer"
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: [f"samples={folder / 'none'}", "extractor=fashion"], "error: samples: "),
        (lambda folder: ["samples=x", "n=1.5"], "error: n: "),
        (
            lambda folder: [
                f"samples={save_npz(folder / 'a.npz', pictures(3))}",
                "reference=x",
                "weights=none.pth",
            ],
            "error: weights: none.pth is missing; get https://",
        ),
    ],
)
def test_the_command_line_says_in_one_line_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], list[str]], said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(monkeypatch, *make(tmp_path))
    assert str(caught.value.code).startswith(said)
    assert "\n" not in str(caught.value.code)
    assert not list(tmp_path.glob("*.json"))


def test_a_result_that_cannot_be_written_is_said(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case.folder / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        run_command(
            monkeypatch,
            f"samples={case.samples}",
            f"reference={case.reference()}",
            "device=cpu",
            f"cache={case.folder / 'cache'}",
            f"out={case.folder / 'file' / 'out.json'}",
        )
    assert str(caught.value.code).startswith("error: out: ")


def test_a_cache_that_cannot_be_written_is_said(case: Case) -> None:
    (case.folder / "file").write_text("")
    assert refused(case, reference=case.reference(), cache=case.folder / "file").startswith(
        "cache: "
    )
