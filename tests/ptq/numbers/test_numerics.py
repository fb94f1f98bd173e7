"""The vectorised range search against a loop in NumPy, its corner cases, and the released code
beyond 2^24 values."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq.numbers.numerics import (
    NonFiniteError,
    QParams,
    choose_group_qparams,
    fake_quantize,
    params_from_range,
    pick_least_error,
    quantize,
)
from ptq.numbers.quantizers import choose_qparams
from ptq.types import QuantSpec
from tests.reference import Golden


def loop(values: np.ndarray, spec: QuantSpec) -> tuple[list[float], list[float]]:
    """Scales and zero points of the rows of `values` by the definition, one row and one candidate
    at a time."""
    top = 2**spec.bits - 1
    scales = []
    zeros = []
    for v in values:
        best = math.inf
        percentiles = (1.0,) if spec.range == "minmax" else (0.999, 0.9999, 0.99999)
        for p in percentiles:
            hi = np.quantile(v, p)
            lo = np.quantile(v, 1 - p)
            if spec.include_zero:
                hi = max(hi, -1e-8)
                lo = min(lo, 1e-8)
            d = (hi - lo) / top
            z = None
            if spec.symmetric:
                d = max(abs(lo), abs(hi)) / (2 ** (spec.bits - 1) - 1)
                z = 2 ** (spec.bits - 1)
            else:
                z = np.round(-lo / d)
            error = np.mean(((np.clip(np.round(v / d) + z, 0, top) - z) * d - v) ** 2)
            if error < best:
                best = error
                scale = d
                zero = z
        scales.append(scale)
        zeros.append(zero)
    return scales, zeros


SHAPES = {
    "normal": lambda r, s: r.standard_normal(s),
    "one-sided": lambda r, s: r.standard_exponential(s) + 0.1,
    "negative": lambda r, s: -3 - r.random_sample(s),
    "heavy": lambda r, s: r.standard_t(2, s),
    "tiny": lambda r, s: 1e-9 * r.standard_normal(s),
    "offset": lambda r, s: 50 + r.standard_normal(s),
}


def check_against_loop(values: np.ndarray, spec: QuantSpec, dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(values).to(dtype)
    params = choose_group_qparams(tensor, spec)
    scales, zeros = loop(tensor.double().numpy(), spec)
    np.testing.assert_allclose(params.scale.double().numpy(), scales, rtol=1e-5)
    np.testing.assert_array_equal(params.zero_point.double().numpy(), zeros)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 4),
    n=st.integers(2, 3000),
    kind=st.sampled_from(sorted(SHAPES)),
    spec=st.builds(
        QuantSpec,
        bits=st.integers(2, 8),
        symmetric=st.booleans(),
        include_zero=st.booleans(),
        range=st.sampled_from(["minmax", "percentile_mse"]),
    ),
)
def test_the_range_search_equals_a_loop_over_groups_and_candidates(
    seed: int, groups: int, n: int, kind: str, spec: QuantSpec
) -> None:
    values = SHAPES[kind](np.random.RandomState(seed), (groups, n))
    check_against_loop(values, spec, torch.float64)


@pytest.mark.parametrize("kind", sorted(SHAPES))
@pytest.mark.parametrize("include_zero", [False, True])
def test_float32_does_not_change_scales_or_zero_points(kind: str, include_zero: bool) -> None:
    for seed, n in enumerate((2, 60, 1000, 30001)):
        values = SHAPES[kind](np.random.RandomState(seed), (3, n))
        check_against_loop(values, QuantSpec(6, include_zero=include_zero), torch.float32)


def test_all_three_percentiles_are_chosen_by_some_group() -> None:
    rng = np.random.RandomState(0)
    values = np.stack(
        (rng.standard_normal(100_001), rng.random_sample(100_001), rng.standard_t(4, 100_001))
    )
    chosen: set[int] = set()
    for bits in (3, 4, 6, 8):
        check_against_loop(values, QuantSpec(bits), torch.float64)
        los, his = (
            np.quantile(values, q, axis=1) for q in ((1e-3, 1e-4, 1e-5), (0.999, 0.9999, 0.99999))
        )
        scales = choose_group_qparams(torch.from_numpy(values), QuantSpec(bits)).scale.numpy()
        chosen |= set(np.abs((his - los) / (2**bits - 1) / scales - 1).argmin(axis=0).tolist())
    assert chosen == {0, 1, 2}


def test_among_equal_errors_the_first_candidate_stays_group_by_group() -> None:
    candidates = [QParams(torch.full((4,), float(c)), torch.full((4,), float(c))) for c in range(3)]
    errors = torch.tensor([[1.0, 2, 2, 3], [1, 1, 2, 3], [1, 1, 1, 3]])
    for field in (
        pick_least_error(candidates, errors).scale,
        pick_least_error(candidates, errors).zero_point,
    ):
        assert field.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_groups_are_exact_and_zero_points_fit_32_bits(
    dtype: torch.dtype, bits: int, symmetric: bool
) -> None:
    constants = torch.tensor([0.0, 1.0, -7.5, 1e-20, -3e20, 1e30], dtype=dtype)
    values = constants[:, None].expand(-1, 50)
    params = choose_group_qparams(values, QuantSpec(bits, symmetric))
    rounded = fake_quantize(values, params.view(-1, 1), 2**bits)
    torch.testing.assert_close(rounded, values.clone(), rtol=1e-6, atol=0)
    assert bool((params.scale > 0).all())
    nearly = torch.tensor([[5.0, 5.0 + 5e-7, 5.0]])
    nearly = choose_group_qparams(nearly, QuantSpec(bits))
    assert float(nearly.zero_point.abs().max()) < 2**31


def test_the_worst_error_is_half_a_step_plus_that_of_the_zero_point() -> None:
    values = (
        torch.rand(5, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9 - 2
    )
    for bits in range(2, 9):
        spec = QuantSpec(bits, range="minmax")
        params = choose_group_qparams(values, spec)
        error = (fake_quantize(values, params.view(-1, 1), spec.levels) - values).abs().amax(dim=1)
        assert bool((error <= params.scale * (1 + 1e-9)).all())
        codes = quantize(values, params.view(-1, 1), spec.levels)
        assert codes.min() >= 0
        assert codes.max() <= spec.levels - 1


def test_a_range_without_zero_has_its_zero_point_outside_the_codes() -> None:
    lo = torch.tensor([5.0])
    hi = torch.tensor([6.0])
    free, stretched = (
        params_from_range(lo, hi, QuantSpec(6, include_zero=flag)) for flag in (False, True)
    )
    assert (round(float(free.zero_point)), round(float(stretched.zero_point))) == (-315, 0)
    assert float(free.scale) == pytest.approx(1 / 63)
    assert float(stretched.scale) == pytest.approx(6 / 63, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", ["minmax", "percentile_mse"])
def test_nan_and_infinity_are_refused_in_one_line(bad: float, rule: str) -> None:
    values = torch.zeros(3, 5000)
    values[1, 2500] = bad
    with pytest.raises(NonFiniteError) as error:
        choose_group_qparams(values, QuantSpec(range=rule))
    assert "\n" not in str(error.value)


def big_tensor() -> Tensor:
    z = np.random.RandomState(zlib.crc32(b"bigpct")).random_sample(16_800_000)
    z *= 2
    z -= 1
    x = torch.from_numpy((z**3 * 4).astype(np.float32)).reshape(2, 100, 84000)
    x[0, 0, :50] *= 20
    return x


def test_groups_beyond_2_to_the_24_values_equal_the_released_fallback() -> None:
    golden = Golden("ptq_percentile_fallback")
    x = big_tensor()
    spec = QuantSpec(6)
    assert x.numel() > 2**24
    golden.check("x_stride99991", x.flatten()[::99991])
    params = choose_qparams(x, spec)
    golden.check("delta", params.scale[0])
    golden.check("zp", params.zero_point[0])
    golden.check("out_stride99991", fake_quantize(x.flatten()[::99991], params, spec.levels))
