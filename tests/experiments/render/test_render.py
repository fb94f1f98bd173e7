"""Results to sheets and text: what is measured, the paper's and not run stand apart, and nothing is
averaged in."""

from __future__ import annotations

import csv
import io
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.registry import tables
from experiments.render import formats, numbers, text
from experiments.render.files import shown_columns, table_files
from experiments.render.readme import committed_sheet, measured_on
from experiments.render.sheet import build_sheet
from experiments.store import results
from ptq.types import ConfigError
from tests.experiments.render.rendering import commit, result, results_of, rows_of


def lines_of(text_: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text_)))


def test_a_sheet_has_every_cell_in_the_order_of_the_registry() -> None:
    table = tables.find_table("rar")
    found = results_of("rar")
    sheet = build_sheet(table, "twin", found)
    expected = [
        (c.row, c.point["model"], c.point.get("quant"))
        for c in tables.table_cells(table, "twin", [0])
    ]
    assert sorted((x.row, x.model, str(x.quant)) for x in sheet.lines) == sorted(
        (r, m, str(q)) for r, m, q in expected
    )
    assert [x.row for x in sheet.lines if x.model == "rar_twin"][:2] == ["FP32", "SmoothQuant"]
    assert formats.quality_csv(sheet) == formats.quality_csv(
        build_sheet(table, "twin", found[::-1])
    )
    assert formats.format_markdown(text.arrange_runs(sheet)) == formats.format_markdown(
        text.arrange_runs(build_sheet(table, "twin", found[::-1]))
    )


def test_means_and_spreads_are_over_the_seeds_of_a_cell_alone() -> None:
    found = results_of("components", seeds=3)
    for line in build_sheet(tables.find_table("components"), "twin", found).lines:
        own = [
            r for r in found if (r["table"]["row"], r["cell"]["model"]) == (line.row, line.model)
        ]
        assert [r["seed"] for r in line.results] == [0, 1, 2]
        assert line.values("fid") == [r["metrics"]["fid"] for r in own]
        shown = numbers.format_values(line.values("fid"), 3)
        mean, deviation = (
            f([r["metrics"]["fid"] for r in own]) for f in (np.mean, lambda v: np.std(v, ddof=1))
        )
        assert shown == f"{mean:.3f} ± {deviation:.3f}"


def test_the_frames_of_a_sheet_say_what_its_lines_say() -> None:
    found = results_of("components", seeds=3)
    sheet = build_sheet(tables.find_table("components"), "twin", found)
    assert len(sheet.results) == len(found)
    seeds_of_lines = [r["seed"] for line in sheet.lines for r in line.results]
    assert sheet.results["seed"].tolist() == seeds_of_lines
    for name in ("fid", "kl", "calibration_s", "model_bytes", "sfid"):
        figures = sheet.over_seeds(name)
        for number, line in enumerate(sheet.lines):
            values = line.values(name)
            mean, deviation, seeds = figures.loc[number, ["mean", "std", "seeds"]]
            if values:  # to the last bit, whatever the order of the seeds
                assert mean == statistics.fmean(values)
                assert deviation == statistics.stdev(values)
                assert seeds == len(values) == 3
            else:  # the KL of full precision, and what nothing measured
                assert np.isnan([mean, deviation, seeds]).all()
                assert name == "sfid" or line.quant is None


def test_figures_of_too_few_images_are_left_out_and_one_line_says_so(
    tmp_path: Path,
) -> None:
    found = results_of("components", seeds=1)
    for entry in found:
        entry["provenance"]["images"] = 256
    table = tables.find_table("components")
    sheet = build_sheet(table, "twin", found)
    assert sheet.metrics() == ["kl", "nll"]
    printed = table_files(table, found, tmp_path, "twin", tmp_path / "runs")
    note = "256 images are too few for FID, IS, FID to FP, not shown."
    assert note in printed
    assert note in (tmp_path / "table.tex").read_text()
    measured = [line for line in lines_of((tmp_path / "table.csv").read_text()) if line["mean"]]
    assert {line["metric"] for line in measured} == {"kl", "nll"}

    found[0]["provenance"]["images"] = 257
    with pytest.raises(ConfigError, match="mixes evaluations of different sizes of rar_twin"):
        build_sheet(table, "twin", found)


