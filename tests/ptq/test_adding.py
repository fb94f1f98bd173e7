"""`ptq/ADDING.md` as it stands there: its files make a method in a folder of one's own, and its
commands run it; what goes wrong is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra.errors import HydraException

from experiments.config.compose import compose_with_hydra, configure, explain_refusal
from experiments.config.overrides import RUN
from experiments.config.recipe import build_recipe
from experiments.identity.departures import describe_run
from ptq.config.files import group_choices
from ptq.recipe import named
from ptq.registry import plugins
from ptq.registry.entries import REGISTRIES, TRANSFORMS, load_plugins
from ptq.spec import ConfigError
from tests.pages import ROOT, page_commands, run_command, write_files

PAGE = ROOT / "ptq" / "ADDING.md"
COMMANDS = list(page_commands(PAGE))


@pytest.fixture(autouse=True)
def _forget_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is unknown to the next one."""
    assert len(TRANSFORMS)  # what ships is imported by now
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "entries", dict(registry.entries))
        monkeypatch.setattr(registry, "homes", dict(registry.homes))
        monkeypatch.setattr(registry, "names", dict(registry.names))
    monkeypatch.setattr(plugins, "_folders", [])
    monkeypatch.setattr(plugins, "_waiting", [])


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """The page's folder."""
    write_files(PAGE, tmp_path)
    return tmp_path / "mine"


def refusal(folder: Path) -> str:
    """The one line that refuses a folder of plugins."""
    with pytest.raises(ConfigError) as caught:
        load_plugins(folder)
    line = str(caught.value)
    assert "\n" not in line
    return line


