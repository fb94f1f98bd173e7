"""Splitting a tensor into groups loses nothing and repeats nothing; parameters come back in
order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq.numbers.grouping import merge_groups, split_groups
from ptq.numbers.numerics import QParams
from ptq.types import Segments

X = torch.arange(3 * 11 * 4.0).reshape(3, 11, 4)  # every value is different
POSITIONS = torch.arange(11)
CASES = {  # granularity, segments, positions: number of groups
    ("tensor", (0,), 0): 1,
    ("in_channel", (0,), 0): 4,
    ("out_channel", (0,), 0): 3,
    ("token_static", (0,), 0): 1,
    ("token_static", (0, 1, 2), 0): 3,
    ("token_static", (0, 1, 5), 0): 3,
    ("token_static", tuple(range(11)), 0): 11,
    ("token_static", tuple(range(1, 12)), 1): 11,
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_value_is_in_exactly_one_group(case: tuple[str, tuple[int, ...], int]) -> None:
    granularity, starts, first = case
    parts = split_groups(X, granularity, POSITIONS + first, Segments(starts))
    ids = torch.cat([ids for ids, _ in parts])
    assert sorted(ids.tolist()) == list(range(CASES[case]))
    values = torch.cat([values.flatten() for _, values in parts])
    assert torch.equal(values.sort().values, X.flatten())


def test_the_values_of_a_group_are_those_of_its_row_channel_or_positions() -> None:
    def groups(granularity: str, segments: Segments = Segments()) -> dict[int, Tensor]:  # noqa: B008
        parts = split_groups(X, granularity, POSITIONS, segments)
        return {int(i): row.sort().values for ids, values in parts for i, row in zip(ids, values)}

    for i in range(4):
        assert torch.equal(groups("in_channel")[i], X[..., i].flatten().sort().values)
    for i in range(3):
        assert torch.equal(groups("out_channel")[i], X[i].flatten().sort().values)
    by_token = groups("token_static", Segments((0, 1, 5)))
    for i, span in enumerate((slice(0, 1), slice(1, 5), slice(5, 11))):
        assert torch.equal(by_token[i], X[:, span].flatten().sort().values)


def test_groups_of_equal_size_come_as_one_matrix() -> None:
    # 8 single positions and a rest of 3
    parts = split_groups(X, "token_static", POSITIONS, Segments(tuple(range(9))))
    assert sorted(tuple(values.shape) for _, values in parts) == [(1, 36), (8, 12)]
    assert len(split_groups(X, "in_channel", None, Segments())) == 1


def test_positions_may_come_in_any_order_and_leave_groups_out() -> None:
    order = torch.tensor([7, 2, 9])
    parts = split_groups(X[:, order], "token_static", order, Segments((0, 1, 8)))
    found = {int(i): set(row.tolist()) for ids, values in parts for i, row in zip(ids, values)}
    assert found == {1: set(X[:, [7, 2]].flatten().tolist()), 2: set(X[:, 9].flatten().tolist())}


def test_merge_puts_parameters_in_the_order_of_their_groups() -> None:
    params = QParams(torch.rand(11) + 0.1, torch.arange(11.0))
    parts = split_groups(X, "token_static", POSITIONS, Segments((0, 1, 5, 6)))
    merged = merge_groups([(ids, params[ids]) for ids, _ in parts])
    assert torch.equal(merged.scale, params.scale[:4])
    assert torch.equal(merged.zero_point, params.zero_point[:4])


@pytest.mark.parametrize("ids", [[[0, 1], [1, 2]], [[0], [2]]])
def test_merge_refuses_groups_that_occur_twice_or_are_missing(ids: list[list[int]]) -> None:
    parts = [(torch.tensor(i), QParams(torch.ones(len(i)), torch.zeros(len(i)))) for i in ids]
    with pytest.raises(RuntimeError, match="each once"):
        merge_groups(parts)


def test_run_time_granularities_have_no_groups_to_calibrate() -> None:
    with pytest.raises(ValueError, match="token_dynamic"):
        split_groups(X, "token_dynamic", None, Segments())
