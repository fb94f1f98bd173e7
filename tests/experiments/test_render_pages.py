"""Pictures, the report and the generated blocks of the project's pages."""

from __future__ import annotations

import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Annotation, Text
from PIL import Image

from experiments import claims, registry, results
from experiments.figures import image_grid
from experiments.provenance import write_json
from experiments.render import __main__ as command
from experiments.render import measured, pictures, plots, readme, report, table_files
from experiments.render.sheet import build
from ptq.types import ConfigError
from tests.experiments.rendering import commit, result, results_of


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
    made_of = pictures.samples_source(build(registry.table("w4a8"), "twin", results_of("w4a8")))
    image_grid({"FP32": np.zeros((3, 1, 32, 32), np.uint8)}, root / "samples" / "w4a8.png", source=made_of)
    blocks = "<!-- results:w4a8 -->\nold\n<!-- end -->\nbetween\n<!-- figure:w4a8 -->\n<!-- end -->"
    path.write_text(f"before\n{blocks}\nafter\n")
    return path


@pytest.mark.parametrize("name", ["rar", "components", "calibration", "methods"])
def test_every_kind_of_plot_is_a_readable_png_that_carries_what_it_was_made_of(name: str, tmp_path: Path) -> None:
    sheet = build(registry.table(name), "twin", results_of(name))
    path = tmp_path / "plot.png"
    assert pictures.plot(sheet, path)
    with Image.open(path) as picture:
        assert 500 < picture.width < 1600
        assert np.asarray(picture.convert("L")).std() > 5
    assert pictures.current(path, pictures.source(sheet))
    other = results_of(name)
    other[-1]["metrics"]["kl"] += 0.1
    assert not pictures.current(path, pictures.source(build(registry.table(name), "twin", other)))


