"""Bits under a budget: the choice is the best of all, and what is written runs."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.allocation import Options, allocate, run_command
from experiments.analyses.allocation import (
    Choice,
    choose_bits,
    merge_fields,
    quant_changes,
    uniform_size,
)
from experiments.options import parse_options
from ptq.recipe import read_changes
from ptq.types import ConfigError
from tests.experiments.cells import TINY, command_line

BITS = (2, 4, 8)


def made_up_choices(seed: int, groups: int = 4) -> list[Choice]:
    """Losses that fall with the bits, of groups of different sizes."""
    generator = np.random.default_rng(seed)
    choices = []
    for index in range(groups):
        size = int(generator.integers(100, 1000))
        loss = 10.0 ** -generator.uniform(2, 7)
        for bits in BITS:
            choices.append(Choice(f"g{index}", bits, loss * 4.0**-bits, size * bits))
    return choices


def best_of_all(choices: list[Choice], budget: int) -> float:
    """The least loss, by trying everything."""
    groups = dict.fromkeys(choice.group for choice in choices)
    by_group = [[choice for choice in choices if choice.group == group] for group in groups]
    losses = []
    for picked in itertools.product(*by_group):
        if sum(choice.size for choice in picked) <= budget:
            losses.append(sum(choice.loss for choice in picked))
    return min(losses)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mean_bits", [2.0, 3.3, 5.0, 8.0])
def test_the_choice_is_the_best_of_all(seed: int, mean_bits: float) -> None:
    choices = made_up_choices(seed)
    budget = int(mean_bits * sum(choice.size for choice in choices if choice.bits == 2) / 2)
    chosen = choose_bits(choices, budget)
    assert list(chosen) == ["g0", "g1", "g2", "g3"]
    assert sum(choice.size for choice in chosen.values()) <= budget
    loss = sum(choice.loss for choice in chosen.values())
    assert loss == pytest.approx(best_of_all(choices, budget), rel=1e-6)


def test_a_budget_below_the_least_is_refused() -> None:
    choices = made_up_choices(0)
    least = sum(choice.size for choice in choices if choice.bits == 2)
    with pytest.raises(ConfigError, match=f"^budget: {least - 1} bytes are too few, .* {least}$"):
        choose_bits(choices, least - 1)


def test_the_budget_left_out_is_that_of_the_same_bits_everywhere() -> None:
    choices = made_up_choices(1)
    expected = sum(choice.size for choice in choices if choice.bits == 4)
    assert uniform_size(choices, 4) == expected


def test_choices_become_fields_of_quant() -> None:
    def picked(*groups: str) -> dict[str, Choice]:
        return {group: Choice(group, 4, 0.0, 0) for group in groups}

    four = {"weights": {"bits": 4}}
    kinds = ["qkv", "fc1"]
    assert quant_changes(picked("qkv"), "kind", kinds) == {"by_kind": {"qkv": four}, "by_layer": {}}
    of_layer = quant_changes(picked("1"), "layer", kinds)
    assert of_layer["by_layer"] == {"1": {"qkv": four, "fc1": four}}
    of_sites = quant_changes(picked("0.qkv", "0.fc1", "2.qkv"), "site", kinds)
    assert of_sites["by_layer"] == {"0": {"qkv": four, "fc1": four}, "2": {"qkv": four}}
    assert len(read_changes(of_sites)) == 3


def test_bits_that_weights_cannot_have_are_refused() -> None:
    assert parse_options(Options, ["bits=8,2, 4"])[0].bits == [8, 2, 4]
    for text in ("16", "4,x", "1"):
        with pytest.raises(ConfigError, match="^bits: .* is not an integer from 2 to 8$"):
            parse_options(Options, [f"bits={text}"])


def test_settings_of_a_kind_stay_beside_its_bits() -> None:
    given = {"by_kind": {"fc1": {"activations": {"bits": 6}, "weights": {"symmetric": True}}}}
    changes = {"by_kind": {"fc1": {"weights": {"bits": 3}}, "qkv": {"weights": {"bits": 4}}}}
    merged = merge_fields(given, changes)["by_kind"]
    assert merged["fc1"] == {"activations": {"bits": 6}, "weights": {"symmetric": True, "bits": 3}}
    assert merged["qkv"] == {"weights": {"bits": 4}}
    assert given["by_kind"]["fc1"]["weights"] == {"symmetric": True}


def test_the_command_has_of_quant_what_was_chosen_alone() -> None:
    given = ["model=rar_twin", "quant=w4a8", "quant.weights.symmetric=true", "+quant.name=x"]
    command = run_command(given, Path("a folder"))
    assert shlex.split(command)[3:] == ["plugins=a folder", "quant=allocated", "model=rar_twin"]


@pytest.mark.parametrize("place", ["by_kind.fc2", "by_layer.0.fc2"])
def test_weights_that_have_bits_of_their_own_are_refused(place: str, tmp_path: Path) -> None:
    given = f"quant.{place}.weights.bits"
    overrides = [*TINY, f"runs={tmp_path}", "method=rtn", "quant=w4a8", f"{given}=8"]
    with pytest.raises(
        ConfigError, match=f"^{given}: 8 leaves nothing .* quant.weights.bits alone$"
    ):
        allocate(Options(out=str(tmp_path / "found")), overrides)


def test_what_is_written_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*TINY, f"runs={tmp_path}", "method=rtn", "quant=w4a8", "calib=random"]
    overrides += ["scope=blocks", "eval.sequences=2", "calib.n=2"]
    overrides += ["quant.by_kind.fc2.activations.bits=6"]
    folder = tmp_path / "found"
    allocate(Options(bits=[3, 4, 6], out=str(folder)), overrides)
    record = json.loads((folder / "allocation.json").read_text())
    assert set(record["chosen"]) == {"qkv", "proj", "fc1", "fc2"}
    assert len(record["choices"]) == 12
    assert record["bytes"] <= record["budget"]
    alone = {(choice["group"], choice["bits"]): choice["loss"] for choice in record["choices"]}
    assert alone["fc1", 3] > alone["fc1", 6] > 0
    quant = yaml.safe_load((folder / "conf" / "quant" / "allocated.yaml").read_text())
    for kind, bits in record["chosen"].items():
        assert quant["by_kind"][kind]["weights"] == {"bits": bits}
    assert quant["by_kind"]["fc2"]["activations"] == {"bits": 6}
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[:3] == ["python", "-m", "experiments.run"]
    done = command_line(*command[3:], "dry_run=true")
    assert done.returncode == 0, done.stderr
