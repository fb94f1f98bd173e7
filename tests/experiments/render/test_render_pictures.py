"""Plots of tables, and images of runs side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Annotation, Text
from PIL import Image

from experiments.identity.places import save_identity
from experiments.identity.whole import whole_identity
from experiments.registry import tables
from experiments.render import analysis_plots, pictures, plots, text
from experiments.render.files import table_files
from experiments.render.sheet import build_sheet
from experiments.store import files
from tests.experiments.render.rendering import result, results_of, sample


@pytest.mark.parametrize("name", ["rar", "components", "calibration", "methods"])
def test_every_plot_is_a_readable_png_that_carries_its_sources(name: str, tmp_path: Path) -> None:
    sheet = build_sheet(tables.find_table(name), "twin", results_of(name))
    path = tmp_path / "plot.png"
    assert pictures.draw_plot(sheet, path)
    with Image.open(path) as picture:
        assert 500 < picture.width < 1600
        assert np.asarray(picture.convert("L")).std() > 5
    assert pictures.is_current(path, pictures.plot_source(sheet))
    other = results_of(name)
    other[-1]["metrics"]["kl"] += 0.1
    assert not pictures.is_current(
        path, pictures.plot_source(build_sheet(tables.find_table(name), "twin", other))
    )


def test_nothing_measured_gives_no_picture_and_removes_a_former_one(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    path.write_bytes(b"former")
    assert not pictures.draw_plot(build_sheet(tables.find_table("rar"), "twin", []), path)
    assert not path.exists()


def test_the_front_has_every_point_that_no_other_beats() -> None:
    draw = np.random.default_rng(0)
    points = [tuple(map(float, p)) for p in draw.integers(0, 30, (200, 2))]
    front = plots.pareto_front(pd.DataFrame(points, columns=["mib", "mean"]))
    kept = list(front.itertuples(index=False, name=None))
    expected = {
        p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)
    }
    assert kept == sorted(expected)


def test_bars_name_rows_that_were_not_run_or_failed() -> None:
    found = [r for r in results_of("rar", seeds=1) if r["table"]["row"] not in ("OS+", "QuaRot")]
    places = [r["table"] for r in results_of("rar", seeds=1) if r["table"]["row"] == "QuaRot"]
    sheet = build_sheet(
        tables.find_table("rar"),
        "twin",
        [*found, *({"table": p, "seed": 0, "error": "e"} for p in places)],
    )
    for axis in plots.draw_runs(sheet).axes:
        rows = [tick.get_text() for tick in axis.get_yticklabels()]
        said = {rows[int(t.get_position()[1])]: t.get_text() for t in axis.texts}
        assert said == {"OS+": "not run", "QuaRot": "failed"}
        assert "FP32" not in rows  # its KL is no figure


def test_measurements_have_pictures(tmp_path: Path) -> None:
    ranges = {"site": "s", "sinks": 1, "positions": [0, 1, 2], "ranges": [[9.0, 1, 2], [8.0, 1, 1]]}
    trials = {"kl": [0.1, 0.2, 0.15], "spread": 0.3}
    shapes = {
        "invariance": ({"qkv.position_share": 0.9}, {"qkv": ranges}),
        "perturbation": ({"kl": 0.1}, trials),
        "outliers": (
            {"channel_ratio": 8.0},
            {
                "channels": {"site": "s", "rms": [1.0, 8.0]},
                "tokens": {**ranges, "ranges": [9.0, 1.0, 2.0]},
            },
        ),
        "cross_terms": ({f"qkv.{k}": 0.1 for k in ("none", "smoothquant", "gps", "gps_cross")}, {}),
        "approximation": ({f"qkv.error_w.{k}": 0.1 for k in ("real", "approx", "bias")}, {}),
        "ordering": ({"qkv.scale_order": 0.9, "qkv.range_order": 0.9, "qkv.rows_close": 0.9}, {}),
        "speed": (
            {},
            {
                "what": "blocks",
                "rows": 4,
                "lines": [
                    {"variant": "fp32", "length": 8, "median_ms": 2.0, "peak_mb": None},
                ],
            },
        ),
        "calibrate": (
            {},
            {
                "what": "calibrate",
                "rows": 4,
                "blocks": 2,
                "lines": [
                    {
                        "method": "rtn",
                        "calibration_s": 1.0,
                        "calibration_peak_mb": 9.0,
                        "blocks_trained": None,
                    },
                    {
                        "method": "omniquant",
                        "calibration_s": 50.0,
                        "calibration_peak_mb": 9.0,
                        "blocks_trained": 1,
                    },
                    {"method": "repq", "refused": "no"},
                    {"method": "gptq", "error": "NaN"},
                ],
            },
        ),
        "sensitivity": (
            {"kl": 0.2, "kl_seen": 0.21, "kl_unseen": 0.19},
            {
                "alone": {"keys": 0.1, "fc2 inputs": 0.02, "blocks.0": 0.15},
                "left_out": {"keys": 0.1, "fc2 inputs": 0.18, "blocks.0": 0.05},
                "weight_bytes": {"keys": 0, "fc2 inputs": 0, "blocks.0": 80},
                "blocks": ["blocks.0"],
            },
        ),
        "generate": (
            {},
            {
                "what": "generate",
                "rows": 4,
                "lines": [
                    {
                        "variant": "bf16",
                        "seconds": 2.0,
                        "images_per_s": 2.0,
                        "peak_mb": 8.0,
                        "model_mb": 3.0,
                    },
                ],
            },
        ),
    }
    for name, (metrics, detail) in shapes.items():
        table = tables.find_table(name)
        found = [
            {
                **result(table, next(tables.table_cells(table, "twin", [0]))),
                "metrics": metrics,
                "detail": detail,
            }
        ]
        table_files(table, found, tmp_path / name, "twin", tmp_path)
        with Image.open(tmp_path / name / "plot.png") as picture:
            assert len(picture.getcolors()) > 20  # not an empty axis
        assert (tmp_path / name / "table.md").read_text().count("\n| ") >= 2


@pytest.mark.parametrize(
    ("biases", "scale"),
    [
        ({"a": 0.001, "b": -2.4, "c": 0.0}, "log"),
        ({"a": 0.0, "b": 0.0}, "linear"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_biases_are_drawn_without_sign_on_a_logarithmic_axis(
    biases: dict[str, float], scale: str
) -> None:
    table = tables.find_table("approximation")
    found = result(table, next(tables.table_cells(table, "twin", [0])))
    found |= {
        "metrics": {f"qkv.{name}.bias": value for name, value in biases.items()},
        "detail": {},
    }
    figure = analysis_plots.draw_analysis(build_sheet(table, "twin", [found]))
    figure.draw_without_rendering()
    (axis,) = figure.axes
    assert axis.get_yscale() == scale
    assert [bar.get_height() for bar in axis.patches] == pytest.approx(
        [100 * abs(v) for v in biases.values()]
    )
    low, high = axis.get_ylim()
    assert all(low < abs(100 * v) < high for v in biases.values() if v)


@pytest.mark.parametrize(("seeds", "said"), [(1, "GPS"), (2, "GPS (a line per seed)")])
def test_lines_of_gps_are_said_to_be_of_seeds_where_there_are_several(
    seeds: int, said: str
) -> None:
    table = tables.find_table("perturbation")
    detail = {"kl": [0.1, 0.2], "spread": 0.3}
    cell = next(tables.table_cells(table, "twin", [0]))
    found = [{**result(table, cell), "seed": seed, "detail": detail} for seed in range(seeds)]
    (axis,) = analysis_plots.draw_analysis(build_sheet(table, "twin", found)).axes
    assert said in [words.get_text() for words in axis.get_legend().get_texts()]


def test_names_of_the_front_stand_apart() -> None:
    found = [
        r
        for r in results_of("methods", seeds=1)
        if r["cell"]["model"] == "rar_twin" and r["cell"]["quant"]
    ]
    for n, r in enumerate(found):  # a front that is flat but for its last point
        r["metrics"]["kl"] = 10 - 0.01 * min(n, 5)
        r["cost"]["model_bytes"] = int(5e6 * 1.03 ** min(n, 6))
    found[-1]["metrics"]["kl"] = 0.001
    figure = plots.draw_runs(build_sheet(tables.find_table("methods"), "twin", found))
    figure.draw_without_rendering()
    names = [name for name in figure.axes[0].texts if isinstance(name, Annotation)]
    boxes = [Text.get_window_extent(name) for name in names]
    assert len(boxes) == 7
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_the_samples_of_runs_stand_side_by_side(tmp_path: Path) -> None:
    found = results_of("w4a8", seeds=1)
    runs = tmp_path / "runs"
    sample(runs, found)
    table_files(tables.find_table("w4a8"), found, tmp_path / "out", "twin", runs)
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.width > 3 * 320
    table_files(tables.find_table("w4a8"), found, tmp_path / "out", "twin", tmp_path / "elsewhere")
    assert not (tmp_path / "out" / "samples.png").exists()


def test_samples_of_another_identity_under_the_same_hash_are_not_shown(tmp_path: Path) -> None:
    (found,) = results_of("w4a8", seeds=1)[:1]
    origin = found["provenance"]
    other = tmp_path / f"a-{origin['hash']}"
    save_identity(other, whole_identity(origin["identity"], "cpu"))
    files.save_arrays({"arr_0": np.zeros((1, 2, 2, 3), np.uint8)}, other / "samples.npz")
    assert pictures.read_samples(tmp_path, origin["hash"], origin["identity_digest"]) is None
    own = tmp_path / f"b.01234567-{origin['hash']}"
    save_identity(own, whole_identity(origin["identity"], "cuda"))
    files.save_arrays({"arr_0": np.ones((1, 2, 2, 3), np.uint8)}, own / "samples.npz")
    images = pictures.read_samples(tmp_path, origin["hash"], origin["identity_digest"])
    assert images is not None
    assert images.max() == 1


def test_a_gallery_has_a_column_per_model_and_a_row_per_method(tmp_path: Path) -> None:
    found = results_of("gallery", seeds=1)
    table = tables.find_table("gallery")
    runs = tmp_path / "runs"
    sample(runs, found)
    sheet = build_sheet(table, "twin", found)
    assert len(pictures.gallery_runs(sheet)) == len(table.rows) * len(table.models["twin"])
    whole = tmp_path / "whole.png"
    pictures.draw_samples(sheet, whole, runs)
    assert pictures.is_current(whole, pictures.samples_source(sheet))
    with Image.open(whole) as picture:
        assert picture.mode == "L"
        assert picture.width > 2 * picture.height
    shutil.rmtree(next(runs.iterdir()))
    pictures.draw_samples(sheet, whole, runs)  # a panel stays empty
    assert not pictures.is_current(whole, pictures.samples_source(sheet))


def test_a_gallery_of_natural_images_has_their_colours(tmp_path: Path) -> None:
    found = results_of("gallery", seeds=1, scale="natural")
    coloured = np.zeros((30, 64, 64, 3), np.uint8)
    coloured[..., 0] = 255
    for entry in found:
        folder = tmp_path / f"x-{entry['provenance']['hash']}"
        folder.mkdir()
        np.savez(folder / "samples.npz", arr_0=coloured)
    sheet = build_sheet(tables.find_table("gallery"), "natural", found)
    pictures.draw_samples(sheet, tmp_path / "whole.png", tmp_path)
    with Image.open(tmp_path / "whole.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors()}
    assert (255, 0, 0) in colours


def test_images_that_stand_side_by_side_are_of_one_seed() -> None:
    found = results_of("w4a8", seeds=2)
    first = found[0]["cell"]["model"]
    kept = [
        r for r in found if (r["seed"], r["table"]["row"]) not in ((0, "FP32"), (1, "SVDQuant"))
    ]
    of_seed = [r for r in kept if r["seed"] == 1 and r["cell"]["model"] == first]
    wanted = {r["table"]["row"]: r["provenance"]["hash"] for r in of_seed}
    assert pictures.compared_runs(build_sheet(tables.find_table("w4a8"), "twin", kept)) == wanted
    assert set(wanted) == {"FP32", "OmniQuant", "PTQ4ARVG", "STAQ"}


def test_speed_is_counted_from_bf16_of_before_and_of_now() -> None:
    table = tables.find_table("generate")
    entries = [
        {"variant": "bf16", "batch": 1, "seconds": 0.5, "images_per_s": 2.0},
        {"variant": "bf16", "batch": 4, "seconds": 1.5, "images_per_s": 2.7, "speedup": 1.3333},
        {"variant": "int8_stwq", "batch": 4, "seconds": 1.0, "images_per_s": 4.0, "speedup": 2.0},
    ]
    for entry in entries:
        entry |= {"peak_mb": 8.0, "model_mb": 3.0}
    for entry in entries[1:]:
        entry["baseline"] = 2.0
    detail = {"what": "generate", "rows": 4, "lines": entries}
    found = result(table, next(tables.table_cells(table, "twin", [0]))) | {"detail": detail}
    sheet = build_sheet(table, "twin", [found])
    cells = text.arrange_sheet(sheet).cells
    assert cells["Images"].tolist() == ["1", "4", "4"]
    assert cells["× BF16 before"].tolist() == ["–", "1.33", "2.00"]
    assert cells["× BF16"].tolist() == ["1.00", "1.00", "1.50"]
    (axis,) = analysis_plots.draw_analysis(sheet).axes
    labels = [words.get_text() for words in axis.texts]
    assert labels == ["1.5 (1.33×, 1.00×)", "1 (2.00×, 1.50×)"]