def test_models_may_be_judged_by_different_sizes_and_the_table_names_each() -> None:
    table = tables.find_table("methods")
    found = results_of("methods", seeds=1, scale="natural")
    for entry in found:
        is_var = entry["cell"]["model"] == "var_natural"
        entry["provenance"] |= {"images": 2000, "sequences": 1000 if is_var else 2000}
    assert (
        "1 seed, 2,000 images and 2,000 held-out sequences per run of rar_natural, "
        "2,000 images and 1,000 held-out sequences per run of var_natural; "
    ) in measured_on(build_sheet(table, "natural", found))
    for entry in found:
        if entry["cell"]["model"] == "var_natural":
            entry["provenance"].pop("images")  # of a model without sizes none are claimed
    said = measured_on(build_sheet(table, "natural", found))
    assert "held-out sequences per run of rar_natural; " in said
    alike = [entry for entry in found if entry["cell"]["model"] == "rar_natural"]
    said = measured_on(build_sheet(table, "natural", alike))
    assert "1 seed, 2,000 images and 2,000 held-out sequences per run; " in said

    # figures show what the images of every model suffice for
    for entry in alike:
        entry["provenance"]["images"] = 256
    assert build_sheet(table, "natural", found).images == 256


def test_what_is_small_keeps_two_digits() -> None:
    assert numbers.format_values([0.00002, 0.00004], 4) == "(3.0 ± 1.4)e-5"
    assert [numbers.format_values([x], 4) for x in (0.00096, 0.0012, 0.0)] == [
        "9.6e-4",
        "0.0012",
        "0.0000",
    ]
    assert [numbers.format_values([x], d) for x, d in ((1.0, 0), (0.01, 2))] == ["1", "0.01"]


def test_lines_of_fewer_seeds_than_the_table_say_so() -> None:
    found = results_of("w4a8", seeds=3)
    model = found[0]["cell"]["model"]
    kept = [
        r
        for r in found
        if r["cell"]["model"] == model and r["seed"] != (1 if r["cell"]["quant"] else 2)
    ]
    sheet = build_sheet(
        tables.find_table("w4a8"), "twin", kept
    )  # two seeds a line, not the same two
    shown = text.arrange_runs(sheet)
    assert [line[-1] for line in rows_of(shown)] == ["2 of 3 seeds"] * len(sheet.done)
    assert measured_on(sheet).startswith("2 seeds, ")
    assert measured_on(build_sheet(tables.find_table("w4a8"), "twin", found[:-1])).startswith(
        "2 to 3 seeds, "
    )


def test_paper_and_own_figures_share_no_column_and_gaps_are_named() -> None:
    table = tables.find_table("rar")
    cells = [
        c
        for c in tables.table_cells(table, "twin", [0])
        if c.point["model"] == "rar_twin" and c.row != "OS+"
    ]
    sheet = build_sheet(table, "twin", [result(table, c) for c in cells])
    shown = text.arrange_runs(sheet)
    head = list(shown.cells)
    os_plus = next(line for line in rows_of(shown) if line[1:2] == ["OS+"])
    assert os_plus[head.index("Paper's model")] == "RAR-B"
    assert os_plus[head.index("Paper: FID")] != numbers.NOTHING
    assert os_plus[head.index("FID")] == os_plus[head.index("KL to FP")] == numbers.NOTHING
    assert os_plus[head.index("State")] == "not run"
    assert shown.note == "Not run: rar_twin_plain."
    by_place = {
        (x["model"], x["row"], x["quant"], x["metric"]): x
        for x in lines_of(formats.quality_csv(sheet))
    }
    ours = by_place["rar_twin", "OS+", "w6a6", "fid"]
    assert (ours["paper"], ours["mean"], ours["state"]) == ("40.14", "", "not run")
    measured = by_place["rar_twin", "PTQ4ARVG", "w6a6", "fid"]
    assert (measured["paper"], measured["paper_model"], measured["state"]) == (
        "5.13",
        "RAR-B",
        "measured",
    )
    kl = by_place["rar_twin", "PTQ4ARVG", "w6a6", "kl"]
    assert (kl["paper"], kl["paper_model"]) == ("", "")
    own = next(line for line in sheet.lines if (line.row, line.quant) == ("PTQ4ARVG", "w6a6"))
    assert float(kl["mean"]) == statistics.fmean(own.values("kl"))


