"""The formats beside integers: what they round to, how far off they are, and the scale that the
search gives them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq.numbers.formats import log_sqrt2, round_to_e4m3
from ptq.numbers.numerics import (
    QParams,
    choose_group_qparams,
    fake_quantize,
    params_from_range,
    simulate_format,
)
from ptq.numbers.observers import Observer
from ptq.numbers.quantizers import (
    DynamicQuantizer,
    StaticQuantizer,
    choose_qparams,
    fake_quantize_weight,
)
from ptq.pipeline import quantize
from ptq.recipe import Recipe
from ptq.types import ConfigError, QuantSpec
from tests.families import FAMILIES, calibration, decoded, relative, tiny

ONE = torch.ones((), dtype=torch.float64)


def loop(p: float, scale: float, bits: int) -> float:
    """One attention weight by the definition."""
    k = round(-2 * math.log2(p / scale)) if p > 0 else 2**bits
    return 0.0 if k >= 2**bits else scale * math.sqrt(2) ** -max(k, 0)


def attention(rows: int = 40, keys: int = 300, seed: int = 0) -> Tensor:
    """Attention weights of all sharpnesses (rows, keys)."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, keys, generator=generator) * torch.linspace(0, 6, rows)[:, None]
    ).softmax(-1)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_weights_go_to_the_nearest_power_of_the_root_of_two(bits: int, scale: float) -> None:
    p = torch.cat((attention().double().flatten()[::7], torch.tensor([0.0, 1.0, 1e-300, scale])))
    expected = [loop(v, scale, bits) for v in p.tolist()]
    rounded = log_sqrt2(p, scale * ONE, 2**bits)
    np.testing.assert_allclose(rounded.numpy(), expected, rtol=1e-12)
    assert len((-2 * (rounded / scale).log2()).round().unique()) <= 2**bits + 1  # zero is one more
    # rounding twice changes nothing
    torch.testing.assert_close(log_sqrt2(rounded, scale * ONE, 2**bits), rounded)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_worst_error_is_84_percent_of_the_scale_whatever_the_bits(bits: int) -> None:
    p = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    error = (log_sqrt2(p, ONE, 2**bits) - p).abs()
    worst = 1 - 2**-0.25
    assert float(error.max()) == pytest.approx(worst, abs=1e-5)
    assert worst == pytest.approx(0.159, abs=5e-4)
    assert float(p[error.argmax()]) == pytest.approx(0.841, abs=1e-3)
    uniform = fake_quantize(p, params_from_range(p[:1], p[-1:], QuantSpec(bits)), 2**bits)
    assert float((uniform - p).abs().max()) == pytest.approx(0.5 / (2**bits - 1), rel=1e-3)


def test_small_weights_keep_relative_precision_down_to_the_last_power() -> None:
    p = torch.logspace(-6, 0, 5000, dtype=torch.float64)
    relative_error = (log_sqrt2(p, ONE, 64) - p).abs() / p
    assert float(relative_error.max()) <= 2**0.25 - 1 + 1e-12
    last = 2.0 ** (-63 / 2)
    kept = log_sqrt2(
        torch.tensor([last, last * 2**-0.2, last * 2**-0.3, 0.0], dtype=torch.float64), ONE, 64
    )
    assert kept.tolist() == [pytest.approx(last), pytest.approx(last), 0, 0]


@pytest.mark.parametrize("rule", ["percentile_mse", "minmax"])
def test_the_scale_is_the_upper_end_with_the_least_squared_error(rule: str) -> None:
    p = attention(200, 500).double()
    spec = QuantSpec(4, range=rule, format="log_sqrt2")
    ends = [1.0] if rule == "minmax" else [0.999, 0.9999, 0.99999]
    scales = [float(np.quantile(p.numpy(), end)) for end in ends]
    errors = [float((log_sqrt2(p, s * ONE, 16) - p).square().sum()) for s in scales]
    params = choose_qparams(p, spec)
    assert float(params.scale) == pytest.approx(scales[int(np.argmin(errors))], rel=1e-12)
    assert float(params.zero_point) == 0
    assert len(set(scales)) == len(scales)


def test_groups_of_zeros_stay_zero() -> None:
    values = torch.zeros(2, 50)
    for word in ("log_sqrt2", "fp8_e4m3"):
        spec = QuantSpec(8, format=word)
        params = choose_group_qparams(values, spec)
        assert torch.equal(simulate_format(values, params.view(-1, 1), spec), values)