# --- the page


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run_as_printed_outside_the_checkout(command: str, tmp_path: Path) -> None:
    write_files(PAGE, tmp_path)
    done = run_command(command, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    if "experiments.table" in command:
        assert "Flatten beside SmoothQuant" in done.stdout
        results = json.loads((tmp_path / "runs/tables/flatten/results.json").read_text())
        kl = {entry["table"]["row"]: entry["metrics"]["kl"] for entry in results}
        assert 0 < kl["Flatten"] != kl["SmoothQuant"] > 0


def test_a_method_brings_its_switch_and_settings_into_configs(mine: Path) -> None:
    config = configure([f"plugins={mine}", "method=flatten", "method.options.flatten.strength=0.7"])
    recipe = build_recipe(config)
    assert recipe.transforms == ("flatten",)
    assert recipe.options.flatten.strength == 0.7
    assert list(TRANSFORMS).index("geometric") < list(TRANSFORMS).index("flatten")
    assert "flatten" in group_choices("method")
    # and a recipe by name
    assert named("flatten", changes={"options": {"flatten": {"strength": 0.7}}}) == build_recipe(
        configure([f"plugins={mine}", *config_changes(), "method.options.flatten.strength=0.7"])
    )
    with pytest.raises(ConfigError, match="^method.options.flatten.strength: 2 is not a number"):
        configure(["method=flatten", "method.options.flatten.strength=2"])


def config_changes() -> list[str]:
    return ["method=flatten", "quant=w8a8"]


def test_other_methods_stay_what_they_are(mine: Path) -> None:
    before = build_recipe(configure(["method=ptq4arvg"]))
    load_plugins(mine)
    assert build_recipe(configure(["method=ptq4arvg"])) == before


def test_a_misspelt_field_is_refused(mine: Path) -> None:
    given = [f"plugins={mine}", "method.flaten=true"]
    RUN.check(given)  # before anything is imported nobody knows
    assert "flatten" not in TRANSFORMS.entries
    with pytest.raises(ConfigError, match="^method.flaten: no such .* did you mean flatten"):
        configure(given)


def test_a_method_that_was_changed_is_another_run(mine: Path) -> None:
    given = [f"plugins={mine}", "method=flatten"]
    before = describe_run(configure(given), "0123", {})
    assert before["plugins"].keys() == {"method.flatten"}
    text = (mine / "flatten.py").read_text()
    (mine / "flatten.py").write_text(text.replace("min=1e-3", "min=1e-4"))
    assert describe_run(configure(given), "0123", {})["plugins"] != before["plugins"]
    # what ships is not identified by its text
    assert "plugins" not in describe_run(configure(["method=ptq4arvg"]), "0123", {})


# --- what goes wrong


def test_a_file_that_registers_nothing_is_named(mine: Path) -> None:
    text = (mine / "flatten.py").read_text()
    (mine / "flatten.py").write_text(text.replace('@register_transform("flatten", step=65)\n', ""))
    (mine / "forgotten.py").write_text("x = 1\n")
    assert refusal(mine).startswith(f"plugins: {mine / 'forgotten.py'} registers nothing")


def test_settings_of_nothing_are_named(mine: Path) -> None:
    text = (mine / "flatten.py").read_text()
    (mine / "flatten.py").write_text(text.replace('@register_transform("flatten", step=65)\n', ""))
    place = mine / "flatten.py"
    assert refusal(mine).startswith(
        f"plugins: {place} registers settings of 'flatten', and nothing"
    )


def test_a_folder_without_anything_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"plugins: {tmp_path} has neither Python files nor a folder conf"


def test_a_switch_that_nobody_registered_is_named(mine: Path) -> None:
    (mine / "flatten.py").unlink()
    with pytest.raises(ConfigError, match="^method.flatten: no such field, allowed are "):
        configure([f"plugins={mine}", "method=flatten"])


def test_hydra_names_such_a_switch_too(mine: Path) -> None:
    (mine / "flatten.py").unlink()
    load_plugins(mine)
    with pytest.raises(HydraException) as caught:
        compose_with_hydra(["method=flatten"])
    assert explain_refusal(caught.value).startswith("method.flatten: no such field, allowed are ")


def test_a_name_that_is_taken_is_named_with_both_files(mine: Path) -> None:
    text = (mine / "flatten.py").read_text()
    (mine / "flatten.py").write_text(text.replace('transform("flatten"', 'transform("gps"'))
    line = refusal(mine)
    assert "method: 'gps' is registered twice, as GPS in " in line
    assert "ptq/gps.py" in line
    assert str(mine / "flatten.py") in line


def test_a_name_that_one_file_registers_twice_is_named(mine: Path) -> None:
    text = (mine / "others.py").read_text()
    again = "\n\n@register_rounder('halves')\nclass Again(Halves):\n    pass\n"
    (mine / "others.py").write_text(text + again)
    line = refusal(mine)
    assert "method.rounder: 'halves' is registered twice, as Halves in " in line
    assert "and as Again in " in line


def test_a_setting_without_range_is_named(mine: Path) -> None:
    text = (mine / "flatten.py").read_text()
    (mine / "flatten.py").write_text(text.replace("setting(0.5, Number(0, 1))", "0.5"))
    assert "method.options.flatten.strength: it has no range, give setting(" in refusal(mine)


def test_a_class_without_solve_is_named(mine: Path) -> None:
    text = (mine / "flatten.py").read_text()
    (mine / "flatten.py").write_text(text.replace("def solve", "def solved"))
    assert "method: 'flatten' has no `solve`" in refusal(mine)


def test_a_name_of_another_field_is_named(mine: Path) -> None:
    text = (mine / "flatten.py").read_text()
    (mine / "flatten.py").write_text(text.replace('("flatten"', '("alpha"'))
    load_plugins(mine)
    with pytest.raises(ConfigError, match="^method: alpha is a field of all methods, "):
        configure([])


def test_a_file_that_cannot_be_imported_is_named(mine: Path) -> None:
    (mine / "broken.py").write_text("import nothing_of_that_name\n")
    line = refusal(mine)
    assert line.startswith(f"plugins: {mine / 'broken.py'} cannot be imported (ModuleNotFound")


def test_two_recipes_of_one_name_are_named(mine: Path) -> None:
    (mine / "conf/method/gptq.yaml").write_text("name: gptq\n")
    with pytest.raises(ConfigError, match="^method: gptq is there twice, as "):
        configure([f"plugins={mine}", "method=gptq"])


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^plugins: .*nowhere is not a folder$"):
        configure([f"plugins={tmp_path / 'nowhere'}"])


def test_a_package_that_is_installed_is_found(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mine / "__init__.py").write_text("from mine import flatten\n")
    monkeypatch.syspath_prepend(mine.parent)
    folder = mine.parent / "mine-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[ar_ptq]\nmine = mine\n")
    plugins.installed_packages.cache_clear()
    monkeypatch.setattr(plugins, "_shipped_imported", False)
    try:
        assert build_recipe(configure(["method=flatten"])).transforms == ("flatten",)
    finally:
        monkeypatch.undo()
        plugins.installed_packages.cache_clear()
