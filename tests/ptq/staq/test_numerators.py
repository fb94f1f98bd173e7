"""Attention weights as numerators: rows sum to one, and without rounding this is the softmax, with
key weights or without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq.staq.numerators import NumeratorQuantizer, fit_key_weights, key_weights_of, spread_of

FINE = 2**50  # levels that round nothing away in float64
SINKS = 2


def scores(seed: int = 0, rows: int = 7) -> Tensor:
    """(B, H, T, S), the upper keys of each row masked."""
    generator = torch.Generator().manual_seed(seed)
    s = 3 * torch.randn(2, 3, rows, rows, generator=generator, dtype=torch.float64)
    return s + torch.full((rows, rows), -torch.inf, dtype=torch.float64).triu(1)


def values(seed: int = 1, keys: int = 7) -> Tensor:
    """(B, H, S, D), large at the sinks."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(2, 3, keys, 5, generator=generator, dtype=torch.float64)
    v[:, :, :SINKS] *= 6
    return v


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_sum_to_one_and_use_the_whole_grid(bits: int) -> None:
    p = scores().softmax(dim=-1)
    rounded = NumeratorQuantizer(2**bits)(p)
    torch.testing.assert_close(rounded.sum(dim=-1), torch.ones(2, 3, 7).double())
    codes = rounded / rounded.amax(dim=-1, keepdim=True) * (2**bits - 1)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-9)
    assert bool((rounded[p == 0] == 0).all())


def test_a_constant_shift_of_the_values_shifts_the_average() -> None:
    """What lets a shift of V fold into its bias."""
    key_weights = torch.tensor([0.2, 3.0, 1.0]).double()
    rounder = NumeratorQuantizer(16, key_weights, SINKS)
    p = rounder(scores().softmax(dim=-1))
    weights = key_weights_of(key_weights, SINKS, 7)[:, :, None]
    v = values()
    moved = p @ (weights * (v + 2.5)) - p @ (weights * v)
    torch.testing.assert_close(moved, torch.full_like(moved, 2.5))


def test_the_normalisation_of_what_is_given_does_not_matter() -> None:
    p = scores().softmax(dim=-1)
    rounder = NumeratorQuantizer(64, torch.tensor([0.2, 3.0, 1.0]).double(), SINKS)
    assert torch.equal(rounder(p), rounder(p * 0.25))


def test_key_weights_are_exact_without_rounding() -> None:
    p = scores().softmax(dim=-1)
    v = values()
    tokens = v.transpose(1, 2).flatten(0, 1)  # (N, H, D)
    is_sink = (torch.arange(7) < SINKS).repeat(2)
    key_weights = fit_key_weights(tokens, is_sink)
    weights = key_weights_of(key_weights, SINKS, 7)[:, :, None]  # (H, S, 1)
    rounder = NumeratorQuantizer(FINE, key_weights, SINKS)
    average = rounder(p) @ (weights * v)
    assert float((average - p @ v).abs().max()) < 1e-12


def test_key_weights_give_sinks_the_spread_of_the_rest() -> None:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(4000, 3, 5, generator=generator, dtype=torch.float64)
    is_sink = torch.arange(4000) < 1000
    tokens[is_sink] *= torch.tensor([4.0, 1.0, 0.25])[:, None]
    key_weights = fit_key_weights(tokens, is_sink)
    torch.testing.assert_close(
        spread_of(tokens[is_sink]) * key_weights, spread_of(tokens[~is_sink])
    )
    torch.testing.assert_close(key_weights, torch.tensor([0.25, 1, 4]).double(), rtol=0.1, atol=0)


def test_masked_keys_may_as_well_be_absent() -> None:
    """Decoding sees the keys so far, the full sequence all of them with a mask."""
    rounder = NumeratorQuantizer(64, torch.tensor([0.2, 3.0, 1.0]).double(), SINKS)
    s = scores()
    for row in range(SINKS, 7):
        full = rounder(s[:, :, row : row + 1].softmax(dim=-1))[..., : row + 1]
        step = rounder(s[:, :, row : row + 1, : row + 1].softmax(dim=-1))
        torch.testing.assert_close(full, step, rtol=0, atol=1e-15)
