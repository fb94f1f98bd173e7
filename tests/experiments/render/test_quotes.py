"""Figures inside sentences, tables over models, and the comparison with the official code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.registry import tables as registry
from experiments.render import official, quotes, readme
from experiments.render.comparisons import arrange_groups, compare_models, format_loss
from experiments.render.sheet import Sheet, build_sheet
from experiments.store import results
from experiments.store.files import write_sealed
from ptq.files import DamagedFile
from ptq.spec import ConfigError
from tests.experiments.render.rendering import commit, result, results_of, rows_of


def sheet_of(name: str, kl: dict[str, float]) -> Sheet:
    """A table whose rows have these divergences at every model and width."""
    found = [r for r in results_of(name, seeds=2) if r["table"]["row"] in kl]
    for entry in found:
        # the mean over both seeds is the figure
        entry["metrics"]["kl"] = kl[entry["table"]["row"]] * (0.5 + entry["seed"])
    return build_sheet(registry.find_table(name), "twin", found)


def generation(*reports: list[dict[str, object]]) -> Sheet:
    """The table of generation with reports of these lines, all of its first model."""
    table = registry.find_table("generate")
    cells = list(registry.table_cells(table, "twin", [0]))
    of_model = [cell for cell in cells if cell.point == cells[0].point]
    results = []
    for cell, entries in zip(of_model, reports):
        detail = {"what": "generate", "rows": 100, "lines": entries}
        results.append({**result(table, cell), "metrics": {}, "provenance": {}, "detail": detail})
    return build_sheet(table, "twin", results)


def test_a_share_is_of_means_and_spans_all_models() -> None:
    sheet = sheet_of("methods", {"STAQ": 0.01, "PTQ4ARVG": 0.04})
    assert quotes.quote_figure("staq-share", lambda _: sheet) == "25 %"
    halved = []
    for line in sheet.lines:
        if line.row == "STAQ" and line.model == "mar_twin":
            metrics = [{**r, "metrics": {"kl": 0.004}} for r in line.results]
            line = replace(line, results=tuple(metrics))
        halved.append(line)
    other = Sheet(sheet.table, "twin", tuple(halved))
    assert quotes.quote_figure("staq-share", lambda _: other) == "10 to 25 %"


def test_natural_images_have_shares_of_their_own() -> None:
    found = results_of("methods", seeds=1, scale="natural")
    for entry in found:
        kl = {"STAQ": 0.01, "PTQ4ARVG": 0.04}.get(entry["table"]["row"], 1.0)
        is_var = entry["cell"]["model"] == "var_natural"
        entry["metrics"]["kl"] = 0.02 if is_var and kl == 0.01 else kl
    sheet = build_sheet(registry.find_table("methods"), "natural", found)
    asked = []

    def load_sheet(name: str) -> Sheet:
        asked.append(name)
        return sheet

    assert quotes.quote_figure("natural-staq-w6a6", load_sheet) == "25 to 50 %"
    assert quotes.quote_figure("rar-natural-svdquant-w4a8", load_sheet) == "10000 %"
    assert quotes.quote_figure("var-natural-svdquant-w4a8", load_sheet) == "5000 %"
    assert set(asked) == {"methods-natural"}


def test_what_was_not_measured_is_said_so() -> None:
    empty = build_sheet(registry.find_table("methods"), "twin", [])
    assert quotes.quote_figure("staq-share", lambda _: empty) == "not run"
    part = sheet_of("methods", {"STAQ": 0.01})
    assert quotes.quote_figure("staq-share", lambda _: part) == "not run"
    no_times = build_sheet(registry.find_table("generate"), "twin", [])
    assert quotes.quote_figure("int8-times", lambda _: no_times) == "not run"


def test_times_are_of_the_largest_batch() -> None:
    lines = [
        {"variant": "bf16", "batch": 100, "seconds": 0.6, "peak_mb": 400.0},
        {"variant": "int8_stwq_paper", "batch": 100, "seconds": 0.4, "peak_mb": 100.0},
        {"variant": "bf16", "batch": 1, "seconds": 9.0, "peak_mb": 1.0},
    ]
    sheet = generation(lines)
    assert quotes.quote_figure("int8-times", lambda _: sheet) == "1.50"
    assert quotes.quote_figure("int8-memory", lambda _: sheet) == "25 %"


@pytest.mark.parametrize("name", sorted(quotes.QUOTES))
def test_every_figure_is_there_and_on_a_page(name: str) -> None:
    pages = "".join(page.read_text() for page in readme.PAGES)
    assert f"<!-- quote:{name} -->" in pages


def test_the_best_of_every_model_is_bold() -> None:
    sheet = sheet_of("w4a8", {"SVDQuant": 0.02, "PTQ4ARVG": 0.01})
    table = compare_models(sheet, "kl")
    assert list(table.cells) == ["Method", "`var_twin`", "`rar_twin`", "`par_twin`"]
    assert rows_of(table) == [
        ["SVDQuant", "0.0200", "0.0200", "0.0200"],
        ["PTQ4ARVG", "**0.0100**", "**0.0100**", "**0.0100**"],
    ]
    # of the inception score more is better
    scores = compare_models(sheet, "is")
    assert "**8.00**" in rows_of(scores)[0]


def test_a_mean_of_fewer_seeds_than_others_says_so() -> None:
    full = sheet_of("w4a8", {"SVDQuant": 0.02, "PTQ4ARVG": 0.01})
    found = [r for line in full.done for r in line.results]
    kept = [r for r in found if (r["cell"]["model"], r["seed"]) != ("rar_twin", 1)]
    table = compare_models(build_sheet(full.table, "twin", kept), "kl")
    # the first seed has half of the mean
    assert rows_of(table) == [
        ["SVDQuant", "0.0200", "0.0100 (1)", "0.0200"],
        ["PTQ4ARVG", "**0.0100**", "**0.0050** (1)", "**0.0100**"],
    ]


def test_what_methods_need_stands_beside_them() -> None:
    switches = {
        "SVDQuant": {"svd": True, "dynamic": True},
        "PTQ4ARVG": {"stwq": True},
        "STAQ": {"stwq": True, "softmax": "numerators"},
    }
    found = [r for r in results_of("w4a8", seeds=1) if r["table"]["row"] in switches]
    figures = {"SVDQuant": 0.01, "PTQ4ARVG": 0.03, "STAQ": 0.02}
    for entry in found:
        row = entry["table"]["row"]
        entry["metrics"]["kl"] = figures[row]
        entry["provenance"]["identity"] = {"method": {"name": row, **switches[row]}}
    sheet = build_sheet(registry.find_table("w4a8"), "twin", found)
    table = compare_models(sheet, "kl", with_extras=True)
    # those that need nothing come first, and the best of them has the star
    assert [row[:3] for row in rows_of(table)] == [
        ["PTQ4ARVG", "–", "0.0300"],
        ["STAQ", "–", "0.0200 ★"],
        ["SVDQuant", "dynamic ranges, 16-bit branch", "**0.0100**"],
    ]


def sensitivity_sheet() -> Sheet:
    """The table of sensitivities with one model: three kinds of quantizers and a block."""
    table = registry.find_table("sensitivity")
    cell = next(cell for cell in registry.table_cells(table, "twin", [0]) if cell.row == "STAQ")
    losses = {"attention weights": 0.003, "qkv weights": 0.001, "keys": 0.002, "blocks.0": 0.009}
    found = {**result(table, cell), "provenance": {}}
    found["metrics"] = {"kl": 0.01, "kl_seen": 0.0100, "kl_unseen": 0.0098}
    found["detail"] = {"alone": losses, "blocks": ["blocks.0"]}
    return build_sheet(table, "twin", [found])


def test_the_largest_groups_are_kinds_and_not_blocks() -> None:
    (row,) = rows_of(arrange_groups(sensitivity_sheet()))
    assert row[2:] == [
        "0.0100",
        "attention weights 0.0030, keys 0.0020, qkv weights 0.0010",
        "10 %",  # attention weights are an activation
    ]


def test_a_variant_is_compared_with_bf16_of_its_own_report() -> None:
    sheet = generation(
        [{"variant": "bf16", "seconds": 3.0}, {"variant": "int8_stwq_paper", "seconds": 2.0}],
        [{"variant": "bf16", "seconds": 8.0}, {"variant": "int8_staq_paper", "seconds": 4.0}],
    )
    own = quotes.compare_generation("rar_b", "int8_staq_paper", "seconds", ".2f", share=False)
    assert own(lambda _: sheet) == "2.00"
    names = ("int8_staq_paper", "int8_stwq_paper")
    across = quotes.compare_variants("generate", *names, "seconds", ["rar_b"])
    assert across(lambda _: sheet) == "2.00"
    missing = quotes.compare_variants("generate", *names, "seconds", ["rar_b", "rar_xl"])
    assert missing(lambda _: sheet) == "not run"


def test_small_losses_keep_their_digits() -> None:
    assert format_loss(0.00123) == "0.0012"
    assert format_loss(0.000312) == "3.1e-4"
    assert format_loss(0.000996) == "1.0e-3"


def test_unseen_sequences_are_compared_with_those_that_chose() -> None:
    sheet = sensitivity_sheet()
    assert quotes.quote_figure("staq-unseen", lambda _: sheet) == "2.0 %"
    empty = build_sheet(sheet.table, "twin", [])
    assert quotes.quote_figure("staq-unseen", lambda _: empty) == "not run"


def test_bit_widths_are_compared_apart() -> None:
    sheet = sheet_of("main", {"STAQ": 0.01, "RTN": 0.02})
    table = compare_models(sheet, "kl")
    assert [row[:3] for row in rows_of(table)] == [
        ["W8A8", "RTN", "0.0200"],
        ["W8A8", "STAQ", "**0.0100**"],
        ["W6A6", "RTN", "0.0200"],
        ["W6A6", "STAQ", "**0.0100**"],
    ]


def test_rows_with_spaces_are_picked_in_quotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    commit(tmp_path, "main", results_of("main"))
    page = tmp_path / "page.md"
    page.write_text('<!-- compare:main quant=w8a8 row="STAQ,STWQ alone" -->\n<!-- end -->')
    lines = readme.rewrite_page(page).splitlines()
    assert [line.split(" | ")[0] for line in lines[3:5]] == ["| STWQ alone", "| STAQ"]
    assert lines[6].startswith("All quantized rows: `calib=dgc`, `scope=paper`. 2 seeds.")


# --- the official code


def test_the_record_gives_figures_and_what_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "record.json"
    monkeypatch.setattr(official, "RECORD", record)
    times = {"ours": 2.0, "official": 30.0}
    entry = {"family": "RAR", "quant": "w6a6", "kl": None, "quantizing_s": times}
    write_sealed(record, {"revision": "abc", "models": [entry]})
    assert "| RAR, W6A6 | Quantizing [s] | 2 | 30 | 15 |" in official.official_block("figures")
    assert "KL to full precision" not in official.official_block("figures")
    assert "| Date | not recorded |" in official.official_block("origin")
    assert quotes.quote_figure("official-times", quotes_need_no_sheet) == "15"
    with pytest.raises(ConfigError, match="^family: 'VAR' is not one of RAR"):
        quotes.quote_figure("official-var-kl", quotes_need_no_sheet)


def quotes_need_no_sheet(name: str) -> Sheet:
    raise AssertionError(name)


def test_a_record_that_was_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "record.json"
    record.write_text(official.RECORD.read_text().replace("115.6", "215.6"))
    monkeypatch.setattr(official, "RECORD", record)
    with pytest.raises(DamagedFile, match="its content has the digest"):
        official.official_block("figures")


def test_a_range_names_one_number_once() -> None:
    assert quotes.format_range([1.0, 1.001], ".1f") == "1.0"
    assert quotes.format_range([3.0, 1.0], ".0f", " %") == "1 to 3 %"
    assert quotes.format_range([], ".0f") == "not run"
