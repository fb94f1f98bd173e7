"""Values validate themselves in one line that names the field, the value and what is allowed."""

from __future__ import annotations

import pytest
import torch

from ptq.types import CalibrationSet, ConfigError, QuantSpec, Segments, require

GRANULARITIES = (
    "out_channel, tensor, group, token_dynamic, group_dynamic, head, head_segment, channel, "
    "in_channel, token_static"
)
BAD = {
    "bits: 1 is not an integer from 2 to 8, or 16": {"bits": 1},
    "bits: 9 is not an integer from 2 to 8, or 16": {"bits": 9},
    "bits: 6.0 is not an integer from 2 to 8, or 16": {"bits": 6.0},
    "bits: True is not an integer from 2 to 8, or 16": {"bits": True},
    "bits: '6' is not an integer from 2 to 8, or 16": {"bits": "6"},
    f"granularity: 'row' is not one of {GRANULARITIES}": {"granularity": "row"},
    "range: 'max' is not one of minmax, percentile_mse, grid": {"range": "max"},
    "observer: 'none' is not one of exact, histogram": {"observer": "none"},
}


@pytest.mark.parametrize("message", BAD)
def test_a_spec_names_the_field_the_value_and_what_is_allowed(message: str) -> None:
    with pytest.raises(ConfigError) as error:
        QuantSpec(**BAD[message])
    assert str(error.value) == message


def test_a_spec_at_another_granularity_is_checked_and_otherwise_the_same() -> None:
    spec = QuantSpec(4, symmetric=True, range="minmax", include_zero=True)
    assert spec.at("in_channel") == QuantSpec(4, True, "in_channel", "minmax", "exact", True)
    assert [QuantSpec(b).levels for b in range(2, 9)] == [4, 8, 16, 32, 64, 128, 256]
    with pytest.raises(ConfigError, match="^granularity: 'pixel'"):
        spec.at("pixel")


def test_require_accepts_what_is_allowed_and_raises_a_value_error() -> None:
    require("calib.selector", "dgc", ("dgc", "random"))
    with pytest.raises(ValueError, match="^calib.selector: 'dcg' is not one of dgc, random$"):
        require("calib.selector", "dcg", ("dgc", "random"))


@pytest.mark.parametrize("starts", [(0,), (0, 1, 2), (0, 1, 5, 9), (1, 2, 3), tuple(range(30))])
def test_a_position_belongs_to_the_last_segment_that_has_started(starts: tuple[int, ...]) -> None:
    positions = torch.tensor([0, 1, 2, 3, 8, 9, 29, 500, 1, 0])
    expected = [max(sum(start <= p for start in starts) - 1, 0) for p in positions.tolist()]
    assert Segments(starts).index(positions).tolist() == expected
    assert len(Segments(starts)) == len(starts)


def test_batches_hold_all_rows_in_order() -> None:
    rows = {"ids": torch.arange(30).view(10, 3), "condition": torch.arange(10)}
    parts = CalibrationSet(rows, torch.ones(10, dtype=torch.bool)).batches(4)
    assert [len(p["ids"]) for p in parts] == [4, 4, 2]
    for key, value in rows.items():
        assert torch.equal(torch.cat([p[key] for p in parts]), value)
