"""Tables of parameters per position and per head: what they give a token is that token's alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq.numbers.numerics import fake_quantize, params_from_range
from ptq.numbers.quantizers import choose_qparams
from ptq.staq.positions import (
    ZERO_LIMIT,
    TableQuantizer,
    compact,
    fit_heads,
    fit_positions,
    segments_of,
)
from ptq.types import QuantSpec, Segments

SPEC = QuantSpec(6, range="grid")


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def test_segments_are_the_positions_that_occur() -> None:
    segments = segments_of(torch.tensor([4, 1, 1, 9, 4]))
    assert segments == Segments((1, 4, 9))
    assert segments.index(torch.arange(11)).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2]


def test_a_pair_fits_into_four_bytes_and_keeps_the_range() -> None:
    lo = -normal(2000).abs() - 0.01
    hi = normal(2000, seed=1).abs() + 0.01
    params = params_from_range(lo, hi, QuantSpec(8))
    short = compact(params)
    assert torch.equal(short.scale.bfloat16().float(), short.scale)
    assert torch.equal(short.zero_point.to(torch.int16).float(), short.zero_point)
    assert float((short.scale / params.scale - 1).abs().max()) <= 2**-8
    ends = -short.zero_point * short.scale
    assert bool(((ends - lo).abs() <= short.scale).all())
    far = compact(params_from_range(torch.tensor([1e6]), torch.tensor([1e6 + 1]), QuantSpec(8)))
    assert float(far.zero_point.abs()) <= ZERO_LIMIT
    assert short.pair_bytes == 2 + 2


def test_parameters_of_a_position_are_those_of_its_tokens_alone() -> None:
    positions = torch.arange(5).repeat(30)
    x = normal(150, 16) * (1 + positions)[:, None]
    segments = segments_of(positions)
    params = fit_positions(x, positions, SPEC, segments)
    for position in range(5):
        own = compact(choose_qparams(x[positions == position], SPEC))
        assert torch.equal(params.scale[position], own.scale[0])
        assert torch.equal(params.zero_point[position], own.zero_point[0])


def test_parameters_of_a_head_and_position_are_those_of_its_values_alone() -> None:
    positions = torch.arange(4).repeat(25)
    x = normal(100, 3, 8) * (1 + positions)[:, None, None] * torch.tensor([1.0, 5, 25])[:, None]
    params = fit_heads(x, positions, SPEC, segments_of(positions))
    assert params.scale.shape == (3, 4)
    for head in range(3):
        for position in range(4):
            own = compact(choose_qparams(x[positions == position, head], SPEC))
            assert torch.equal(params.scale[head, position], own.scale[0])
            assert torch.equal(params.zero_point[head, position], own.zero_point[0])


@pytest.mark.parametrize("first", [0, 3, 6])
def test_positions_are_arguments(first: int) -> None:
    """Tokens alone get what they get among all others."""
    length = 9
    x = normal(2, 3, length, 8) * torch.arange(1, length + 1)[:, None]
    tokens = x.transpose(1, 2).flatten(0, 1)
    positions = torch.arange(length)
    params = fit_heads(tokens, positions.repeat(2), SPEC, segments_of(positions))
    table = TableQuantizer(SPEC, params, segments_of(positions), torch.tensor([0.5, 2, 1]), 2)
    whole = table(x, positions)
    part = slice(first, first + 3)
    assert torch.equal(table(x[:, :, part], positions[part]), whole[:, :, part])
    token = fake_quantize(x[:, 1, 5], params.view(3, length)[1, 5], SPEC.levels)
    assert torch.equal(whole[:, 1, 5], token)


def test_one_segment_needs_no_positions() -> None:
    x = normal(2, 3, 5, 8)
    params = fit_heads(x.transpose(1, 2).flatten(0, 1), torch.zeros(10).long(), SPEC, Segments())
    table = TableQuantizer(SPEC, params)
    expected = fake_quantize(x[:, 2], params.view(3)[2], SPEC.levels)
    assert torch.equal(table(x)[:, 2], expected)
