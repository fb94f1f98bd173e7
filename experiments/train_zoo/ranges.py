"""The range of every field of a training's config: a table for each kind of task.

A field that is new in `conf/train_zoo/model` needs a line here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.data.sets import SETS
from experiments.options import nearest
from experiments.store.tracking import MODES
from models.registry import PRESETS
from ptq.ranges import FilePath, Flag, Integer, Name, Number, Optional, Range, Word, check_value
from ptq.spec import ConfigError

SEED = Integer(0, 2**63 - 1)
STEPS = Integer(1, 10_000_000)
BATCH = Integer(1, 1_000_000)
RATE = Number(0, 1, below=True)
WEIGHT = Number(0, 1000)
TWINS = Word(*(name for name, preset in PRESETS.items() if preset.weights.shipped))

COMMAND: dict[str, Range] = {
    "out": FilePath(),
    "data": Optional(FilePath()),
    "tracker": Word(*MODES),
    "limit_s": Optional(Integer(1, 1_000_000)),
}
SCHEDULE: dict[str, Range] = {
    "schedule.steps": STEPS,
    "schedule.batch": BATCH,
    "schedule.lr": Number(0, 10, above=True),
    "schedule.warmup": Integer(0, 10_000_000),
    "schedule.weight_decay": Number(0, 1),
    "schedule.ema": RATE,
    "schedule.clip": Number(0, 1e6, above=True),
    "schedule.seed": SEED,
    "schedule.save_every": STEPS,
}
TRANSFORMER: dict[str, Range] = {
    "seed": SEED,
    "dropout": RATE,
    "label_dropout": RATE,
    "mirrored": Flag(),
    "random_order_until": Number(0, 1),
}
TASKS: dict[str, dict[str, Range]] = {
    "extractor": {"seed": SEED, "epochs": Integer(1, 10_000)},
    "reference": {"dataset": Word(*SETS), "extractor": Word("fashion", "lite0")},
    "heldout": {"of": TWINS, "n": Integer(2, 10_000)},  # of as many test images
    "tokenizer": {
        "of": TWINS,
        "seed": SEED,
        "commitment": WEIGHT,
        "kl_weight": WEIGHT,
        **SCHEDULE,
    },
    "transformer": {**TRANSFORMER, **SCHEDULE},
    "twin": {
        **TRANSFORMER,
        "planted.weight": WEIGHT,
        "planted.channels": Number(1, 1000),
        "planted.tokens": Number(1, 1000),
        "planted.gain": Number(1, 1000),
        **SCHEDULE,
    },
}


def check_training(config: Mapping[str, Any]) -> None:
    """Refuse the config of a training with a field that its task has not, or a value out of range.

    Args:
        config: as plain values, with `model` as one of its fields.

    Raises:
        ConfigError: one line: field, value, what is allowed.
    """
    for name, allowed in COMMAND.items():
        check_value(name, config[name], allowed)
    model = config["model"]
    check_value("model.task", model.get("task"), Word(*TASKS))
    ranges = {"name": Name(), "task": Word(*TASKS), **TASKS[model["task"]]}
    for field_name, value in list_fields(model):
        if field_name not in ranges:
            raise ConfigError(
                f"model.{field_name}: no such field, allowed are {', '.join(ranges)}"
                f"{nearest(field_name, ranges)}"
            )
        check_value(f"model.{field_name}", value, ranges[field_name])


def list_fields(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and values of the fields that have no fields of their own."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from list_fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
