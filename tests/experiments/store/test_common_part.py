"""What mappings have in common is taken out of them and put back without loss."""

from __future__ import annotations

import json
from typing import Any

import pytest

from experiments.store.common_part import common_part, with_common, without_common

CASES: dict[str, tuple[list[Any], Any]] = {
    "none": ([], {}),
    "one": ([{"a": 1}], {"a": 1}),
    "equal": ([{"a": [1, {}]}, {"a": [1, {}]}], {"a": [1, {}]}),
    "different": ([{"a": 1}, {"a": 2}], {}),
    "missing": ([{"a": 1, "b": 2}, {"b": 2}], {"b": 2}),
    "inside": ([{"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}], {"a": {"b": 1}}),
    "empty inside": ([{"a": {}}, {"a": {"b": 1}}], {"a": {}}),
    "other kinds": ([{"a": {"b": 1}}, {"a": None}, {"a": [1]}], {}),
    "lists": ([{"a": [1, 2]}, {"a": [1, 3]}], {}),
    "equal numbers": ([{"a": 1, "b": 1}, {"a": 1.0, "b": 1}, {"a": True, "b": 1}], {"b": 1}),
    "zeros": ([{"a": 0.0}, {"a": -0.0}], {}),
}


@pytest.mark.parametrize(("wholes", "expected"), CASES.values(), ids=CASES.keys())
def test_what_is_taken_out_comes_back(wholes: list[Any], expected: Any) -> None:
    common = common_part(wholes)
    assert json.dumps(common) == json.dumps(expected)
    for whole in wholes:
        own = without_common(whole, common)
        # as text: 1 equals 1.0 and true
        again = with_common(own, common)
        assert json.dumps(again, sort_keys=True) == json.dumps(whole, sort_keys=True)
        assert json.dumps(without_common(again, common)) == json.dumps(own), "in the same order"


def test_the_example_of_the_docstring() -> None:
    wholes = [{"model": "m", "eval": {"n": 8, "seed": seed}} for seed in (0, 1)]
    common = common_part(wholes)
    assert common == {"model": "m", "eval": {"n": 8}}
    assert [without_common(whole, common) for whole in wholes] == [
        {"eval": {"seed": 0}},
        {"eval": {"seed": 1}},
    ]


def test_a_whole_can_be_changed_without_changing_another() -> None:
    common = {"eval": {"n": 8}}
    changed = with_common({}, common)
    changed["eval"]["n"] = 9
    assert with_common({"seed": 0}, common) == {"eval": {"n": 8}, "seed": 0}
