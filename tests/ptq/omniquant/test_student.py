"""What a student is made of: clipping that narrows ranges, and rounding that gradients pass."""

from __future__ import annotations

import pytest
import torch

from ptq.numbers.numerics import QParams, fake_quantize
from ptq.numbers.quantizers import Clip, fake_quantize_weight
from ptq.omniquant.student import StraightThrough
from ptq.types import QuantSpec


@pytest.mark.parametrize("size", [10, 12, 40])
def test_clipping_groups_is_clipping_rows_of_slices(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 30, generator=generator, dtype=torch.float64)
    parts = weight.split(size, dim=1)
    logits = 4 * torch.randn(2, 8, len(parts), generator=generator, dtype=torch.float64)
    low, high = logits
    by_row = QuantSpec(4, granularity="out_channel")
    by_group = QuantSpec(4, granularity="group", group_size=size)
    found, _ = fake_quantize_weight(weight, by_group, Clip(low.flatten(), high.flatten()))
    expected = []
    for index, part in enumerate(parts):
        clip = Clip(low[:, index], high[:, index])
        expected.append(fake_quantize_weight(part, by_row, clip)[0])
    torch.testing.assert_close(found, torch.cat(expected, dim=1))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_clipping_never_widens_a_range(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    weight[:5] += 10  # all positive
    weight[5:10] -= 10
    weight[10] = 0
    spec = QuantSpec(bits, symmetric, "out_channel", "minmax")
    low, high = 4 * torch.randn(2, 40, generator=generator, dtype=torch.float64)
    widest = fake_quantize_weight(weight, spec)[1].scale
    rounded, params = fake_quantize_weight(weight, spec, Clip(low, high))
    assert bool((params.scale <= widest).all())
    assert bool((params.scale < 0.9 * widest).any())
    assert bool(
        (rounded.amax(1) - rounded.amin(1) <= (spec.levels - 1) * widest * (1 + 1e-9)).all()
    )
    assert torch.equal(rounded[10], weight[10])
    open_ends = Clip(*(torch.full_like(low, 50) for _ in range(2)))
    assert torch.equal(
        fake_quantize_weight(weight, spec, open_ends)[0], fake_quantize_weight(weight, spec)[0]
    )


def test_rounding_passes_gradients_straight_through_inside_the_mode_only() -> None:
    x = torch.linspace(-3, 3, 50, dtype=torch.float64, requires_grad=True)
    params = QParams(torch.tensor(0.5, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64))
    with StraightThrough():
        inside = fake_quantize(x, params, 8)
    (gradient,) = torch.autograd.grad(inside.sum(), x)
    codes = (x / 0.5).round() + 4
    assert torch.equal(gradient, ((codes >= 0) & (codes <= 7)).double())
    outside = fake_quantize(x, params, 8)
    assert torch.equal(inside, outside)
    assert not torch.autograd.grad(outside.sum(), x)[0].any()