@pytest.mark.parametrize("word", ["log_sqrt2", "fp8_e4m3"])
@pytest.mark.parametrize("observer", ["exact", "histogram"])
def test_a_stream_gives_the_scale_of_all_values_at_once(word: str, observer: str) -> None:
    p = attention(60, 400).view(60, 4, 10, 10)
    spec = QuantSpec(8, observer=observer, format=word)
    watcher = Observer(spec, rows=60)
    for _ in range(watcher.passes):
        for part in p.split(17):
            assert watcher(part) is part
        watcher.end_pass()
    whole = choose_qparams(p, spec)
    found = watcher.params()
    if observer == "exact":
        assert torch.equal(found.scale, whole.scale)
    else:
        errors = [
            float((simulate_format(p, q, spec) - p).double().square().sum()) for q in (whole, found)
        ]
        assert errors[1] < 1.05 * errors[0]


def test_fp8_has_three_mantissa_bits_and_saturates() -> None:
    # from the smallest normal number on
    x = torch.logspace(-6, math.log2(448), 20_000, base=2, dtype=torch.float64)
    x = torch.cat((x, -x))
    # half a step of the mantissa
    assert float(((round_to_e4m3(x, ONE) - x) / x).abs().max()) <= 2**-4 * (1 + 1e-6)
    assert round_to_e4m3(torch.tensor([1e9, -1e9, 449.0]).double(), 2 * ONE).tolist() == [
        896,
        -896,
        448,
    ]
    mantissas = torch.frexp(round_to_e4m3(x, ONE)).mantissa.abs() * 16
    assert torch.equal(mantissas, mantissas.round())


def test_quantizers_use_the_format_of_their_spec() -> None:
    x = attention(5, 64)
    log = QuantSpec(6, format="log_sqrt2")
    fp8 = QuantSpec(8, format="fp8_e4m3")
    scale = torch.tensor([0.5])
    assert torch.equal(StaticQuantizer(log, QParams(scale, 0 * scale))(x), log_sqrt2(x, scale, 64))
    assert torch.equal(DynamicQuantizer(log)(x), log_sqrt2(x, x.amax(-1, keepdim=True), 64))
    assert torch.equal(DynamicQuantizer(fp8)(-x), round_to_e4m3(-x, x.amax(-1, keepdim=True) / 448))
    weight, params = fake_quantize_weight(
        x, QuantSpec(8, granularity="out_channel", range="minmax", format="fp8_e4m3")
    )
    assert torch.equal(weight, round_to_e4m3(x, x.amax(1, keepdim=True) / 448))
    assert params.scale.shape == params.zero_point.shape == (5,)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_eight_bit_floats_come_close_to_full_precision(family: str) -> None:
    adapter = tiny(family, torch.float32)
    chosen = calibration(family, adapter)
    before = adapter.forward(chosen.rows)
    weights = QuantSpec(granularity="out_channel", format="fp8_e4m3")
    quantize(
        adapter, chosen, Recipe(weights, QuantSpec(format="fp8_e4m3"), ("smoothquant",)), batch=6
    )
    assert 0 < relative(adapter.forward(chosen.rows), before) < 0.3


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^format: 'fp4' is not one of fp4_e2m1, .*, fp8_e4m3, int, log2_rows, log_sqrt2, ",
    ):
        QuantSpec(format="fp4")
    with pytest.raises(
        ConfigError, match=r"^bits: 6 does not go with the format fp8_e4m3, allowed is 8$"
    ):
        QuantSpec(6, format="fp8_e4m3")
    fp8 = QuantSpec(format="fp8_e4m3")
    weights = QuantSpec(granularity="out_channel")
    with pytest.raises(
        ConfigError,
        match=r"^quant.activations.format: fp8_e4m3 does not go with gps, allowed is int$",
    ):
        Recipe(weights, fp8, ("smoothquant", "gps"))
    with pytest.raises(
        ConfigError,
        match=r"^quant.activations.format: 'log_sqrt2' is not one of .*, fp8_e4m3, int, mxfp4",
    ):
        Recipe(weights, QuantSpec(format="log_sqrt2"))


@pytest.mark.parametrize("family", ["var", "rar", "par"])
@pytest.mark.parametrize("symmetric", [False, True])
@torch.no_grad()
def test_dynamic_ranges_are_those_of_decoding_with_or_without_masked_keys(
    family: str, symmetric: bool
) -> None:
    adapter = tiny(family)
    chosen = calibration(family, adapter)
    activations = QuantSpec(6, symmetric=symmetric, granularity="token_dynamic")
    quantize(adapter, chosen, Recipe(QuantSpec(6, granularity="out_channel"), activations), batch=4)
    # 1e-8 stands for zero
    assert relative(decoded(adapter, chosen.rows), adapter.forward(chosen.rows)) < 1e-6
