"""Who changes a default or a number raises the version of its part; `golden.py` says what the two
files hold."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import yaml

from experiments.identity import resolved
from experiments.identity.parts import RAISED_VERSIONS, version_of
from experiments.identity.resolved import LATER_SETTINGS
from tests.experiments.identity import golden
from tests.families import FAMILIES

RAISE = "raise the version of {} in RAISED_VERSIONS (experiments/identity/parts.py), then {}"
# between machines: float64 sums in another order, a rounded tie or a best range of two equal ones
TOLERANCES = {"w_scale": 1e-3, "x_scale": 1e-3, "codes": 1e-3, "error": 0.02, "kl": 0.04}
DEFAULTS = yaml.safe_load(golden.DEFAULTS.read_text())
NUMBERS = json.loads(golden.NUMBERS.read_text())


def default_faults(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What has to be done about defaults that are not those of the file."""
    faults = []
    for part in sorted(expected.keys() | found.keys()):
        before = expected.get(part, {})
        now = found.get(part, {})
        if before.get("version", now.get("version")) != now.get("version"):
            continue  # raised; the test of versions asks for the file to be written
        for name in sorted(before.keys() | now.keys()):
            if name not in before:
                if LATER_SETTINGS.get(name, object()) != now[name]:
                    faults.append(
                        f"{name} is new: if {now[name]} leaves numbers as they were without it, "
                        f"name it in LATER_SETTINGS (experiments/identity/resolved.py), else "
                        f"{RAISE.format(part, golden.WRITE)}"
                    )
            elif name not in now or before[name] != now[name]:
                faults.append(
                    f"{name} was {before[name]}, is {now.get(name, 'gone')}: "
                    f"{RAISE.format(part, golden.WRITE)}"
                )
    return faults


def test_no_default_changes_unless_the_version_of_its_part_does() -> None:
    assert not default_faults(DEFAULTS, golden.describe_defaults())


def test_the_files_are_of_the_present_versions() -> None:
    versions = {part: settings["version"] for part, settings in DEFAULTS.items()}
    for part, version in {**versions, **NUMBERS["versions"]}.items():
        assert version == version_of(part), f"{part} is of another version: {golden.WRITE}"
    cases = {f"{family} {method}" for family, method in golden.method_cases()}
    assert set(NUMBERS["cases"]) == cases, golden.WRITE


def number_faults(method: str, family: str, found: dict[str, float]) -> list[str]:
    """In what numbers of a tiny model are not those of the file."""
    expected = NUMBERS["cases"][f"{family} {method}"]
    parts = ", ".join(golden.parts_of(method, family))
    faults = []
    for name, value in expected.items():
        if not math.isclose(found[name], value, rel_tol=TOLERANCES[name], abs_tol=1e-12):
            faults.append(
                f"{name} of {method} on a tiny {family} was {value}, is {found[name]}: "
                f"{RAISE.format(f'the part that changed ({parts})', golden.WRITE)}"
            )
    return faults


@pytest.mark.parametrize("family", FAMILIES)
def test_no_number_changes_unless_the_version_of_a_part_does(family: str) -> None:
    faults = []
    methods = [method for own, method in golden.method_cases() if own == family]
    for method in methods:
        faults += number_faults(method, family, golden.measure_method(method, family))
    assert not faults


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_draws_the_tokens_that_it_drew(family: str) -> None:
    found = golden.draw_tokens(family)
    expected = NUMBERS["tokens"][family]
    if isinstance(expected, list):
        expected = pytest.approx(expected, rel=0.01)
    assert found == expected, RAISE.format(f"family.{family} or sampler.{family}", golden.WRITE)


# --- the tests themselves notice what they are for


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("method.smoothquant", "method.alpha", 0.9),
        ("method.os_plus", "method.options.os_plus.rows", 32),
        ("rounder.gptq", "method.options.gptq.damping", 0.1),
        ("quantizer", "calib.batch", 32),
    ],
)
def test_a_changed_default_asks_for_the_version_of_its_part(
    part: str, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = golden.describe_defaults()
    assert changed[part][name] != value
    changed[part][name] = value
    (fault,) = default_faults(DEFAULTS, changed)
    assert f"raise the version of {part} in RAISED_VERSIONS" in fault
    changed[part]["version"] += 1
    assert not default_faults(DEFAULTS, changed)
    monkeypatch.setitem(RAISED_VERSIONS, part, version_of(part) + 1)
    with pytest.raises(AssertionError, match="is of another version"):
        test_the_files_are_of_the_present_versions()


def test_a_new_setting_asks_whether_it_leaves_numbers_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = golden.describe_defaults()
    changed["method.svd"]["method.options.svd.order"] = 1
    (fault,) = default_faults(DEFAULTS, changed)
    assert "method.options.svd.order is new" in fault
    monkeypatch.setitem(resolved.LATER_SETTINGS, "method.options.svd.order", 1)
    assert not default_faults(DEFAULTS, changed)


def test_a_changed_default_changes_numbers_too() -> None:
    changes = {"smoothquant": {"alpha": 0.9}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(golden, "SHORTER", changes)
        found = golden.measure_method("smoothquant", "rar")
    faults = number_faults("smoothquant", "rar", found)
    assert {fault.partition(" ")[0] for fault in faults} >= {"w_scale", "x_scale", "codes"}
    assert "method.smoothquant" in faults[0]
