"""A result counts only under the defaults, data, versions and devices that it was made with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.config.schema import RunConfig
from experiments.identity import resolved, whole
from experiments.identity.departures import add_versions, describe_run
from experiments.identity.parts import RAISED_VERSIONS, used_parts
from experiments.identity.results import find_identity_fault, state_identity
from experiments.identity.whole import identity_digest, whole_identity
from experiments.store.results import RESULT_VERSION
from models import registry
from ptq.files import value_digest
from tests.experiments.cells import config_of

Departures = dict[str, Any]
Defaults = dict[str, dict[str, Any]]


def departures_of(*overrides: str) -> Departures:
    config: RunConfig = config_of(*overrides)
    return add_versions(describe_run(config, "0123", {"cfg": 3.0}))


def digest_of(departures: Departures, device: str = "cpu") -> str:
    return identity_digest(whole_identity(departures, device))


def made_result(departures: Departures) -> dict[str, Any]:
    origin = {"hash": value_digest(departures), "identity": departures}
    return {"provenance": origin | state_identity(whole_identity(departures, "cuda"))}


@pytest.fixture
def defaults(monkeypatch: pytest.MonkeyPatch) -> Defaults:
    """The defaults, which a test may change as an edit of the code would."""
    changed = resolved.default_settings()
    copied = {group: dict(settings) for group, settings in changed.items()}
    options = copied["method"]["options"]
    copied["method"]["options"] = {name: dict(group) for name, group in options.items()}
    monkeypatch.setattr(resolved, "default_settings", lambda: copied)
    return copied


@dataclass(frozen=True)
class Default:
    """A default, another value for it, a method that reads it and one that does not."""

    place: tuple[str, ...]
    value: Any
    reader: str
    other: str


DEFAULTS = [
    Default(("method", "alpha"), 0.9, "smoothquant", "os_plus"),
    Default(("method", "options", "os_plus", "rows"), 32, "os_plus", "gptq"),
    Default(("method", "options", "gptq", "damping"), 0.1, "gptq", "os_plus"),
    Default(("method", "options", "omniquant", "epochs"), 5, "omniquant", "rtn"),
    Default(("method", "gps_form"), "eq16", "ptq4arvg", "smoothquant"),
]


@pytest.mark.parametrize("change", DEFAULTS, ids=lambda change: ".".join(change.place))
def test_a_changed_default_ends_results_of_methods_that_read_it_alone(
    defaults: Defaults, change: Default
) -> None:
    read, other = (departures_of(f"method={name}") for name in (change.reader, change.other))
    results = [made_result(read), made_result(other)]
    *groups, name = change.place
    holder: Any = defaults
    for group in groups:
        holder = holder[group]
    assert holder[name] != change.value
    holder[name] = change.value
    assert find_identity_fault(results[0]).startswith("is of other defaults")
    assert find_identity_fault(results[1]) == ""


def test_defaults_of_calibration_are_part_of_all_quantized_identities(
    defaults: Defaults,
) -> None:
    quantized, full = departures_of("method=rtn"), departures_of("method=fp")
    before = digest_of(quantized), digest_of(full)
    defaults["calib"]["batch"] = 32
    assert digest_of(quantized) != before[0]
    assert digest_of(full) == before[1]


def test_a_method_that_is_added_changes_no_identity(defaults: Defaults) -> None:
    departures = departures_of("method=ptq4arvg")
    before = digest_of(departures)
    defaults["method"]["newcomer"] = False
    defaults["method"]["options"]["newcomer"] = {"strength": 1.0}
    assert digest_of(departures) == before


def test_an_added_setting_that_changes_nothing_is_no_part(
    defaults: Defaults, monkeypatch: pytest.MonkeyPatch
) -> None:
    departures = departures_of("method=gptq")
    before = digest_of(departures)
    defaults["method"]["options"]["gptq"]["order"] = "given"
    assert digest_of(departures) != before
    monkeypatch.setitem(resolved.LATER_SETTINGS, "method.options.gptq.order", "given")
    assert digest_of(departures) == before
    defaults["method"]["options"]["gptq"]["order"] = "by_size"
    assert digest_of(departures) != before


@pytest.mark.parametrize(
    ("part", "affected"),
    [
        ("method.gps", {"ptq4arvg"}),
        ("rounder.gptq", {"gptq"}),
        ("selector.dgc", {"ptq4arvg", "gptq"}),
        ("quantizer", {"ptq4arvg", "gptq"}),
        ("sampler.rar", {"ptq4arvg", "gptq", "fp"}),
        ("family.rar", {"ptq4arvg", "gptq", "fp"}),
        ("evaluator.images", {"ptq4arvg", "gptq", "fp"}),
        ("family.var", set()),
        ("method.os_plus", set()),
        ("selector.uniform", set()),
        ("analysis.outliers", set()),
    ],
)
def test_a_raised_version_ends_results_that_used_the_part_and_no_others(
    part: str, affected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ("ptq4arvg", "gptq", "fp")
    former = {name: departures_of(f"method={name}") for name in methods}
    results = {name: made_result(departures) for name, departures in former.items()}
    monkeypatch.setitem(RAISED_VERSIONS, part, RESULT_VERSION + 1)
    for name in methods:
        fault = find_identity_fault(results[name])
        version = f"is of version {RESULT_VERSION} of {part}, this code's is {RESULT_VERSION + 1}"
        assert fault == (version if name in affected else "")
        renewed = departures_of(f"method={name}")
        # another folder too, so that both results may be kept
        assert (renewed == former[name]) == (name not in affected)
        assert find_identity_fault(made_result(renewed)) == ""


def test_the_parts_of_a_run_are_those_that_it_uses() -> None:
    of_run = used_parts(departures_of("method=ptq4arvg_gptq", "model=var_twin"))
    assert set(of_run) == {
        "family.var",
        "sampler.var",
        "evaluator.likelihood",
        "evaluator.images",
        "quantizer",
        "selector.dgc",
        "rounder.gptq",
        "method.smoothquant",
        "method.shift",
        "method.gps",
        "method.stwq",
        "method.exclude_sinks",
    }
    analysis = departures_of("method=fp") | {"what": "outliers", "options": {}}
    assert used_parts(analysis) == ["family.rar", "sampler.rar", "analysis.outliers"]
    assert used_parts({"what": "speed"}) == ["benchmark"]
    compiled = departures_of("method=fp", "sampler.compiled=true")
    assert "steps" in used_parts(compiled)


def test_a_revised_selector_is_said_by_its_revision() -> None:
    departures = departures_of("method=ptq4arvg_released", "calib=dgc_released", "model=var_twin")
    result = made_result(departures)
    del departures["calib"]["revision"]
    assert "is of revision 0 of dgc_released, this code's is 1" in find_identity_fault(result)


def change_file(path: Path) -> None:
    """Write a file of tensors with one number changed."""
    tensors = load_file(path)
    name = sorted(tensors)[0]
    flat = tensors[name].flatten().clone()
    flat[0] = flat[0] + 1
    tensors[name] = flat.view(tensors[name].shape)
    path.unlink()
    save_file(tensors, path)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files in the places of the shipped data."""
    for number, name in enumerate(("rar_heldout", "var_heldout", "reference", "extractor")):
        save_file({"a": torch.full((2,), float(number))}, tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(registry, "ZOO", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["rar_heldout", "reference", "extractor"])
def test_changed_data_are_another_identity(zoo: Path, name: str) -> None:
    departures = departures_of("method=rtn")
    result = made_result(departures)
    other = made_result(departures_of("method=rtn", "model=var_twin"))
    change_file(zoo / f"{name}.safetensors")
    assert find_identity_fault(result).startswith("is of other defaults, or of other held-out")
    assert (find_identity_fault(other) == "") == (name == "rar_heldout")


def test_data_that_are_only_written_anew_are_the_same(zoo: Path) -> None:
    departures = departures_of("method=rtn")
    before = digest_of(departures)
    path = zoo / "rar_heldout.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file(tensors, path, {"written": "again"})
    assert digest_of(departures) == before


def test_the_device_is_part_and_results_of_a_gpu_count_everywhere() -> None:
    departures = departures_of("method=rtn")
    assert digest_of(departures, "cpu") != digest_of(departures, "cuda")
    assert find_identity_fault(made_result(departures)) == ""


def without_identity(origin: dict[str, Any]) -> None:
    del origin["identity_digest"]


def of_unknown_model(origin: dict[str, Any]) -> None:
    origin["identity"]["model"] = "no_twin"


def of_another_device(origin: dict[str, Any]) -> None:
    origin["device_class"] = "cpu"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_identity, "does not state its whole identity; `python -m experiments.identity"),
        (of_unknown_model, "its identity cannot be made whole (model: "),
        (of_another_device, "is of other defaults"),
    ],
)
def test_a_result_that_cannot_prove_its_identity_is_not_used(
    change: Callable[[dict[str, Any]], None], said: str
) -> None:
    result = made_result(departures_of("method=rtn"))
    change(result["provenance"])
    fault = find_identity_fault(result)
    assert fault.startswith(said)
    assert "\n" not in fault


def test_differences_are_named_the_first_ones_in_one_line() -> None:
    one = {"a": 1, "b": {"c": 2, "d": 3}, "e": 4, "f": 5}
    other = {"a": 1, "b": {"c": 0, "d": 0}, "e": 0, "f": 0}
    assert whole.summarize_differences(one, other).split("; ") == [
        "b.c is 2 there, 0 here",
        "b.d is 3 there, 0 here",
        "e is 4 there, 0 here",
        "and 1 more",
    ]
