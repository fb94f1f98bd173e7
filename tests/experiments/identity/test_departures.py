"""The hash that names a run is of what determines its numbers, as far as it is not the default."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import pytest
from omegaconf import OmegaConf

from experiments.config.compose import validate_config
from experiments.config.schema import RunConfig
from experiments.identity import departures as departures_module
from experiments.identity.departures import add_versions, describe_run
from experiments.store import results
from ptq.files import value_digest
from tests.experiments.cells import config_of

NOT_IDENTITY = {
    "tracker.mode",
    "tracker.group",
    "tracker.row",
    "tracker.project",
    "tracker.entity",
    "device",
    "runs",
    "heldout",  # what lies there is, and not where
    "plugins",
    "method.label",
    "model.weights",
    "model.tokenizer_weights",
}


def leaves(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Paths and values of all fields that are no dataclasses."""
    for field in dataclasses.fields(value):
        child = getattr(value, field.name)
        path = prefix + field.name
        if dataclasses.is_dataclass(child):
            yield from leaves(child, path + ".")
        else:
            yield path, child


def changed(config: RunConfig, path: str) -> RunConfig:
    """The config with another value in one field."""
    config = copy.deepcopy(config)
    *parents, name = path.split(".")
    holder: object = config
    for parent in parents:
        holder = getattr(holder, parent)
    value = getattr(holder, name)
    others = {
        bool: lambda: not value,
        int: lambda: value + 1,
        float: lambda: value / 2,
        str: lambda: value + "x",
        list: lambda: [*value, "x"],
        type(None): lambda: "x",
    }
    # a model that is not registered has no identity
    other = "var_twin" if path == "model.name" else others[type(value)]()
    setattr(holder, name, other)
    return config


def key(config: RunConfig, weights: str = "0123", **settings: object) -> str:
    values = describe_run(config, weights, {"guidance_scale": 3.0, **settings})
    return value_digest(add_versions(values))


@pytest.mark.parametrize(
    ("model", "selector", "revision"),
    [
        ("var_twin", "dgc_released", 1),
        ("var_d16", "dgc_released", 1),
        ("var_d36", "dgc_released", 1),
        ("var_twin", "dgc", None),
        ("var_twin", "random", None),
        ("rar_twin", "dgc_released", None),
        ("par_twin", "dgc_released", None),
        ("mar_twin", "dgc_released", None),
    ],
)
def test_rows_that_a_selector_keeps_anew_alone_are_another_run(
    model: str, selector: str, revision: int | None
) -> None:
    config = config_of()
    config.model.name = model
    config.calib.selector = selector
    identity = describe_run(config, "0123", {})
    assert identity["calib"].get("revision") == revision
    before = {name: value for name, value in identity["calib"].items() if name != "revision"}
    same = value_digest(identity) == value_digest(identity | {"calib": before})
    assert same == (revision is None)


FIELDS = [path for path, value in leaves(RunConfig()) if not isinstance(value, dict)]


@pytest.mark.parametrize("path", FIELDS)
def test_the_hash_changes_with_all_but_tracker_paths_and_device(path: str) -> None:
    config = validate_config(OmegaConf.create({"method": {"name": "ptq4arvg"}}))
    assert (key(changed(config, path)) == key(config)) == (path in NOT_IDENTITY)


@pytest.mark.parametrize("path", FIELDS)
def test_the_hash_of_a_full_precision_run_ignores_quantization(path: str) -> None:
    config = validate_config(OmegaConf.create({"method": {"name": "fp", "quantized": False}}))
    ignored = path in NOT_IDENTITY or path.split(".")[0] in ("method", "quant", "calib", "scope")
    if path != "method.quantized":
        assert (key(changed(config, path)) == key(config)) == ignored


def test_the_hash_changes_with_weights_sampler_and_result_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of()
    first = key(config)
    assert key(config_of()) == first
    assert (
        len(
            {
                first,
                key(config, "4567"),
                key(config, guidance_scale=2.0),
                key(config, temperature=1.0),
            }
        )
        == 4
    )
    monkeypatch.setattr(departures_module, "RESULT_VERSION", results.RESULT_VERSION + 1)
    assert key(config) != first
