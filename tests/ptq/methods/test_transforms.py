"""SmoothQuant and the symmetric shift by their definitions, and the algebra of input transforms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq.methods.shift import centring_shift, symmetric_shift
from ptq.methods.smoothquant import smoothquant_step
from ptq.numbers.quantizers import choose_qparams
from ptq.types import InputTransform, QuantSpec


def tensors(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (400, 12) of different sizes, skewness and offsets, and weights (7, 12)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    x[:, ::3] = x[:, ::3].exp()
    x = x * torch.linspace(0.1, 20, 12) + torch.linspace(-30, 30, 12)
    return x, torch.randn(7, 12, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothquant_is_a_ratio_of_powers_of_the_largest_input_and_weight(alpha: float) -> None:
    x, weight = tensors()
    expected = [
        max(abs(v) for v in x[:, i].tolist()) ** alpha
        / max(abs(v) for v in weight[:, i].tolist()) ** (1 - alpha)
        for i in range(12)
    ]
    transform = smoothquant_step(x, weight, alpha)
    np.testing.assert_allclose(transform.scale.numpy(), expected, rtol=1e-12)
    assert not transform.shift.any()


def test_smoothquant_with_one_half_makes_input_and_weight_peaks_equal() -> None:
    x, weight = tensors()
    transform = smoothquant_step(x, weight)
    torch.testing.assert_close(transform(x).abs().amax(0), (weight * transform.scale).abs().amax(0))


def test_smoothquant_floors_dead_channels_and_columns() -> None:
    x, weight = tensors()
    x[:, 2] = 0
    weight[:, 5] = 0
    scale = smoothquant_step(x, weight).scale
    assert float(scale[2]) == pytest.approx(float((1e-6 / weight[:, 2].abs().max()).sqrt()))
    assert float(scale[5]) == pytest.approx(float((x[:, 5].abs().max() / 1e-6).sqrt()))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_shift_moves_the_zero_point_of_every_channel_to_the_middle(bits: int) -> None:
    x, _ = tensors()
    spec = QuantSpec(bits)
    middle = 2 ** (bits - 1) - 1
    before = choose_qparams(x, spec.at("in_channel"))
    assert float((before.zero_point - middle).abs().max()) > 2**bits  # ranges far from zero
    after = choose_qparams(symmetric_shift(x, spec)(x), spec.at("in_channel"))
    assert float((after.zero_point - middle).abs().max()) <= 2


def test_the_shift_is_scale_times_the_missing_zero_point() -> None:
    x, _ = tensors()
    params = choose_qparams(x, QuantSpec(6, granularity="in_channel"))
    expected = [d * (31 - z) for d, z in zip(params.scale.tolist(), params.zero_point.tolist())]
    np.testing.assert_allclose(centring_shift(params, 6).numpy(), expected, rtol=1e-12)
    # the shift measures, whatever the spec assumes
    transform = symmetric_shift(x, QuantSpec(6, symmetric=True))
    np.testing.assert_allclose(transform.shift.numpy(), expected, rtol=1e-12)
    assert bool((transform.scale == 1).all())


def random_transform(seed: int, channels: int = 12) -> InputTransform:
    generator = torch.Generator().manual_seed(seed)
    scale, shift = torch.randn(2, channels, generator=generator, dtype=torch.float64)
    return InputTransform(scale.exp(), shift)


def test_transforms_compose_in_order_and_associate() -> None:
    x, _ = tensors()
    a, b, c = (random_transform(seed) for seed in range(3))
    torch.testing.assert_close(a.then(b)(x), b(a(x)))
    assert not torch.allclose(a.then(b)(x), a(b(x)), rtol=1e-3)
    left = a.then(b).then(c)
    right = a.then(b.then(c))
    torch.testing.assert_close(left.scale, right.scale)
    torch.testing.assert_close(left.shift, right.shift)


def test_the_identity_changes_nothing_on_either_side() -> None:
    x, _ = tensors()
    one = InputTransform.identity(12, x)
    a = random_transform(0)
    assert torch.equal(one(x), x)
    for both in (one.then(a), a.then(one)):
        assert torch.equal(both.scale, a.scale)
        assert torch.equal(both.shift, a.shift)


def test_a_transformed_input_with_the_undone_weight_gives_the_same_output() -> None:
    x, weight = tensors()
    a = random_transform(1).then(random_transform(2))
    torch.testing.assert_close(a(x) @ (weight * a.scale).t() + weight @ a.shift, x @ weight.t())
