"""Groups of channels, heads, and heads by segments: the same as a loop over their parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ptq.numbers.observers import Observer
from ptq.numbers.quantizers import (
    GroupQuantizer,
    StaticQuantizer,
    choose_qparams,
    fake_quantize_weight,
    run_time_quantizer,
)
from ptq.sites import Segments
from ptq.spec import ConfigError, QuantSpec
from ptq.stwq import static_quantizer

SEGMENTS = Segments((0, 1, 4))
POSITIONS = torch.arange(7)


def made_up(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()


def group(size: int, bits: int = 4, **changes: object) -> QuantSpec:
    return QuantSpec(bits, granularity="group", group_size=size, **changes)


@pytest.mark.parametrize("size", [40, 41, 1000])
@pytest.mark.parametrize("choice", ["minmax", "percentile_mse", "grid"])
def test_a_group_of_the_whole_row_is_out_channel(size: int, choice: str) -> None:
    weight = made_up(6, 40)
    whole, params = fake_quantize_weight(weight, group(size, range=choice))
    by_row, row_params = fake_quantize_weight(
        weight, QuantSpec(4, granularity="out_channel", range=choice)
    )
    assert torch.equal(whole, by_row)
    assert torch.equal(params.scale, row_params.scale)
    assert torch.equal(params.zero_point, row_params.zero_point)


@pytest.mark.parametrize("size", [1, 8, 12, 16])  # 12 and 16 leave a smaller group
def test_groups_of_columns_are_rounded_one_by_one(size: int) -> None:
    weight = made_up(6, 40)
    rounded, params = fake_quantize_weight(weight, group(size))
    parts = weight.split(size, dim=1)
    by_row = QuantSpec(4, granularity="out_channel")
    expected = [fake_quantize_weight(part, by_row) for part in parts]
    assert torch.equal(rounded, torch.cat([part for part, _ in expected], dim=1))
    scales = torch.stack([own.scale for _, own in expected], dim=1)
    assert torch.equal(params.scale, scales.flatten())
    # rounding with these parameters twice changes nothing
    again, _ = fake_quantize_weight(rounded, group(size, range="minmax"))
    torch.testing.assert_close(again, rounded)


@pytest.mark.parametrize("size", [8, 12, 1000])
def test_groups_at_run_time_are_tokens_of_slices(size: int) -> None:
    x = made_up(3, 5, 40)
    per_token = run_time_quantizer(QuantSpec(4, granularity="token_dynamic"))
    expected = torch.cat([per_token(part) for part in x.split(size, dim=-1)], dim=-1)
    assert torch.equal(run_time_quantizer(group(size))(x), expected)
    assert torch.equal(GroupQuantizer(group(size).at_run_time())(x), expected)


def observed(spec: QuantSpec, x: Tensor, segments: Segments) -> StaticQuantizer:
    """The quantizer that two batches of x make."""
    observer = Observer(spec, segments, rows=len(x))
    for _ in range(observer.passes):
        for part in x.split(2):
            observer(part, POSITIONS)
        observer.end_pass()
    return static_quantizer(spec, observer.params(), segments)


@pytest.mark.parametrize("choice", ["minmax", "percentile_mse"])
def test_static_groups_are_tensors_of_slices(choice: str) -> None:
    x = made_up(4, 7, 40)
    tensor = QuantSpec(4, range=choice)
    expected = []
    for part in x.split(12, dim=-1):
        expected.append(StaticQuantizer(tensor, choose_qparams(part, tensor))(part))
    found = observed(group(12, range=choice), x, Segments())
    assert torch.equal(found(x, POSITIONS), torch.cat(expected, dim=-1))


def test_groups_of_segments_are_segments_of_slices() -> None:
    x = made_up(4, 7, 40)
    by_segment = QuantSpec(4, granularity="token_static")
    expected = []
    for part in x.split(12, dim=-1):
        params = choose_qparams(part, by_segment, POSITIONS, SEGMENTS)
        expected.append(static_quantizer(by_segment, params, SEGMENTS)(part, POSITIONS))
    spec = replace(by_segment, group_size=12)
    found = observed(spec, x, SEGMENTS)
    assert torch.equal(found(x, POSITIONS), torch.cat(expected, dim=-1))
    # a decoding step has the same parameters
    assert torch.equal(found(x[:, 5:6], POSITIONS[5:6]), found(x, POSITIONS)[:, 5:6])


@pytest.mark.parametrize("granularity", ["head", "head_segment", "channel"])
def test_operands_of_attention_are_rounded_by_head(granularity: str) -> None:
    x = made_up(4, 3, 7, 8)  # (B, H, T, D)
    found = observed(QuantSpec(4, granularity=granularity), x, SEGMENTS)(x, POSITIONS)
    inner = {"head": "tensor", "head_segment": "token_static", "channel": "in_channel"}
    spec = QuantSpec(4, granularity=inner[granularity])
    for head in range(3):
        own = x[:, head]  # (B, T, D)
        params = choose_qparams(own, spec, POSITIONS, SEGMENTS)
        expected = static_quantizer(spec, params, SEGMENTS)(own, POSITIONS)
        assert torch.equal(found[:, head], expected)


def test_a_segment_that_got_no_values_is_named() -> None:
    observer = Observer(QuantSpec(8, granularity="head_segment", range="minmax"), SEGMENTS, 4, "q")
    observer(made_up(4, 3, 4, 8), torch.arange(4))
    with pytest.raises(RuntimeError, match="^q: not every one of the 3 segments got activations$"):
        observer.params()


def test_bits_of_an_operand_that_is_left_as_it_is() -> None:
    spec = QuantSpec(16, granularity="out_channel")
    weight = made_up(3, 4)
    assert fake_quantize_weight(weight, spec) == (weight, None)
    assert run_time_quantizer(QuantSpec(16))(weight) is weight


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"granularity": "group"}, "group_size: null does not go with granularity=group, allowed"),
        ({"group_size": 64}, "group_size: 64 does not go with granularity=tensor, allowed is null"),
        ({"granularity": "group", "group_size": 0}, "group_size: 0 is not an integer of at least"),
        ({"granularity": "groups"}, "granularity: 'groups' is not one of out_channel, tensor, "),
        ({"bits": 9}, "bits: 9 is not an integer from 2 to 8, or 16"),
    ],
)
def test_what_makes_no_groups_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantSpec(**given)
    assert str(caught.value).startswith(said)