def test_at_the_papers_scale_all_its_figures_stand_without_any_result() -> None:
    missing = 0
    for name in ("var", "rar", "par", "mar"):
        sheet = build_sheet(tables.find_table(name), "paper", [])
        shown = text.arrange_runs(sheet)
        assert all(line[-1] == "not run" for line in rows_of(shown))
        missing += sum(not line.paper for line in sheet.lines if line.row not in sheet.table.extra)
        assert len(rows_of(shown)) == len(sheet.lines)
    assert missing == 12  # QuaRot on VAR-d30 and RAR-XXL at two widths, and on the four PAR models


def test_quality_files_hold_no_times_and_costs_stand_in_their_own(tmp_path: Path) -> None:
    table = tables.find_table("methods")
    found = results_of("methods", seeds=1)
    printed = table_files(table, found, tmp_path / "a", "twin", tmp_path)
    assert "Calibration [s]" in printed  # the registry asks for it here
    for r in found:
        r["cost"] = {k: (v or 0) + 1 if k != "model_bytes" else v for k, v in r["cost"].items()}
    table_files(table, found, tmp_path / "b", "twin", tmp_path)
    for name in ("table.csv", "table.md", "table.tex"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for name in ("costs.csv", "costs.md"):
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("name", ["speed", "calibrate", "generate", "baselines", "outliers"])
def test_failed_measurements_are_shown_as_failed_and_not_as_not_run(
    name: str, tmp_path: Path
) -> None:
    table = tables.find_table(name)
    first, *_ = tables.table_cells(table, "twin", [0])
    place = {"name": name, "scale": "twin", "row": first.row, "point": dict(first.point)}
    failed = {
        "table": place,
        "seed": 0,
        "overrides": ["a=b"],
        "error": "out of luck",
        "traceback": "",
    }
    printed = table_files(table, [failed], tmp_path, "twin", tmp_path)
    bits = f" {first.point['quant'].upper()}" if "quant" in first.point else ""
    assert f"Failed: {first.point['model']}{bits} {first.row}: out of luck." in printed
    assert not re.search(rf"Not run: .*\b{first.point['model']}[,.]", printed)
    assert "out of luck" in (tmp_path / "table.md").read_text()


def test_columns_of_a_table_stand_for_the_figures_of_natural_images_too() -> None:
    found = results_of("methods", seeds=1, scale="natural")
    for entry in found:
        metrics = entry["metrics"]
        metrics |= {"lite0_fid": metrics["fid"], "fid": None, "lite0_fid2fp": 1.0, "fid2fp": None}
    sheet = build_sheet(tables.find_table("methods"), "natural", found)
    expected = ["kl", "nll", "lite0_fid", "lite0_fid2fp", "calibration_s"]
    assert shown_columns(sheet) == expected


def test_a_part_of_a_table_has_the_lines_that_were_picked(tmp_path: Path) -> None:
    table = tables.find_table("methods")
    picks = ["model=rar_twin", "quant=w6a6"]
    found = [result(table, cell) for cell in tables.table_cells(table, "twin", [0], picks)]
    part = table_files(table, found, tmp_path / "part", "twin", tmp_path, picks)
    assert part.count("\n| ") == len(found) + 1
    assert "not run" not in part.lower()
    assert "not run" in table_files(table, found, tmp_path / "whole", "twin", tmp_path)


def test_an_error_of_every_seed_is_said_once_and_rows_are_named() -> None:
    table = tables.find_table("baselines")
    fp, smooth = [
        c for c in tables.table_cells(table, "twin", [0]) if c.row in ("FP32", "SmoothQuant")
    ]
    place = {"name": table.name, "scale": "twin", "row": smooth.row, "point": dict(smooth.point)}
    failed = [{"table": place, "seed": seed, "error": "out of luck"} for seed in range(3)]
    note = text.arrange_settings(
        build_sheet(table, "twin", [{**result(table, fp), "detail": {"settings": {}}}, *failed])
    ).note
    assert note.startswith("Not run: rar_twin RepQ*, rar_twin OS+, ")
    assert note.endswith(". Failed: rar_twin W6A6 SmoothQuant: out of luck.")


def test_settings_are_words_and_full_precision_has_none() -> None:
    table = tables.find_table("baselines")
    found = [
        {**result(table, cell), "detail": {"settings": {}}}
        for cell in tables.table_cells(table, "twin", [0])
    ]
    found[1]["detail"] = {
        "settings": {"clip": {"on": True, "off": False, "rows": None}, "scope": [], "alpha": 0.5}
    }
    shown = text.arrange_settings(build_sheet(table, "twin", found))
    assert (list(shown.cells), shown.note) == (["Method", "clip", "scope", "alpha"], "")
    assert rows_of(shown) == [
        ["SmoothQuant", f"on yes, off no, rows {numbers.NOTHING}", "none", "0.5"]
    ]


def test_methods_refused_or_failed_in_calibration_have_rows_that_say_why() -> None:
    table = tables.find_table("calibrate")
    done = {
        "method": "rtn",
        "calibration_s": 1.0,
        "calibration_peak_mb": 9.0,
        "blocks_trained": None,
    }
    lines = [{"method": "gptq", "error": "NaN"}, {"method": "repq", "refused": "no <rows>"}, done]
    found = {**result(table, next(tables.table_cells(table, "twin", [0]))), "metrics": {}}

    def shown(*lines: dict[str, Any]) -> text.TextTable:
        detail = {"what": "calibrate", "rows": 4, "blocks": 2, "lines": lines}
        return text.arrange_speed(build_sheet(table, "twin", [{**found, "detail": detail}]))

    assert list(shown(done).cells)[-1] == "Scaled from"
    assert [len(line) for line in rows_of(shown(done))] == [5]
    whole = shown(*lines)
    assert (list(whole.cells)[1], list(whole.cells)[-1]) == ("Method", "State")
    states = [("RTN", "measured"), ("RepQ*", "refused: no <rows>"), ("RTN + GPTQ", "failed: NaN")]
    assert [(line[1], line[-1]) for line in rows_of(whole)] == states
    page = formats.format_html(whole)
    assert re.findall('<tr class="(.*?)">', page) == ["", "absent", "failed"]
    assert "refused: no &lt;rows&gt;" in page


def test_failed_cells_are_shown_and_results_of_no_cell_are_named(tmp_path: Path) -> None:
    table = tables.find_table("w4a8")
    found = results_of("w4a8", seeds=1)
    lost = found.pop()
    found.append({key: value for key, value in lost.items() if key != "table"})
    place = found[1]["table"]
    found[1] = {
        "table": place,
        "seed": 0,
        "overrides": ["a=b"],
        "error": "out of luck",
        "traceback": "",
    }
    found.append(result(table, tables.Cell("no such row", {"model": "rar_twin"}, 0, ())))
    printed = table_files(table, found, tmp_path, "twin", tmp_path)
    said = f"Failed: {place['point']['model']} {place['row']}: out of luck."
    assert printed.count(said) == (tmp_path / "table.md").read_text().count(said) == 1
    assert "| failed |" in printed
    assert "Ignored: w4a8: no such row" in printed
    run = lost["provenance"]["hash"]
    assert f"Ignored: w4a8: the result of run {run} does not say of which cell it is" in printed
    states = {
        (x["model"], x["row"]): x["state"] for x in lines_of((tmp_path / "table.csv").read_text())
    }
    assert states[place["point"]["model"], place["row"]] == "failed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r, "stands twice with seed 0"),
        (
            lambda r: {**r, "seed": 5, "provenance": {**r["provenance"], "images": 7}},
            "mixes evaluations of different",
        ),
        (lambda r: {**r, "seed": 5, "provenance": {"hash": "0"}}, "mixes evaluations of different"),
    ],
)
def test_results_that_make_no_table_are_refused(change: Any, message: str) -> None:
    found = results_of("w4a8", seeds=1)
    with pytest.raises(ConfigError, match=message):
        build_sheet(tables.find_table("w4a8"), "twin", [*found, change(found[3])])


