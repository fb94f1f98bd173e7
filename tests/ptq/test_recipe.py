"""Recipes by name are those that runs get from the same configs."""

from __future__ import annotations

import pytest

from experiments.config.compose import configure
from experiments.config.recipe import build_recipe
from ptq import recipe
from ptq.config.files import group_choices
from ptq.types import ConfigError

METHODS = [name for name in group_choices("method") if name != "fp"]
# of methods that do not go with 8-bit activations, or need attention in scope
OTHER_NUMBERS = {"fpqvar": ("w6a6", "blocks"), "shift_and_sum": ("w6a6", "paper")}


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_by_name_is_that_of_a_run(method: str) -> None:
    bits, scope = OTHER_NUMBERS.get(method, ("w4a8", "released"))
    config = configure(["model=mar_twin", f"method={method}", f"quant={bits}", f"scope={scope}"])
    assert recipe.named(method, bits, scope, family="mar") == build_recipe(config)


def test_changes_are_those_of_overrides() -> None:
    config = configure(["method=ptq4arvg", "quant=w6a6", "method.gps=false"])
    by_name = recipe.named("ptq4arvg", "w6a6", changes={"gps": False})
    assert by_name == build_recipe(config)
    assert "shift" not in by_name.transforms  # it follows gps


REFUSED = {
    "method: 'gsp' is not one of ": {"method": "gsp"},
    "quant: 'w9a9' is not one of fp4_g128, fp6, fp8, ": {"bits": "w9a9"},
    "scope: 'all' is not one of blocks, ": {"scope": "all"},
    "method: fp quantizes nothing": {"method": "fp"},
    "method.alpha: 2": {"changes": {"alpha": 2}},
    "method.alpha: Value 'much'": {"changes": {"alpha": "much"}},
    "method.alpa: no such field, allowed are name, ": {"changes": {"alpa": 1}},
    "family: None is not one of rar, ": {"scope": "released"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_wrong_is_said_in_one_line(message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe.named(**{"method": "smoothquant", **REFUSED[message]})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
