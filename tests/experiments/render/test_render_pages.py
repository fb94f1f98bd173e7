"""The report, and the generated blocks and committed sample grids of the project's pages."""

from __future__ import annotations

import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from experiments.plotting.grids import image_grid
from experiments.registry import tables as registry
from experiments.render import __main__ as command
from experiments.render import claims, html, pictures, readme, report
from experiments.render.sheet import build_sheet
from experiments.store import results
from experiments.store.files import write_json
from ptq.types import ConfigError
from tests.experiments.render.rendering import commit, result, results_of, sample


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README in a folder of its own, with results of one table committed beside it."""
    root = tmp_path / "results"
    monkeypatch.setattr(results, "ROOT", root)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "FIGURES", root / "figures")
    monkeypatch.setattr(readme, "SAMPLES", root / "samples")
    path = tmp_path / "README.md"
    monkeypatch.setattr(readme, "PAGES", (path,))
    monkeypatch.setattr(readme, "whole_pages", dict)
    commit(root, "w4a8", results_of("w4a8"))
    (root / "samples").mkdir()
    made_of = pictures.samples_source(
        build_sheet(registry.find_table("w4a8"), "twin", results_of("w4a8"))
    )
    image_grid(
        {"FP32": np.zeros((3, 1, 32, 32), np.uint8)}, root / "samples" / "w4a8.png", source=made_of
    )
    blocks = "<!-- results:w4a8 -->\nold\n<!-- end -->\nbetween\n<!-- figure:w4a8 -->\n<!-- end -->"
    path.write_text(f"before\n{blocks}\nafter\n")
    return path


def test_a_block_of_speeds_shows_the_lengths_and_variants_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = registry.find_table("speed")
    lines = [
        {"variant": v, "length": n, "median_ms": 2.0, "peak_mb": None}
        for n in (8, 16)
        for v in ("fp32", "int8")
    ]
    found = {
        **result(table, next(registry.table_cells(table, "twin", [0]))),
        "metrics": {},
        "provenance": {},
    }
    found["detail"] = {"what": "blocks", "rows": 4, "lines": lines}
    monkeypatch.setattr(readme, "committed_results", lambda name: ([found], []))
    block = readme.table_block("speed", {"length": "16", "variant": "int8"})
    assert [line.split("|")[2:4] for line in block.splitlines() if line.startswith("| `")] == [
        [" 16 ", " `int8` "]
    ]
    with pytest.raises(ConfigError, match="^length: '9' is not one of 8, 16"):
        readme.table_block("speed", {"length": "9"})
    with pytest.raises(ConfigError, match="^length: '16' is not one of"):
        readme.table_block("rar", {"length": "16"})


def test_sample_grids_are_kept_when_whole_and_used_with_their_results(
    page: Path, tmp_path: Path
) -> None:
    found = results_of("w4a8")
    runs = tmp_path / "runs"
    kept = readme.SAMPLES / "w4a8.png"
    shown = [r for r in found if r["cell"]["model"] == found[0]["cell"]["model"] and r["seed"] == 0]

    def made(name: str) -> Path:
        report.render_tables([registry.find_table("w4a8")], tmp_path / name, runs, "")
        return tmp_path / name / "w4a8" / "samples.png"

    kept.unlink()
    sample(runs, shown[:-1])
    assert made("part").exists()
    assert not kept.exists()
    sample(runs, shown[-1:])
    assert made("whole").read_bytes() == kept.read_bytes()
    shutil.rmtree(runs)
    assert made("elsewhere").read_bytes() == kept.read_bytes()
    key = shown[0]["provenance"]["hash"]
    commit(results.ROOT, "w4a8", [r for r in found if r["provenance"]["hash"] != key])
    assert not made("other").exists()


def test_blocks_are_written_checked_and_found_stale_when_a_result_changes(page: Path) -> None:
    assert len(readme.find_stale()) == 2
    readme.update_pages()
    text = page.read_text()
    assert text.startswith("before\n<!-- results:w4a8 -->\n| Model |")
    assert "2 seeds, 2,000 images and 50 held-out sequences per run; a device, torch 2.0;" in text
    words = r"W4A8\. Lowest KL to FP: var_twin \w+ \(W4A8\) [\d.]+; .*"
    assert re.search(rf"!\[{words}\]\(results/figures/w4a8.png\)", text)
    assert text.endswith("\nafter\n")
    assert readme.find_stale() == []
    readme.update_pages()
    assert page.read_text() == text
    next((results.ROOT / "w4a8").glob("*.jsonl")).unlink()
    assert [line.split(":")[0] for line in readme.find_stale()] == [
        "README.md",
        "results/figures/w4a8.png",
        "results/samples/w4a8.png",  # of a model that is gone
    ]


def test_a_sample_grid_that_is_missing_or_of_other_runs_is_stale(page: Path) -> None:
    readme.update_pages()
    grid = readme.SAMPLES / "w4a8.png"
    image_grid({"FP32": np.zeros((3, 1, 32, 32), np.uint8)}, grid, source="other")
    (line,) = readme.find_stale()
    assert line.startswith("results/samples/w4a8.png: the grid is missing or of other runs")
    grid.unlink()
    assert readme.find_stale() == [line]


def test_a_sample_grid_that_belongs_to_no_table_is_stale(page: Path) -> None:
    readme.update_pages()
    shutil.copy(readme.SAMPLES / "w4a8.png", readme.SAMPLES / "rar.png")
    assert readme.find_stale() == [
        "results/samples/rar.png: the grid is of no table that has results to compare"
    ]


def test_a_block_shows_the_lines_and_columns_that_its_marker_asks_for(page: Path) -> None:
    page.write_text(
        "<!-- results:w4a8 model=rar_twin,par_twin columns=kl,calibration_s -->\n<!-- end -->\n"
    )
    readme.update_pages()
    lines = page.read_text().splitlines()
    assert lines[1].endswith("| KL to FP | Calibration [s] |")
    assert {line.split("`")[1] for line in lines[3:] if line.startswith("| `")} == {
        "rar_twin",
        "par_twin",
    }


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        (
            "<!-- results:nope -->\n<!-- end -->",
            "results:nope: name: 'nope' is not one of reproduce",
        ),
        (
            "<!-- results:w4a8 model=nope -->\n<!-- end -->",
            "model: 'nope' is not one of par_twin, rar_twin, var_twin",
        ),
        ("<!-- results:w4a8 columns=nope -->\n<!-- end -->", "columns: 'nope' is not one of kl"),
        (
            "<!-- figure:w4a8 model=nope -->\n<!-- end -->",
            "figure:w4a8: model: 'nope' is not one of par_twin, rar_twin, var_twin",
        ),
        (
            "<!-- samples:w4a8 model=rar_twin -->\n<!-- end -->",
            "samples takes no settings, but has model=rar_twin",
        ),
        (
            "<!-- figure:w4a8 plot=nope -->\n<!-- end -->",
            "figure:w4a8: plot: 'nope' is not one of None, bars, ranking",
        ),
        (
            "<!-- compare:w4a8 metric=nope -->\n<!-- end -->",
            "compare:w4a8: metric: 'nope' is not one of kl",
        ),
        (
            "<!-- official:nope -->\n<!-- end -->",
            "official:nope: official: 'nope' is not one of figures, origin",
        ),
        ("a <!-- quote:nope --><!-- end -->", "quote: 'nope' is not one of methods"),
        (
            "- <!-- quote:methods --><!-- end --> methods",
            "quote:methods begins a line, which Markdown shows as HTML",
        ),
        ("<!-- results:w4a8 -->\nno end", "1 markers of generated blocks, but 0 whole blocks"),
    ],
)
def test_a_marker_that_names_what_is_not_there_is_refused(
    page: Path, marker: str, message: str
) -> None:
    page.write_text(marker)
    with pytest.raises(ConfigError, match=re.escape(message)):
        readme.update_pages()
    assert page.read_text() == marker


def test_a_table_without_results_says_so(page: Path) -> None:
    page.write_text(
        "<!-- results:rar -->\n| old | 1 |\n<!-- end -->\n<!-- figure:rar -->\n<!-- end -->\n"
    )
    readme.update_pages()
    assert page.read_text().count("no result of this version is committed") == 2
    assert "old" not in page.read_text()


def test_rows_that_nobody_ran_are_counted_and_not_listed(page: Path) -> None:
    found = [r for r in results_of("w4a8") if r["table"]["row"] != "STAQ"]
    commit(results.ROOT, "w4a8", found)
    page.write_text("<!-- results:w4a8 -->\n<!-- end -->\n")
    readme.update_pages()
    text = page.read_text()
    assert "| STAQ |" not in text
    assert "\nRows that are not run yet: 3 at W4A8. All quantized rows: " in text


def test_a_picture_of_a_part_has_a_file_of_its_own(page: Path) -> None:
    page.write_text("<!-- figure:w4a8 plot=ranking model=rar_twin -->\n<!-- end -->\n")
    readme.update_pages()
    assert "Lowest KL to FP: rar_twin " in page.read_text()
    assert (readme.FIGURES / "w4a8-ranking-rar_twin.png").is_file()
    assert readme.find_stale() == []


def test_the_list_of_tables_names_every_table_of_the_registry(page: Path) -> None:
    page.write_text("<!-- registry -->\n<!-- end -->\n")
    readme.update_pages()
    listed = re.findall(r"^\| `(\w+)` \|", page.read_text(), re.MULTILINE)
    assert listed == [*registry.load_tables(), "all"]


def test_a_cell_takes_its_share_of_the_device() -> None:
    costs = [
        {"cell_s": 60.0, "workers": 4},
        {"cell_s": 90.0, "workers": 1},
        {"cell_s": 5.0},
        {"cell_s": None},
    ]
    assert readme.device_minutes({"cost": c} for c in costs) == "1.8 (2 of 4)"
    assert readme.device_minutes({"cost": c} for c in costs[2:]) == "–"
    assert readme.device_minutes([{"cost": {"cell_s": 0.0, "workers": 2}}]) == "0.0"


def test_pages_that_are_generated_as_a_whole_are_written_and_checked(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme.update_pages()
    card = page.with_name("CARDS.md")
    card.write_text("old")
    monkeypatch.setattr(readme, "whole_pages", lambda: {card: "new"})
    assert readme.find_stale() == ["CARDS.md: its generated text is not current"]
    readme.update_pages()
    assert (card.read_text(), readme.find_stale()) == ("new", [])


def test_the_pages_of_the_project_are_current() -> None:
    assert readme.find_stale() == []


def test_check_exits_with_a_line_for_every_page_that_is_stale(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["render", "--check"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert str(stopped.value).startswith(
        "error: README.md: its generated text is not current; run python"
    )
    monkeypatch.setattr(sys, "argv", ["render", "--readme"])
    command.main()
    monkeypatch.setattr(sys, "argv", ["render", "--check"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 0


class Links(HTMLParser):
    """What a page refers to, and its anchors; unclosed tags raise an error."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.open: list[str] = []
        self.alternatives: list[str] = []  # of pictures
        self.tags: list[tuple[str | None, ...]] = []  # by which the page filters

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [found[k] for k in ("href", "src") if found.get(k)]
        self.anchors |= {found["id"]} if found.get("id") else set()
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "img":
            self.alternatives.append(found.get("alt") or "")
        if "data-model" in found:
            self.tags.append(tuple(found[f"data-{key}"] for key in ("model", "bits", "method")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_file_that_needs_no_other(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bad = results.ROOT / "w4a8" / "x.jsonl"
    bad.write_text("{")
    tables = [registry.find_table("w4a8"), registry.find_table("rar")]
    sections = report.render_tables(tables, tmp_path / "out", tmp_path / "runs", "")
    whole = html.format_page(sections, with_claims=False)
    parser = Links()
    parser.feed(whole)
    assert parser.open == []
    assert all(
        link.startswith("data:image/png;base64,") or link[1:] in parser.anchors
        for link in parser.links
    )
    assert {"w4a8", "rar", "rar-paper", "untried"} <= parser.anchors
    assert all(len(words) > 20 for words in parser.alternatives)
    assert ("rar_twin", "W4A8", "PTQ4ARVG") in parser.tags
    assert whole.count("<details><summary>Not run: 3 tables</summary>") == 1
    assert "<code>python -m experiments.table name=rar scale=paper</code>" in whole
    assert whole.count(", released models") == 2
    assert whole.count(registry.find_table("w4a8").expected) == 1  # which is of the twins
    assert whole.index('id="w4a8"') < whole.index('id="rar"')  # what is measured comes first
    assert str(bad) in whole
    assert len(whole) < 2**20


def test_the_report_of_all_opens_with_pictures_then_methods(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "evaluate_claims", list)
    readme.FIGURES.mkdir()
    commit(results.ROOT, "methods", results_of("methods"))
    names = ("w4a8", "methods", "gallery", "sensitivity", "generate")
    tables = [registry.find_table(name) for name in names]
    sections = report.render_tables(tables, tmp_path / "out", tmp_path / "runs", "")
    image_grid(
        {"one": np.zeros((3, 1, 32, 32), np.uint8)}, readme.FIGURES / "methods-ranking-w6a6.png"
    )
    whole = html.format_page(sections, with_claims=True)
    parser = Links()
    parser.feed(whole)
    assert parser.open == []
    assert whole.count("<figure>") == 1  # of five that are there, if all is measured
    assert "<b>STAQ, our own, leaves " in whole
    anchors = ("<figure>", 'id="bars"', 'id="pareto"', 'id="w4a8"', 'id="claims"', 'id="untried"')
    places = [whole.index(anchor) for anchor in anchors]
    assert places == sorted(places)
    # a bar, a point and a line of the table
    assert parser.tags.count(("mar_twin", "W6A6", "STAQ")) == 4
    assert re.search(r"<title>STAQ, W6A6: KL to FP 0\.\d+, 4\.77 MiB</title>", whole)


def test_the_page_of_results_opens_with_the_same_pictures(page: Path) -> None:
    page.write_text("<!-- overview -->\n<!-- end -->\n")
    commit(results.ROOT, "methods", results_of("methods"))
    readme.update_pages()
    text = page.read_text()
    assert text.startswith("<!-- overview -->\n**2. STAQ, our own, leaves ")
    words = r"Lowest KL to FP: var_twin \w+ \(W6A6\) [^\]]*"  # of the bits that are drawn
    assert re.search(rf"{words}\]\(results/figures/methods-ranking-w6a6.png\)", text)
    assert "**1." not in text  # whose table has no results here


def test_the_report_says_why_a_cell_failed(tmp_path: Path) -> None:
    found = results_of("w4a8", seeds=1)
    place = found[1]["table"]
    found[1] = {
        "table": place,
        "seed": 0,
        "overrides": ["a=b"],
        "error": "out of <luck>",
        "traceback": "",
    }
    whole = html.format_section(
        html.Section(build_sheet(registry.find_table("w4a8"), "twin", found), tmp_path)
    )
    assert f"Failed: {place['point']['model']} {place['row']}: out of &lt;luck&gt;." in whole


def test_the_command_renders_what_ran_here_and_leaves_out_the_rest(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = page.read_text()
    found = results_of("w4a8", seeds=1)
    local = tmp_path / "tables"
    found[0]["provenance"]["identity"]["version"] = 0
    (local / "w4a8").mkdir(parents=True)
    write_json(local / "w4a8" / "results.json", found)
    monkeypatch.setattr(sys, "argv", ["render", f"from={local}", f"out={tmp_path / 'out'}"])
    command.main()
    assert "entry 0 is of RESULT_VERSION 0, this code's is" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["index.html", "w4a8"]
    assert page.read_text() == before
    monkeypatch.setattr(
        sys, "argv", ["render", f"from={tmp_path / 'nowhere'}", f"out={tmp_path / 'none'}"]
    )
    with pytest.raises(
        SystemExit, match="error: from: .*nowhere has no results of reproduce, main"
    ):
        command.main()
    assert not (tmp_path / "none").exists()


def test_readme_alone_is_rewritten_whatever_tables_are_named(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["render", "--readme", "name=rar"])
    command.main()
    assert readme.find_stale() == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("name=nope", "name: 'nope' is not one of"),
        ("nope", "nope: no such option, allowed are name, out, runs, from, readme, check"),
        ("where=x", "where: no such option, allowed are name"),
        ("--check=1", "check: '1' is not a boolean, allowed are true and false"),
        ("--chek", "chek: no such option, allowed are name, "),
        ("name", "name: its value is missing, give name=VALUE"),
    ],
)
def test_a_bad_argument_is_refused_in_one_line(
    argument: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["render", argument, f"out={tmp_path / 'out'}"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert str(stopped.value).startswith(f"error: {message}")
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()


def test_a_claim_with_many_figures_shows_some_and_folds_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claim = claims.Claim(
        "n", "It <holds>", "partly", [f"place {i}" for i in range(9)], False, ["control 0"]
    )
    monkeypatch.setattr(claims, "evaluate_claims", lambda: [claim])
    section = html.claims_section()
    assert "It &lt;holds&gt;" in section
    assert "place 3<details><summary>and 5 more</summary>place 4<br>" in section
    assert section.count("<details>") == 1