def test_truncated_lost_or_old_results_are_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    table = tables.find_table("w4a8")
    found = results_of("w4a8", seeds=1)
    old = result(table, next(tables.table_cells(table, "twin", [9])), version=0)
    path, *_ = commit(tmp_path, "w4a8", [*found, old])
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([head, lines[0][:50], *lines[2:]]))
    sheet, ignored = committed_sheet("w4a8")
    assert len(sheet.done) == len(found) - 2
    assert ignored[0] == f"{path}: line 2: cannot be read (it is truncated or damaged)"
    assert "is of RESULT_VERSION 0" in ignored[1]


def test_markdown_and_latex_say_the_same_and_are_escaped(tmp_path: Path) -> None:
    table = tables.find_table("scaling")
    table_files(table, results_of("scaling"), tmp_path, "twin", tmp_path)
    latex = (tmp_path / "table.tex").read_text()
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    text = (tmp_path / "table.md").read_text()
    shown = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == len(shown) - 1  # without the rule
    assert "Results of revision" in latex
    assert "Results of revision" in text
    assert r"rar\_twin" in latex
    assert r"SmoothQuant-$>$RepQ*" in latex
    assert r"$\pm$" in latex
    assert "±" not in latex
    columns = {line.count(" & ") for line in rows}
    assert len(columns) == 1


