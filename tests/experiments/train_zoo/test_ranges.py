"""Every field of a training's config has a range, and what lies outside is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from experiments.config.overrides import TRAINING
from experiments.train_zoo.ranges import TASKS, check_training, list_fields
from ptq.spec import ConfigError

MODELS = TRAINING.group_choices("model")


def config_of(name: str) -> dict[str, Any]:
    model = yaml.safe_load((TRAINING.folder / "model" / f"{name}.yaml").read_text())
    model = {field: as_yaml_1_2(value) for field, value in model.items()}
    return {"out": "models/zoo", "data": None, "tracker": "none", "limit_s": None, "model": model}


def as_yaml_1_2(value: Any) -> Any:
    """Numbers such as 1e-3, which PyYAML takes for texts and Hydra does not."""
    if isinstance(value, dict):
        return {name: as_yaml_1_2(entry) for name, entry in value.items()}
    is_number = isinstance(value, str) and value.replace("e-", "").replace(".", "").isdigit()
    return float(value) if is_number else value


@pytest.mark.parametrize("name", MODELS)
def test_what_ships_lies_in_its_ranges(name: str) -> None:
    check_training(config_of(name))


def test_every_range_belongs_to_a_field_of_a_shipped_config() -> None:
    seen = {task: {"schedule.clip", "schedule.warmup", "schedule.save_every"} for task in TASKS}
    for name in MODELS:
        model = config_of(name)["model"]
        seen[model["task"]] |= {field for field, _ in list_fields(model)}
    for task, ranges in TASKS.items():
        assert ranges.keys() <= seen[task], task


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model.task", "train", "model.task: 'train' is not one of extractor"),
        ("model.seed", -1, "model.seed: -1 is not an integer from 0"),
        ("model.seed", True, "model.seed: true is not an integer"),
        ("model.dropout", 1, "model.dropout: 1 is not a number of at least 0 and below 1"),
        ("model.mirrored", 1, "model.mirrored: 1 is not a boolean"),
        ("model.schedule.steps", 0, "model.schedule.steps: 0 is not an integer from 1"),
        ("model.schedule.batch", 10**12, "model.schedule.batch: 1000000000000 is not an integer"),
        ("model.schedule.lr", 0, "model.schedule.lr: 0 is not a number above 0"),
        ("model.schedule.lr", float("nan"), "model.schedule.lr: nan is not a number above 0"),
        ("model.schedule.ema", 1.0, "model.schedule.ema: 1.0 is not a number of at least 0"),
        ("model.schedule.save_every", "???", "model.schedule.save_every: its value is missing"),
        ("model.schedule.stepz", 3, "model.schedule.stepz: no such field, allowed are name"),
        ("model.schedule", 3, "model.schedule: no such field"),
        ("model.planted.weight", None, "model.planted.weight: null is not a number"),
        ("model.name", "../x", "model.name: '../x' is not a name"),
        ("limit_s", 0, "limit_s: 0 is not an integer from 1"),
        ("tracker", "all", "tracker: 'all' is not one of none"),
        ("out", "", "out: '' is not a path"),
    ],
)
def test_what_lies_outside_is_refused_in_one_line(path: str, value: Any, said: str) -> None:
    config = config_of("rar_twin")
    *parents, name = path.split(".")
    group = config
    for parent in parents:
        group = group[parent]
    group[name] = value
    with pytest.raises(ConfigError) as caught:
        check_training(config)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
