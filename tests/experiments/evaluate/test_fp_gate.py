"""The gate on full precision, on made-up result files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.evaluate import fp_gate
from experiments.evaluate.fp_gate import ALLOWED, judge_results, verdict_table
from models.registry import PRESETS

PUBLISHED = PRESETS["rar_b"].published_fid  # 1.95


def result(
    fid: float | None,
    method: str = "fp",
    sampler: str = "official",
    model: str = "rar_b",
    **more: Any,
) -> dict:
    """A result as `experiments.evaluate` writes it; `more` replaces fields of the evaluator, images
    or settings."""
    evaluator = {
        "extractor": "inception",
        "weights": "6726825d01234567",
        "prc_dtype": "float32",
        "reference": {"file": "VIRTUAL_imagenet256_labeled.npz", "statistics": "0123456789abcdef"},
        "version": 1,
    }
    settings = PRESETS[model].samplers[sampler] if model in PRESETS else {}
    return {
        "schema": 1,
        "seed": 0,
        "metrics": {"fid": fid, "is": 300.0},
        "cost": {},
        "cell": {
            "model": model,
            "method": method,
            "quant": None if method == "fp" else "w6a6",
            "sampler": sampler,
        },
        "provenance": {
            "images": more.pop("images", 50_000),
            "sampler_settings": more.pop("settings", dict(settings)),
            "evaluator": evaluator | more,
        },
    }


def verdict(*results: dict) -> fp_gate.Verdict:
    found = judge_results(results)
    assert list(found) == ["rar_b"]
    return found["rar_b"]


@pytest.mark.parametrize(
    ("fid", "allowed"),
    [
        (1.95, True),
        (2.05, True),
        (1.85, True),
        (2.06, False),
        (1.84, False),
        (19.5, False),
    ],
)
def test_within_a_tenth_of_the_published_fid(fid: float, allowed: bool) -> None:
    found = verdict(result(fid), result(4.2, "ptq4arvg"))
    assert (found.published, found.official, found.allowed) == (PUBLISHED, fid, allowed)
    if allowed:
        assert str(found) == ALLOWED
    else:
        assert str(found) == (
            f"refused: full precision has FID {fid:.2f} under sampler=official, "
            f"{abs(fid - 1.95):.2f} from the published 1.95; allowed is 0.1"
        )


def test_both_samplers_are_told_and_only_the_official_one_opens_the_gate() -> None:
    found = verdict(result(1.99), result(2.40, sampler="ptq4arvg"))
    assert (found.official, found.ptq4arvg, found.allowed) == (1.99, 2.40, True)
    rows = [result(2.31, sampler="ptq4arvg", model="mar_b"), result(3.0, "rtn", model="mar_b")]
    found = judge_results(rows)["mar_b"]
    assert (found.official, found.ptq4arvg) == (None, 2.31)
    assert str(found) == "refused: no full-precision row under sampler=official, it is not run"


def test_the_same_settings_under_another_name_open_the_gate() -> None:
    samplers = PRESETS["rar_b"].samplers
    assert samplers["official"] == samplers["ptq4arvg"]
    found = verdict(result(1.95, sampler="ptq4arvg"), result(3.0, "rtn"))
    assert (found.official, found.ptq4arvg, found.allowed) == (1.95, 1.95, True)
    changed = result(1.95, sampler="ptq4arvg", settings={"guidance_scale": 1.0})
    assert str(verdict(changed)).endswith("settings are not those of sampler=ptq4arvg")


def test_seeds_are_averaged() -> None:
    assert verdict(result(1.85), result(2.09)).official == pytest.approx(1.97)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (result(None), "its FID is not computed"),
        (result(1.95, images=10_000), "its FID is of 10,000 images, not of 50,000"),
        (result(1.95, extractor="lite0"), "its FID is not of Inception by experiments.evaluate"),
        (
            result(1.95, weights="ffff0000"),
            "its Inception weights are ffff0000, not the official 6726825d",
        ),
        (
            result(1.95, reference={"file": "a.npz", "images": 10_000}),
            "its reference is made of images",
        ),
        (result(1.95, reference=None), "its reference is made of images"),
        (
            result(1.95, settings={"guidance_scale": 4.0}),
            "its sampler settings are not those of sampler=official",
        ),
    ],
)
def test_rows_that_do_not_count(row: dict, reason: str) -> None:
    found = verdict(row)
    assert not found.allowed
    assert found.official is None
    assert str(found).startswith(f"refused: no full-precision row under sampler=official: {reason}")
    assert verdict(row, result(1.95)).allowed  # another row that does count


def test_a_run_without_this_evaluator_does_not_count() -> None:
    row = result(1.95)
    del row["provenance"]["evaluator"]
    assert "not of Inception by experiments.evaluate" in str(verdict(row))


def test_models_without_a_published_fid_or_known_images_have_no_verdict() -> None:
    unknown = result(1.0) | {"cell": None}
    assert judge_results([result(0.2, model="rar_twin"), unknown]) == {}


def test_what_may_be_said_of_quantized_cells_hangs_on_full_precision() -> None:
    quantized = result(4.2, "ptq4arvg")
    opened = judge_results([result(1.95), quantized])["rar_b"]
    shut = judge_results([result(2.5), quantized])["rar_b"]
    unknown = judge_results([quantized])["rar_b"]
    assert str(opened) == ALLOWED
    assert str(shut).startswith("refused: full precision has FID 2.50")
    assert str(unknown).startswith("refused: no full-precision row")


def test_models_are_judged_apart_and_in_the_order_of_the_presets() -> None:
    rows = [result(1.5, model="rar_xl"), result(9.0, model="rar_b"), result(3.6, model="var_d16")]
    found = judge_results(rows)
    assert list(found) == ["var_d16", "rar_b", "rar_xl"]
    assert [v.allowed for v in found.values()] == [True, False, True]
    lines = verdict_table(found).splitlines()
    assert lines[2] == "| `var_d16` | 3.55 | 3.60 | not run | reproduced allowed |"
    assert lines[3].startswith(
        "| `rar_b` | 1.95 | 9.00 | not run | refused: full precision has FID 9.00"
    )


def command(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> object:
    monkeypatch.setattr(sys, "argv", ["gate", *map(str, paths)])
    with pytest.raises(SystemExit) as caught:
        fp_gate.main()
    return caught.value.code


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fp = tmp_path / "fp.json"
    other = tmp_path / "other.json"
    fp.write_text(json.dumps(result(1.95)))
    other.write_text(json.dumps(result(4.0, model="rar_l")))
    assert command(monkeypatch, fp) == 0
    assert "| `rar_b` | 1.95 | 1.95 | not run | reproduced allowed |" in capsys.readouterr().out
    assert command(monkeypatch, fp, other) == 1
    assert "refused" in capsys.readouterr().out
    other.write_text(json.dumps(result(0.2, model="rar_twin")))
    assert command(monkeypatch, other) == "error: results: none is of a model with a published FID"
    other.write_text("{}")
    assert "is not a result" in command(monkeypatch, other)
    other.write_text('{"cell": {}, "metrics": {}, "provenance": {}}')
    assert "is not a result" in command(monkeypatch, other)
    assert "cannot be read" in command(monkeypatch, tmp_path / "none.json")
    other.write_text("<html>404</html>")
    assert "cannot be read (an HTML page" in command(monkeypatch, other)


def replaced(**fields: Any) -> str:
    return json.dumps(result(1.95) | fields)


NO_RESULTS = {
    "list": "[]",
    "list of names": '["cell", "metrics", "provenance"]',
    "number": "3",
    "nothing": "null",
    "text": '"cell metrics provenance"',
    "boolean": "true",
    "empty": "",
    "cut": '{"cell": {',
    "deep": "[" * 100_000,
    "bytes": b"\xff\xfe\x00",
    "nan": '{"cell": null, "metrics": {"fid": NaN}, "provenance": {"images": 1}}',
    "cell is a number": replaced(cell=3),
    "cell is a list": replaced(cell=["rar_b"]),
    "cell without a sampler": replaced(cell={"model": "rar_b", "method": "fp"}),
    "no such sampler": replaced(cell={"model": "rar_b", "method": "fp", "sampler": "none"}),
    "metrics is a list": replaced(metrics=[1.95]),
    "fid is a text": replaced(metrics={"fid": "1.95"}),
    "fid is a boolean": replaced(metrics={"fid": True}),
    "provenance is a text": replaced(provenance="images"),
    "images is a text": replaced(provenance={"images": "50000"}),
    "evaluator is a text": replaced(provenance={"images": 50000, "evaluator": "inception"}),
    "evaluator without weights": replaced(
        provenance={"images": 50000, "evaluator": {"extractor": "inception"}}
    ),
}


@pytest.mark.parametrize("kind", NO_RESULTS)
def test_what_is_no_result_is_refused_in_one_line_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    content = NO_RESULTS[kind]
    path = tmp_path / "other.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = command(monkeypatch, path)
    assert line.startswith(f"error: results: {path} cannot be read (")
    assert "\n" not in line