def test_a_grid_beside_the_bits_is_part_of_a_rows_name() -> None:
    sheet = build_sheet(tables.find_table("calibration"), "twin", results_of("calibration"))
    names = [line[1] for line in rows_of(text.arrange_runs(sheet))]
    assert names[0] == "FP32"
    assert "PTQ4ARVG (calib=random, n=32)" in names


def test_measurements_are_listed_by_quantity() -> None:
    table = tables.find_table("approximation")
    found = []
    for cell in tables.table_cells(table, "twin", [0]):
        if cell.point["model"] == "rar_twin":
            parts = {"real": 2.0, "approx": 2.1, "bias": 0.05}
            metrics = {f"qkv.error_w.{k}": v for k, v in parts.items()}
            found.append({**result(table, cell), "metrics": metrics, "detail": {}})
    shown = text.arrange_sheet(build_sheet(table, "twin", found))
    assert list(shown.cells) == ["Quantity", "rar_twin"]
    assert rows_of(shown) == [["qkv.error_w: exact / approximate (bias)", "2 / 2.1 (5.0%)"]]
    other = {
        **found[0],
        "table": {**found[0]["table"], "point": {"model": "var_twin", "quant": "w6a6"}},
    }
    # of a kind that the first model lacks
    other["metrics"] = {f"fc1.error_w.{k}": v for k, v in parts.items()}
    both = text.arrange_sheet(build_sheet(table, "twin", [*found, other]))
    assert [line[1:] for line in rows_of(both)] == [
        ["2 / 2.1 (5.0%)", numbers.NOTHING],
        [numbers.NOTHING, "2 / 2.1 (5.0%)"],
    ]
    assert shown.note == "Not run: var_twin, par_twin, mar_twin."


@pytest.mark.parametrize(
    ("revisions", "said"),
    [
        (["0123456789ab"] * 3, "revision 01234567"),
        (["0123456789ab", "ab0123456789"] * 3, "revisions 01234567 (3), ab012345 (3)"),
        (["a" * 12, "b" * 12, "b" * 12], "revisions bbbbbbbb (2), aaaaaaaa (1)"),
        (["0123456789ab+", None], "revisions 01234567 with uncommitted changes (1), unknown (1)"),
    ],
)
def test_a_table_says_of_which_revisions_its_results_are(
    revisions: list[str | None], said: str, tmp_path: Path
) -> None:
    table = tables.find_table("w4a8")
    found = results_of("w4a8", seeds=1)[: len(revisions)]
    for result_, revision in zip(found, revisions, strict=True):
        result_["provenance"]["revision"] = revision
    text = table_files(table, found, tmp_path, "twin", tmp_path)
    assert text.endswith(f"Results of {said}.")
    assert f"Results of {said}." in (tmp_path / "table.md").read_text()
    assert measured_on(build_sheet(table, "twin", found)).endswith(f"; {said}.")
