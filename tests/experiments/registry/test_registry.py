"""The registry: every cell has a config, every number of the paper has a cell, sweeps have the same
grids."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.config.compose import CONF, configure
from experiments.registry import labels, paper, sweeps, tables
from experiments.registry.seeds import parse_seeds
from experiments.registry.tables import Cell, Table
from experiments.render import claims
from ptq.types import ConfigError

TABLES = tuple(tables.load_tables())


def small(**fields: Any) -> Table:
    values = {
        "rows": {"FP32": "method=fp", "RTN": "method=rtn", "STWQ": "method=stwq"},
        "cost": "",
        "expected": "",
        "title": "T",
        "models": {"twin": ["rar_twin"]},
        "grid": {"quant": ["w8a8", "w6a6"]},
    }
    return tables.parse_entry("t", values | fields)


def of_paper() -> list[tuple[str, Cell]]:
    """The cells for which the paper has a number, with their tables."""
    found = []
    for name, entry in tables.load_tables().items():
        for cell in tables.table_cells(entry, "paper", [0]) if "paper" in entry.models else ():
            at = cell.point["model"], cell.row, cell.point.get("quant")
            if "is" in paper.paper_figures(entry, *at):
                found.append((name, cell))
    return found


def test_every_number_of_the_paper_has_one_cell() -> None:
    lines = list(csv.DictReader((paper.PAPER / "quality.csv").open()))
    assert len(lines) == 229
    cells = of_paper()
    wanted = {(r["table"], r["model"], r["bits"], r["method"]) for r in lines}
    found = {
        (
            source,
            labels.PAPER_MODELS[c.point["model"]],
            str(c.point.get("quant", "fp")).upper(),
            "fp" if c.row == "FP32" else c.row,
        )
        for name, c in cells
        for source in tables.find_table(name).paper
    }
    assert found == wanted
    assert len(cells) == 229


def test_the_config_of_every_cell_of_the_paper_says_what_its_row_says() -> None:
    for name, cell in of_paper():
        config = configure(list(cell.overrides))
        assert (config.model.name, config.eval.n, config.sampler.name) == (
            cell.point["model"],
            50000,
            "ptq4arvg",
        )
        if cell.row == "FP32":
            assert not config.method.quantized
            continue
        assert config.quant.name == cell.point["quant"]
        assert config.calib.n == 128
        ours = cell.row in ("PTQ4ARVG", "GPS", "+GPS+STWQ+DGC") or name == "scaling"
        assert config.calib.selector == ("dgc" if ours else "random")
        assert config.scope.name == ("released" if name == "mar" else "paper")


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_whole_and_no_two_cells_are_alike(name: str) -> None:
    entry = tables.find_table(name)
    assert set(entry.claims) <= set(claims.STATEMENTS)
    assert entry.title
    assert entry.expected
    assert entry.cost
    models = {m for scale in entry.models.values() for m in scale}
    assert models <= {p.stem for p in (CONF / "model").glob("*.yaml")}
    cells = list(tables.table_cells(entry, "twin", [0, 1]))
    assert len({c.overrides for c in cells}) == len(cells)
    seen: set[str] = set()
    for cell in cells if entry.what != "speed" else ():
        # each value once
        if cell.seed == 0 and not {cell.row, *map(str, cell.point.values())} <= seen:
            configure(list(cell.overrides))
            seen |= {cell.row, *map(str, cell.point.values())}


def test_every_statement_of_the_paper_has_a_table() -> None:
    assert {c for entry in tables.load_tables().values() for c in entry.claims} == set(
        claims.STATEMENTS
    )


def test_the_components_table_has_all_eight_combinations() -> None:
    chosen = tables.table_cells(tables.find_table("components"), "twin", [0], ["model=rar_twin"])
    cells = [c for c in chosen if c.row != "FP32"]
    found = {}
    for cell in cells:
        config = configure(list(cell.overrides))
        found[cell.row] = config.method.gps, config.method.stwq, config.calib.selector == "dgc"
        parts = set(cell.row.removeprefix("+").split("+"))
        assert found[cell.row] == tuple(part in parts for part in ("GPS", "STWQ", "DGC"))
        assert config.method.shift == config.method.gps
    assert set(found.values()) == set(itertools.product((False, True), repeat=3))


def methods_of(*names: str) -> set[str]:
    """The recipes that tables have rows of."""
    rows = [row for name in names for row in tables.find_table(name).rows.values()]
    return {row.split()[0].removeprefix("method=") for row in rows}


def test_every_recipe_has_a_row() -> None:
    # a recipe of one's own has none
    assert methods_of("methods", "weight_only", "rivals") == set(labels.METHOD_ORDER)


@pytest.mark.parametrize("name", ["w4a4", "weight_only", "kv", "fp8", "rivals"])
def test_tables_of_other_numbers_compose_for_released_models(name: str) -> None:
    entry = tables.find_table(name)
    places: set[tuple[str, ...]] = set()
    for cell in tables.table_cells(entry, "paper", [0]):
        place = (cell.row, *(str(value) for key, value in cell.point.items() if key != "model"))
        if place not in places:  # models differ by their names alone
            configure(list(cell.overrides))
            places.add(place)
    count = len(list(tables.table_cells(entry, "twin", [0, 1, 2])))
    assert entry.cost.startswith(f"{count} runs of 2,000 images")


def test_published_figures_of_rivals_name_who_measured_them_and_where() -> None:
    figures = paper.read_numbers("rivals.csv")
    for column in ("measured_by", "source", "scope"):
        assert figures[column].notna().all()
    # LiteVAR's authors did not measure these
    others = figures[figures["method"].str.contains("LiteVAR")]
    assert others["measured_by"].str.contains("second-hand").all()
    assert len(figures.drop_duplicates(["method", "model", "bits"])) == len(figures)


def test_the_methods_table_has_the_recipes_but_the_released_code_on_mar() -> None:
    entry = tables.find_table("methods")
    recipes = methods_of("methods")
    assert {m.split("_")[0] for m in entry.models["twin"]} == {"var", "rar", "par", "mar"}
    cells = [c for c in tables.table_cells(entry, "twin", [0]) if c.row != "FP32"]
    assert len(cells) == (4 * (len(recipes) - 1) - 1) * len(entry.grid["quant"])
    assert entry.cost.startswith(
        f"{len(list(tables.table_cells(entry, 'twin', [0, 1, 2])))} runs of 2,000 images;"
    )
    (first, *_) = tables.table_cells(entry, "twin", [0], ["eval=full"])
    assert {"eval.n=2000", "sampler.microbatch=2000"} <= set(first.overrides)


def test_rows_and_grid_multiply_and_full_precision_comes_once_and_first() -> None:
    cells = list(tables.table_cells(small(), "twin", [0, 3]))
    assert [(c.row, c.point.get("quant"), c.seed) for c in cells] == [
        ("FP32", None, 0),
        ("FP32", None, 3),
        ("RTN", "w8a8", 0),
        ("STWQ", "w8a8", 0),
        ("RTN", "w6a6", 0),
        ("STWQ", "w6a6", 0),
        ("RTN", "w8a8", 3),
        ("STWQ", "w8a8", 3),
        ("RTN", "w6a6", 3),
        ("STWQ", "w6a6", 3),
    ]
    assert cells[2].overrides == ("method=rtn", "model=rar_twin", "quant=w8a8", "seed=0")


def test_cells_are_excluded_by_all_the_values_that_are_given() -> None:
    def names(*exclude: dict[str, object]) -> list[tuple[str, str | None]]:
        return [
            (c.row, c.point.get("quant"))
            for c in tables.table_cells(small(exclude=list(exclude)), "twin", [0])
        ]

    kept = [("FP32", None), ("RTN", "w8a8"), ("STWQ", "w8a8"), ("STWQ", "w6a6")]
    assert names({"row": "RTN", "quant": "w6a6"}) == kept
    assert names({"row": "RTN"}, {"quant": "w8a8"}) == [("FP32", None), ("STWQ", "w6a6")]


def test_overrides_pick_values_and_rows_and_win_over_rows() -> None:
    entry = small(rows={"A": "method=rtn calib=random", "B": "method=stwq"})

    def picked(*overrides: str) -> list[tuple[str, str]]:
        return [
            (c.row, c.point["quant"]) for c in tables.table_cells(entry, "twin", [0], overrides)
        ]

    assert picked("quant=w6a6") == [("A", "w6a6"), ("B", "w6a6")]
    assert picked("quant=w6a6,w8a8,w6a6", "row=B") == [("B", "w6a6"), ("B", "w8a8")]
    (cell, _) = tables.table_cells(entry, "twin", [0], ["row=A", "calib=dgc", "eval=quick"])
    assert cell.overrides == (
        "method=rtn",
        "model=rar_twin",
        "quant=w8a8",
        "seed=0",
        "calib=dgc",
        "eval=quick",
    )


def test_full_evaluation_brings_the_committed_settings_unless_given() -> None:
    def first(*overrides: str) -> tuple[str, ...]:
        return next(iter(tables.table_cells(small(), "twin", [0], overrides))).overrides

    assert "sampler.microbatch=2500" in first("eval=full")
    assert [o for o in first("eval=full", "sampler.microbatch=64") if "microbatch" in o] == [
        "sampler.microbatch=64"
    ]
    assert not any("microbatch" in o for o in first())
    analysis = tables.table_cells(replace(small(), what="outliers"), "twin", [0], ["eval=full"])
    assert not any("microbatch" in o for o in next(analysis).overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quant=w4a4", "quant: 'w4a4' is not one of w8a8, w6a6"),
        ("row=C", "row: 'C' is not one of"),
        ("model=rar_b", "model: 'rar_b' is not one of rar_twin"),
        ("method=rtn", "method: the rows and seeds"),
        ("seed=1", "seed: the rows and seeds"),
    ],
)
def test_an_override_that_picks_nothing_or_changes_rows_is_refused(
    override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        list(tables.table_cells(small(), "twin", [0], [override]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exclude": [{"row": "nope"}]}, "t.exclude: {'row': 'nope'} matches no cell"),
        ({"exclude": [{}]}, "t.exclude: {} matches no cell"),
        ({"columns": ["nope"]}, "t.columns: 'nope' is not one of kl"),
        ({"what": "nope"}, "t.what: 'nope' is not one of run"),
        ({"plot": "pie"}, "t.plot: 'pie' is not one of"),
        ({"models": {"toy": []}}, "t.models: 'toy' is not one of twin, paper"),
        ({"extra": ["X"]}, "t.extra: 'X' is not"),
        ({"gird": {}}, "t.gird: no such field, allowed are claims"),
    ],
)
def test_a_wrong_entry_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        small(**fields)
    assert "\n" not in str(refused.value)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match="registry: t: .*'rows'"):
        tables.parse_entry("t", {"title": "T"})


def test_the_papers_numbers_stand_beside_the_cells_they_are_of() -> None:
    def figure(name: str, model: str, row: str, quant: str | None, metric: str) -> float | None:
        return paper.paper_figures(tables.find_table(name), model, row, quant).get(metric)

    assert figure("rar", "rar_b", "PTQ4ARVG", "w6a6", "fid") == 5.13
    assert figure("rar", "rar_twin", "PTQ4ARVG", "w6a6", "fid") == 5.13  # of RAR-B
    assert figure("rar", "rar_b", "FP32", None, "is") == 292.80
    assert figure("mar", "mar_h", "OS+", "w8a8", "is") is not None
    assert figure("mar", "mar_h", "OS+", "w8a8", "sfid") is None  # not given
    assert figure("var", "var_d30", "QuaRot", "w8a8", "fid") is None  # not run there
    assert figure("rar", "rar_twin_plain", "PTQ4ARVG", "w6a6", "fid") is None
    assert figure("rar", "rar_b", "PTQ4ARVG", "w6a6", "kl") is None
    speeds = paper.paper_speed()
    assert (len(speeds), speeds["latency_ms"].iloc[0]) == (17, 747.0)
    assert speeds["peak_memory_MB"].isna().iloc[-1]


def test_the_papers_numbers_are_the_nearest_floats_of_what_its_files_say() -> None:
    for line in csv.DictReader((paper.PAPER / "quality.csv").open()):
        figures = paper.quality_figures()[tuple(line[key] for key in paper.KEYS)]
        for ours, theirs in labels.PAPER_METRICS.items():
            assert figures.get(ours) == (float(line[theirs]) if line[theirs] else None)


def agent_calls(config: Mapping[str, Any]) -> Iterator[list[str]]:
    """Arguments of `experiments.table` that W&B's agents give, call by call, in W&B's own words."""
    from wandb.sdk.launch.sweeps import utils as sweep_utils

    # the overrides, without the interpreter and what the agent fills in
    fixed = [word for word in config["command"] if "=" in word and "$" not in word]
    names = list(config["parameters"])
    lists = [parameter["values"] for parameter in config["parameters"].values()]
    for chosen in itertools.product(*lists):
        arguments = {name: {"value": value} for name, value in zip(names, chosen)}
        filled = sweep_utils.create_sweep_command_args({"args": arguments})
        yield [*fixed, *filled["args_no_hyphens"]]


@pytest.mark.parametrize("name", sweeps.swept_tables())
def test_a_sweep_has_the_grid_of_its_table(name: str) -> None:
    text = sweeps.sweep_path(name).read_text()
    assert text == sweeps.sweep_text(tables.find_table(name)), (
        "run python -m experiments.registry.sweeps"
    )
    pytest.importorskip("wandb")
    found: set[tuple[str, ...]] = set()
    for call in agent_calls(yaml.safe_load(text)):
        chosen = dict(a.partition("=")[::2] for a in call)
        assert (chosen.pop("name"), chosen.pop("eval"), chosen.pop("tracker")) == (
            name,
            "full",
            "wandb",
        )
        seeds = parse_seeds(chosen.pop("seeds"))
        cells = tables.table_cells(
            tables.find_table(name), "twin", seeds, [f"{k}={v}" for k, v in chosen.items()]
        )
        found |= {tuple(sorted(c.overrides)) for c in cells}
    wanted = tables.table_cells(tables.find_table(name), "twin", sweeps.SEEDS)
    assert found == {tuple(sorted(c.overrides)) for c in wanted}


def test_sweeps_are_those_of_the_registry_and_no_others() -> None:
    assert {p.stem for p in Path(sweeps.FOLDER).glob("*.yaml")} == set(sweeps.swept_tables())


def test_full_precision_takes_the_place_of_a_method_and_its_settings() -> None:
    overrides = ("model=rar_b", "method=gptq", "+method.options.x=1", "~method.gps", "quant=w6a6")
    full_precision = tables.full_precision_overrides(overrides)
    assert full_precision == ("model=rar_b", "quant=w6a6", "method=fp")


def test_pictures_of_samples_are_kept_of_galleries_and_beside_the_paper() -> None:
    assert tables.find_table("gallery").keeps_samples("natural")
    assert tables.find_table("components").keeps_samples("twin")
    assert not tables.find_table("components").keeps_samples(
        "natural"
    )  # the paper has no such models
    assert not tables.find_table("methods").keeps_samples("twin")


def test_numbers_of_things_are_counted_in_words() -> None:
    assert labels.count_noun(1, "cell") == "1 cell"
    assert labels.count_noun(0, "cell") == "0 cells"
    assert labels.describe_seeds([1]) == "1 seed"
    assert labels.describe_seeds([3, 3]) == "3 seeds"
    assert labels.describe_seeds([3, 1]) == "1 to 3 seeds"