def test_nothing_measured_gives_no_picture_and_removes_a_former_one(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    path.write_bytes(b"former")
    assert not pictures.plot(build(registry.table("rar"), "twin", []), path)
    assert not path.exists()


def test_the_front_has_every_point_that_no_other_beats() -> None:
    draw = np.random.default_rng(0)
    points = [tuple(map(float, p)) for p in draw.integers(0, 30, (200, 2))]
    kept = [points[i] for i in plots.front(points)]
    expected = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert kept == sorted(expected)


def test_bars_name_rows_that_were_not_run_or_failed() -> None:
    found = [r for r in results_of("rar", seeds=1) if r["table"]["row"] not in ("OS+", "QuaRot")]
    places = [r["table"] for r in results_of("rar", seeds=1) if r["table"]["row"] == "QuaRot"]
    sheet = build(registry.table("rar"), "twin", [*found, *({"table": p, "seed": 0, "error": "e"} for p in places)])
    for axis in plots.draw(sheet).axes:
        rows = [tick.get_text() for tick in axis.get_yticklabels()]
        said = {rows[int(t.get_position()[1])]: t.get_text() for t in axis.texts}
        assert said == {"OS+": "not run", "QuaRot": "failed"}
        assert "FP32" not in rows  # its KL is no figure


def test_measurements_have_pictures(tmp_path: Path) -> None:
    ranges = {"site": "s", "sinks": 1, "positions": [0, 1, 2], "ranges": [[9.0, 1, 2], [8.0, 1, 1]]}
    trials = {"kl": [0.1, 0.2, 0.15], "spread": 0.3}
    shapes = {
        "invariance": ({"qkv.position_share": 0.9}, {"qkv": ranges}), "perturbation": ({"kl": 0.1}, trials),
        "outliers": ({"channel_ratio": 8.0}, {"channels": {"site": "s", "rms": [1.0, 8.0]},
                                              "tokens": {**ranges, "ranges": [9.0, 1.0, 2.0]}}),
        "cross_terms": ({f"qkv.{k}": 0.1 for k in ("none", "smoothquant", "gps", "gps_cross")}, {}),
        "approximation": ({f"qkv.error_w.{k}": 0.1 for k in ("real", "approx", "bias")}, {}),
        "ordering": ({"qkv.scale_order": 0.9, "qkv.range_order": 0.9, "qkv.rows_close": 0.9}, {}),
        "speed": ({}, {"what": "blocks", "rows": 4, "lines": [
            {"variant": "fp32", "length": 8, "median_ms": 2.0, "peak_mb": None},
        ]}),
        "calibrate": ({}, {"what": "calibrate", "rows": 4, "blocks": 2, "lines": [
            {"method": "rtn", "calibration_s": 1.0, "calibration_peak_mb": 9.0, "blocks_trained": None},
            {"method": "omniquant", "calibration_s": 50.0, "calibration_peak_mb": 9.0, "blocks_trained": 1},
            {"method": "repq", "refused": "no"}, {"method": "gptq", "error": "NaN"},
        ]}),
        "generate": ({}, {"what": "generate", "rows": 4, "lines": [
            {"variant": "bf16", "seconds": 2.0, "images_per_s": 2.0, "peak_mb": 8.0, "model_mb": 3.0},
        ]}),
    }
    for name, (metrics, detail) in shapes.items():
        table = registry.table(name)
        found = [{**result(table, next(registry.cells(table, "twin", [0]))), "metrics": metrics, "detail": detail}]
        table_files(table, found, tmp_path / name, "twin", tmp_path)
        assert (tmp_path / name / "plot.png").stat().st_size > 5000
        assert (tmp_path / name / "table.md").read_text().count("\n| ") >= 2


@pytest.mark.parametrize(("biases", "scale"), [
    ({"a": 0.001, "b": -2.4, "c": 0.0}, "log"), ({"a": 0.0, "b": 0.0}, "linear"),
])
@pytest.mark.filterwarnings("error")
def test_biases_are_drawn_without_sign_on_a_logarithmic_axis(biases: dict[str, float], scale: str) -> None:
    table = registry.table("approximation")
    found = result(table, next(registry.cells(table, "twin", [0])))
    found |= {"metrics": {f"qkv.{name}.bias": value for name, value in biases.items()}, "detail": {}}
    figure = measured.draw(build(table, "twin", [found]))
    figure.draw_without_rendering()
    axis, = figure.axes
    assert axis.get_yscale() == scale
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([100 * abs(v) for v in biases.values()])
    low, high = axis.get_ylim()
    assert all(low < abs(100 * v) < high for v in biases.values() if v)


@pytest.mark.parametrize(("seeds", "said"), [(1, "GPS"), (2, "GPS (a line per seed)")])
def test_lines_of_gps_are_said_to_be_of_seeds_where_there_are_several(seeds: int, said: str) -> None:
    table = registry.table("perturbation")
    detail = {"kl": [0.1, 0.2], "spread": 0.3}
    cell = next(registry.cells(table, "twin", [0]))
    found = [{**result(table, cell), "seed": seed, "detail": detail} for seed in range(seeds)]
    axis, = measured.draw(build(table, "twin", found)).axes
    assert said in [words.get_text() for words in axis.get_legend().get_texts()]


def test_names_of_the_front_stand_apart() -> None:
    found = [r for r in results_of("methods", seeds=1) if r["cell"]["model"] == "rar_twin" and r["cell"]["quant"]]
    for n, r in enumerate(found):  # a front that is flat but for its last point
        r["metrics"]["kl"], r["cost"]["model_bytes"] = 10 - 0.01 * min(n, 5), int(5e6 * 1.03**min(n, 6))
    found[-1]["metrics"]["kl"] = 0.001
    figure = plots.draw(build(registry.table("methods"), "twin", found))
    figure.draw_without_rendering()
    names = [name for name in figure.axes[0].texts if isinstance(name, Annotation)]
    boxes = [Text.get_window_extent(name) for name in names]
    assert len(boxes) == 7
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_a_block_of_speeds_shows_the_lengths_and_variants_that_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    table = registry.table("speed")
    lines = [{"variant": v, "length": n, "median_ms": 2.0, "peak_mb": None} for n in (8, 16) for v in ("fp32", "int8")]
    found = {**result(table, next(registry.cells(table, "twin", [0]))), "metrics": {}, "provenance": {}}
    found["detail"] = {"what": "blocks", "rows": 4, "lines": lines}
    monkeypatch.setattr(readme.results, "committed", lambda name: ([found], []))
    block = readme.table_block("speed", {"length": "16", "variant": "int8"})
    assert [line.split("|")[2:4] for line in block.splitlines() if line.startswith("| `")] == [[" 16 ", " `int8` "]]
    with pytest.raises(ConfigError, match="^length: '9' is not one of 8, 16"):
        readme.table_block("speed", {"length": "9"})
    with pytest.raises(ConfigError, match="^length: '16' is not one of"):
        readme.table_block("rar", {"length": "16"})


def sample(runs: Path, found: list[dict[str, Any]]) -> None:
    """Noise in place of the samples of runs."""
    noise = np.random.default_rng(0).integers(0, 255, (30, 32, 32, 3), dtype=np.uint8)
    for r in found:
        folder = runs / f"x-{r['provenance']['hash']}"
        folder.mkdir(parents=True)
        np.savez(folder / "samples.npz", arr_0=noise)


def test_the_samples_of_runs_stand_side_by_side(tmp_path: Path) -> None:
    found, runs = results_of("w4a8", seeds=1), tmp_path / "runs"
    sample(runs, found)
    table_files(registry.table("w4a8"), found, tmp_path / "out", "twin", runs)
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.width > 3 * 320
    table_files(registry.table("w4a8"), found, tmp_path / "out", "twin", tmp_path / "elsewhere")
    assert not (tmp_path / "out" / "samples.png").exists()


def test_images_that_stand_side_by_side_are_of_one_seed() -> None:
    found = results_of("w4a8", seeds=2)
    first = found[0]["cell"]["model"]
    kept = [r for r in found if (r["seed"], r["table"]["row"]) not in ((0, "FP32"), (1, "SVDQuant"))]
    of_seed = [r for r in kept if r["seed"] == 1 and r["cell"]["model"] == first]
    wanted = {r["table"]["row"]: r["provenance"]["hash"] for r in of_seed}
    assert pictures.compared(build(registry.table("w4a8"), "twin", kept)) == wanted
    assert set(wanted) == {"FP32", "OmniQuant", "PTQ4ARVG"}


def test_sample_grids_are_kept_when_whole_and_used_while_they_are_of_the_results(page: Path, tmp_path: Path) -> None:
    found, runs, kept = results_of("w4a8"), tmp_path / "runs", readme.SAMPLES / "w4a8.png"
    shown = [r for r in found if r["cell"]["model"] == found[0]["cell"]["model"] and r["seed"] == 0]

    def made(name: str) -> Path:
        command.render([registry.table("w4a8")], tmp_path / name, runs, "")
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
    next((results.ROOT / "w4a8").glob(f"*-{key}.json")).unlink()
    assert not made("other").exists()


def test_blocks_are_written_checked_and_found_stale_when_a_result_changes(page: Path) -> None:
    assert len(readme.stale()) == 2
    readme.update()
    text = page.read_text()
    assert text.startswith("before\n<!-- results:w4a8 -->\n| Model |")
    assert "2 seeds, 100 images and 50 held-out sequences per run; a device, torch 2.0." in text
    assert "![W4A8](results/figures/w4a8.png)" in text
    assert text.endswith("\nafter\n")
    assert readme.stale() == []
    readme.update()
    assert page.read_text() == text
    next((results.ROOT / "w4a8").glob("*.json")).unlink()
    assert [line.split(":")[0] for line in readme.stale()] == ["README.md", "results/figures/w4a8.png"]


def test_a_sample_grid_that_is_missing_or_of_other_runs_is_stale(page: Path) -> None:
    readme.update()
    grid = readme.SAMPLES / "w4a8.png"
    image_grid({"FP32": np.zeros((3, 1, 32, 32), np.uint8)}, grid, source="other")
    line, = readme.stale()
    assert line.startswith("results/samples/w4a8.png: the grid is missing or of other runs")
    grid.unlink()
    assert readme.stale() == [line]


def test_a_block_shows_the_lines_and_columns_that_its_marker_asks_for(page: Path) -> None:
    page.write_text("<!-- results:w4a8 model=rar_twin,par_twin columns=kl,calibration_s -->\n<!-- end -->\n")
    readme.update()
    lines = page.read_text().splitlines()
    assert lines[1].endswith("| KL to FP | Calibration [s] |")
    assert {line.split("`")[1] for line in lines[3:] if line.startswith("| `")} == {"rar_twin", "par_twin"}


@pytest.mark.parametrize(("marker", "message"), [
    ("<!-- results:nope -->\n<!-- end -->", "results:nope: name: 'nope' is not one of reproduce"),
    ("<!-- results:w4a8 model=nope -->\n<!-- end -->", "model: 'nope' is not one of par_twin, rar_twin, var_twin"),
    ("<!-- results:w4a8 columns=nope -->\n<!-- end -->", "columns: 'nope' is not one of kl"),
    ("<!-- figure:w4a8 model=rar_twin -->\n<!-- end -->", "figure takes no settings, but has model=rar_twin"),
    ("<!-- results:w4a8 -->\nno end", "1 markers of generated blocks, but 0 whole blocks"),
])
def test_a_marker_that_names_what_is_not_there_is_refused(page: Path, marker: str, message: str) -> None:
    page.write_text(marker)
    with pytest.raises(ConfigError, match=re.escape(message)):
        readme.update()
    assert page.read_text() == marker


def test_a_table_without_results_says_so(page: Path) -> None:
    page.write_text("<!-- results:rar -->\n| old | 1 |\n<!-- end -->\n<!-- figure:rar -->\n<!-- end -->\n")
    readme.update()
    assert page.read_text().count("no result of this version is committed") == 2
    assert "old" not in page.read_text()


def test_the_list_of_tables_names_every_table_of_the_registry(page: Path) -> None:
    page.write_text("<!-- registry -->\n<!-- end -->\n")
    readme.update()
    listed = re.findall(r"^\| `(\w+)` \|", page.read_text(), re.MULTILINE)
    assert listed == [*registry.tables(), "all"]


def test_a_cell_takes_its_share_of_the_device() -> None:
    costs = [{"cell_s": 60.0, "workers": 4}, {"cell_s": 90.0, "workers": 1}, {"cell_s": 5.0}, {"cell_s": None}]
    assert readme.minutes({"cost": c} for c in costs) == "1.8 (2 of 4)"
    assert readme.minutes({"cost": c} for c in costs[2:]) == "–"
    assert readme.minutes([{"cost": {"cell_s": 0.0, "workers": 2}}]) == "0.0"


def test_pages_that_are_generated_as_a_whole_are_written_and_checked(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme.update()
    card = page.with_name("CARDS.md")
    card.write_text("old")
    monkeypatch.setattr(readme, "whole_pages", lambda: {card: "new"})
    assert readme.stale() == ["CARDS.md: its generated text is not current"]
    readme.update()
    assert (card.read_text(), readme.stale()) == ("new", [])


def test_the_pages_of_the_project_are_current() -> None:
    assert readme.stale() == []


def test_check_exits_with_a_line_for_every_page_that_is_stale(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["render", "--check"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert str(stopped.value).startswith("error: README.md: its generated text is not current; run python")
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

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [found[k] for k in ("href", "src") if found.get(k)]
        self.anchors |= {found["id"]} if found.get("id") else set()
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_file_that_needs_no_other(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = results.ROOT / "w4a8" / "x-s0-00000000.json"
    bad.write_text("{")
    tables = [registry.table("w4a8"), registry.table("rar")]
    sections = command.render(tables, tmp_path / "out", tmp_path / "runs", "")
    whole = report.page(sections, with_claims=False)
    parser = Links()
    parser.feed(whole)
    assert parser.open == []
    assert all(link.startswith("data:image/png;base64,") or link[1:] in parser.anchors for link in parser.links)
    assert {"w4a8", "rar", "rar-paper"} <= parser.anchors
    assert whole.count(", released models") == 2
    assert whole.count(registry.table("w4a8").expected) == 1  # which is of the twins
    assert whole.index('id="w4a8"') < whole.index('id="rar"')  # what is measured comes first
    assert str(bad) in whole
    assert len(whole) < 2**20


def test_the_report_says_why_a_cell_failed(tmp_path: Path) -> None:
    found = results_of("w4a8", seeds=1)
    place = found[1]["table"]
    found[1] = {"table": place, "seed": 0, "overrides": ["a=b"], "error": "out of <luck>", "traceback": ""}
    whole = report.section(report.Section(build(registry.table("w4a8"), "twin", found), tmp_path))
    assert f"Failed: {place['point']['model']} {place['row']}: out of &lt;luck&gt;." in whole


def test_the_command_renders_tables_that_ran_here_and_leaves_out_what_does_not_count(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before, found, local = page.read_text(), results_of("w4a8", seeds=1), tmp_path / "tables"
    found[0]["provenance"]["identity"]["version"] = 0
    (local / "w4a8").mkdir(parents=True)
    write_json(local / "w4a8" / "results.json", found)
    monkeypatch.setattr(sys, "argv", ["render", f"from={local}", f"out={tmp_path / 'out'}"])
    command.main()
    assert "entry 0 is of RESULT_VERSION 0, this code's is" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["index.html", "w4a8"]
    assert page.read_text() == before
    monkeypatch.setattr(sys, "argv", ["render", f"from={tmp_path / 'nowhere'}", f"out={tmp_path / 'none'}"])
    with pytest.raises(SystemExit, match="error: from: .*nowhere has no results of reproduce, main"):
        command.main()
    assert not (tmp_path / "none").exists()


def test_readme_alone_is_rewritten_whatever_tables_are_named(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["render", "--readme", "name=rar"])
    command.main()
    assert readme.stale() == []


@pytest.mark.parametrize(("argument", "message"), [
    ("name=nope", "name: 'nope' is not one of"), ("nope", "argument: 'nope' is not one of"),
    ("where=x", "argument: 'where' is not one of"), ("--check=1", "argument: '--check' is not one of name"),
    ("name", "argument: 'name' is not one of --check"),
])
def test_a_bad_argument_is_refused_in_one_line(
    argument: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["render", argument, f"out={tmp_path / 'out'}"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert str(stopped.value).startswith(f"error: {message}")
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()


def test_a_claim_with_many_figures_shows_some_and_folds_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = claims.Claim("n", "It <holds>", "partly", [f"place {i}" for i in range(9)], False, ["control 0"])
    monkeypatch.setattr(claims, "evaluate", lambda: [claim])
    section = report.claims_section()
    assert "It &lt;holds&gt;" in section
    assert "place 3<details><summary>and 5 more</summary>place 4<br>" in section
    assert section.count("<details>") == 1
