"""Tables: the grid of cells, failures that do not stop the rest, and result blocks that are generated."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from experiments import render, table
from ptq.types import ConfigError
from tests.experiments.cells import ROOT, TINY

TABLES = sorted(p.stem for p in (table.CONF / "table").glob("*.yaml"))


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_valid_configs_and_no_two_cells_are_alike(name: str) -> None:
    cells = list(table.cells(table.read_table(name), [0, 1], []))
    assert len({tuple(c) for c in cells}) == len(cells)
    seen: set[tuple[str, str]] = set()
    for overrides in cells:  # those of seed 0 in which two overrides meet for the first time
        pairs = set(combinations(sorted(overrides), 2))
        if "seed=0" in overrides and not pairs <= seen:
            table.configure(overrides)
            seen |= pairs


def test_the_main_table_has_every_row_for_both_twins_at_both_widths() -> None:
    cells = [set(c) for c in table.cells(table.read_table("main"), [0, 1, 2], [])]
    assert len(cells) == 3 * (2 + 2 * 2 * 6)
    for row in ("rtn", "rtn_dynamic", "smoothquant", "stwq", "sq_stwq", "ptq4arvg"):
        for model in ("rar_twin", "rar_twin_plain"):
            for quant in ("w8a8", "w6a6"):
                wanted = {f"method={row}", f"model={model}", f"quant={quant}"}
                assert sum(wanted <= cell for cell in cells) == 3


def test_the_component_table_has_all_eight_combinations() -> None:
    cells = [c for c in table.cells(table.read_table("components"), [0], []) if "method=fp" not in c]
    configs = [table.configure(c) for c in cells]
    assert {(c.method.gps, c.method.stwq, c.calib.selector == "dgc") for c in configs} == {
        (g, s, d) for g in (False, True) for s in (False, True) for d in (False, True)
    }


def test_the_methods_table_has_every_recipe_on_every_twin_but_the_released_code_on_mar() -> None:
    recipes = {p.stem for p in (table.CONF / "method").glob("*.yaml")}
    cells = [set(c) for c in table.cells(table.read_table("methods"), [0], []) if "method=fp" not in c]
    assert {name for name in recipes if any(f"method={name}" in cell for cell in cells)} == recipes - {"fp"}
    assert len(cells) == 3 * (4 * (len(recipes) - 1) - 1)
    assert not any({"method=ptq4arvg_released", "model=mar_twin"} <= cell for cell in cells)
    assert any({"method=ptq4arvg_released", "model=par_twin", "quant=w4a8"} <= cell for cell in cells)


def test_cells_are_excluded_by_all_the_values_that_are_given() -> None:
    def names(*exclude: dict[str, object]) -> list[str]:
        grid = {"model": ["rar_twin"], "method.gps": [False, True]}
        chosen = table.Table("t", "T", ["fp", "rtn", "stwq"], grid, list(exclude))
        return [" ".join(o for o in c if o.startswith("method")) for c in table.cells(chosen, [0], [])]

    assert names({"method": "rtn", "method.gps": True}) == [
        "method=fp", "method=rtn method.gps=false", "method=stwq method.gps=false", "method=stwq method.gps=true"
    ]
    assert names({"method": "rtn"}, {"method.gps": False}) == ["method=fp", "method=stwq method.gps=true"]


@pytest.mark.parametrize(("field", "value", "message"), [
    ("exclude", [{"method": "nope"}], "exclude: {'method': 'nope'} matches no cell"),
    ("exclude", [{"model": "rar_twin"}], "exclude: {'model': 'rar_twin'} matches no cell"),
    ("exclude", [{}], "exclude: {} matches no cell"),
    ("columns", ["kl", "nope"], "columns: 'nope' is not one of kl, nll"),
])
def test_a_table_that_excludes_or_shows_what_is_not_there_is_refused(
    field: str, value: list, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        table.Table("t", "T", ["fp", "rtn"], {"quant": ["w6a6"]}, **{field: value})


def test_a_table_shows_the_columns_it_asks_for_and_costs_only_then() -> None:
    def result(method: str, seed: int, cost: float | None) -> dict:
        costs = {"calibration_s": cost, "calibration_peak_mb": cost, "sampling_s": 1.0, "model_bytes": 1}
        config = {"method": {"name": method}, "seed": seed}
        return {
            "cell": {"model": "m", "method": method, "quant": None if cost is None else "w6a6"}, "seed": seed,
            "metrics": {"kl": cost, "nll": 3.0, "fid": 1.0}, "cost": costs,
            "provenance": {"config": config, "images": 1},
        }

    results = [result("fp", 0, None), result("rtn", 0, 1.0), result("rtn", 1, 3.0)]
    asked = render.markdown(results, ["nll", "kl", "calibration_s", "calibration_peak_mb", "recall"]).splitlines()
    assert asked[0] == "| Bits | Method | NLL | KL to FP | Calibration [s] | Peak [MiB] |"
    assert asked[2] == "| 32/32 | FP32 | 3.0000 | – | – | – |"
    assert asked[3].endswith("| 2.0000 ± 1.4142 | 2.0 ± 1.4 | 2 ± 1 |")
    assert render.markdown(results).splitlines()[0] == "| Bits | Method | KL to FP | NLL | FID |"
    assert render.columns_of("methods") == table.read_table("methods").columns
    assert render.columns_of("main") is None


@pytest.mark.parametrize(("argument", "message"), [
    ("name=nope", "name: 'nope' is not one of"), ("seeds=3", "seeds: 3 is not a list"), ("seeds=[]", "seeds: [] is"),
    ("jobs=0", "jobs: 0 is not a positive"), ("publish=maybe", "publish: maybe is not one of"),
    ("quant.weights.bits=1", "bits: 1 is not"), ("eval=nope", "eval: 'nope' is not one of"),
])
def test_a_bad_argument_is_refused_in_one_line_before_anything_runs(
    argument: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["table", argument])
    with pytest.raises(SystemExit) as stopped:
        table.main()
    assert str(stopped.value).startswith("error: ")
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_a_failed_cell_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    tiny = [*TINY, f"runs={tmp_path}"]
    results = table.run_all(
        [["method=fp", *tiny], ["method=rtn", "model.weights=missing.safetensors", *tiny], ["method=stwq", *tiny]], 1
    )
    assert ["error" in r for r in results] == [False, True, False]
    assert "missing.safetensors" in results[1]["error"]
    assert "Traceback" in results[1]["traceback"]
    text = render.markdown(results)
    assert text.count("failed: method=rtn") == 1
    assert "STWQ alone" in text


def test_published_results_replace_the_former_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    result = {
        "cell": {"model": "m", "method": "rtn", "quant": "w6a6", "calib": "dgc"}, "seed": 1,
        "provenance": {"hash": "0123abcd"},
    }
    table.publish([result], "t")
    table.publish([{**result, "seed": 2}], "t")
    files = list((tmp_path / "t").iterdir())
    assert [f.name for f in files] == ["m-rtn-w6a6-dgc-s2-0123abcd.json"]
    assert json.loads(files[0].read_text())["seed"] == 2


def test_the_readme_shows_the_committed_results() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.render", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_several_seeds_show_their_mean_and_standard_deviation() -> None:
    import pandas as pd

    assert render.cell_text(pd.Series([1.0, 2.0, 3.0]), 2) == "2.00 ± 1.00"
    assert render.cell_text(pd.Series([1.5]), 1) == "1.5"
    assert render.cell_text(pd.Series([None]), 1) == "–"
