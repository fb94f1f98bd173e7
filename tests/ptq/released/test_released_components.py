"""The released PTQ4ARVG's numbers, component by component, from the library's primitives.

The released families differ (`ptq/released/families.py`): RAR and MAR stretch the ranges of their
uniform quantizers to contain zero, VAR and PAR do not, and average parameters over calls, so that
even the first call leaves rounding in the zero points; PAR's token parameters are bfloat16 and its
attention weights powers of sqrt(2).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ptq import dgc
from ptq.gps import error_energies, optimal_ratio, widest_channel
from ptq.methods.shift import centring_shift
from ptq.methods.smoothquant import smoothquant_step
from ptq.numbers.grouping import broadcast_params
from ptq.numbers.numerics import QParams, fake_quantize
from ptq.numbers.quantizers import StaticQuantizer, choose_qparams, fake_quantize_weight
from ptq.released.families import RELEASED
from ptq.released.running_quantizer import RunningQuantizer, running_average
from ptq.stwq import static_quantizer
from ptq.types import QuantSpec, Segments
from tests.reference import Golden

SINKS = {"rar": 2, "var": 1, "par": 8, "mar": 64}
AVERAGING = ("var", "par")
BITS = (4, 6, 8)
UNIFORM = {
    "x_tensor": "tensor",
    "x_channel": "in_channel",
    "w_channel": "out_channel",
    "w_tensor": "tensor",
    "a4_tensor": "tensor",
    "pos_tensor": "tensor",
    "x2d_row": "out_channel",
}

families = pytest.mark.parametrize("family", SINKS)
all_bits = pytest.mark.parametrize("bits", BITS)


def golden(family: str) -> Golden:
    return Golden(f"ptq_{family}_components")


def uniform(family: str, bits: int) -> QuantSpec:
    return QuantSpec(bits, include_zero=family in ("rar", "mar"))


def inputs(data: Golden, family: str, kind: str) -> Tensor:
    """The calibration inputs (N, C) of the entries `3d`, `2d` and `nosink`."""
    x = data["x"]
    return {"3d": x.flatten(0, 1), "2d": x[:, -1], "nosink": x[:, SINKS[family] :].flatten(0, 1)}[
        kind
    ]


def check(data: Golden, entry: str, params: QParams, averaging: bool) -> None:
    data.check(f"{entry}delta", params.scale.view_as(data[f"{entry}delta"]))
    stored = data[f"{entry}zp"].flatten()
    torch.testing.assert_close(params.zero_point, stored, rtol=0, atol=2e-5 if averaging else 0)


@families
@all_bits
def test_uniform_quantizers(family: str, bits: int) -> None:
    data = golden(family)
    tensors = {
        "x": data["x"],
        "w": data["w"],
        "a4": data["a4"],
        "pos": data["x"].abs() + 1,
        "x2d": data["x"][:, -1],
    }
    for entry, granularity in UNIFORM.items():
        x = tensors[entry.split("_")[0]]
        spec = uniform(family, bits).at(granularity)
        params = choose_qparams(x, spec)
        check(data, f"uq{bits}:{entry}:", params, family in AVERAGING)
        data.check(
            f"uq{bits}:{entry}:out", fake_quantize(x, broadcast_params(params, spec), spec.levels)
        )


@families
def test_smoothquant_scales(family: str) -> None:
    data = golden(family)
    sinks = SINKS[family]
    cases = {
        "3d": ("3d", 0.5),
        "3d_nosink": ("nosink", 0.5),
        "2d": ("2d", 0.5),
        "3d_alpha0.8": ("3d", 0.8),
    }
    assert sinks > 0
    for entry, (kind, alpha) in cases.items():
        data.check(
            f"smooth:{entry}:scales",
            smoothquant_step(inputs(data, family, kind), data["w"], alpha).scale,
        )
        if f"smooth:{entry}:shifts" in data:
            assert not data[f"smooth:{entry}:shifts"].any()


@families
@all_bits
@pytest.mark.parametrize("kind", ["3d", "2d", "nosink"])
def test_gps_scales_and_symmetric_shifts(family: str, bits: int, kind: str) -> None:
    data = golden(family)
    entry = f"gps{bits}:{kind}"
    x = inputs(data, family, kind)
    weight = data["w"]
    stored = QParams(data[f"{entry}:act_delta"].flatten(), data[f"{entry}:act_zp"].flatten())
    rounded = fake_quantize(
        weight, QParams(data[f"{entry}:w_delta"], data[f"{entry}:w_zp"]), 2**bits
    )
    anchor, _ = widest_channel(x)
    e = error_energies(x, weight, rounded, stored[anchor], 2**bits, "squares")
    data.check(f"{entry}:scales", (e.anchor_scale * optimal_ratio(e, "squares")).float())
    shift = centring_shift(stored, bits)  # released: x' = x / s - p with s = 1
    assert bool((data[f"sym{bits}:{kind}:scales"] == 1).all())
    data.check(f"sym{bits}:{kind}:shifts", shift)


@families
@all_bits
@pytest.mark.parametrize("sink", [0, 1])
def test_a_smoothed_quantized_linear(family: str, bits: int, sink: int) -> None:
    data = golden(family)
    entry = f"qlin{bits}:sink{sink}"
    spec = uniform(family, bits)
    x = data["x"]
    weight = data["w"]
    sinks = SINKS[family] * sink
    data.check(f"{entry}:fp_out", F.linear(x, weight, data["bias"]))
    smooth = smoothquant_step(x[:, sinks:].flatten(0, 1), weight)
    data.check(f"{entry}:scales", smooth.scale)
    data.check(f"{entry}:weight_after", weight * smooth.scale)
    rounded, params = fake_quantize_weight(weight * smooth.scale, spec.at("out_channel"))
    data.check(f"{entry}:w_delta", params.scale[:, None])
    leading, rest = smooth(x).tensor_split([sinks], dim=1)
    found = choose_qparams(rest, spec.at("in_channel"))
    check(data, f"{entry}:act_", found, family in AVERAGING)
    # the leading tokens pass unquantized
    rest = StaticQuantizer(spec.at("in_channel"), found)(rest)
    data.check(f"{entry}:q_out", F.linear(torch.cat((leading, rest), dim=1), rounded, data["bias"]))


@all_bits
@pytest.mark.parametrize(
    ("per_token", "segments"), [(0, Segments((0, 1, 2))), (1, Segments(tuple(range(12))))]
)
def test_token_aware_quantizer_of_rar(bits: int, per_token: int, segments: Segments) -> None:
    data = golden("rar")
    entry = f"taq{bits}:cw{per_token}"
    spec = QuantSpec(bits, granularity="token_static")
    positions = torch.arange(12)
    params = choose_qparams(data["xt"], spec, positions, segments)
    check(data, f"{entry}:", params, averaging=False)
    quantizer = static_quantizer(spec, params, segments)
    data.check(f"{entry}:out", quantizer(data["xt"], positions))
    for first in (2, 7):  # the first tokens of the sequence
        if f"{entry}:infer{first}" in data:
            data.check(f"{entry}:infer{first}", quantizer(data["z"][:, :first], positions[:first]))
    # the released code takes every single token for one of the last of 3 groups
    for current in (1, 2, 5):
        where = positions[[max(current, 2) if not per_token else current]]
        data.check(
            f"{entry}:infer1_cur{current}", quantizer(data["z"][:, current : current + 1], where)
        )


@all_bits
def test_token_aware_quantizer_of_mar(bits: int) -> None:
    data = golden("mar")
    entry = f"taq{bits}:cw0"
    spec = QuantSpec(bits, granularity="token_static")
    segments = Segments(tuple(range(65)))
    params = choose_qparams(data["xt"], spec, torch.arange(80), segments)
    check(data, f"{entry}:", params, averaging=False)
    quantizer = static_quantizer(spec, params, segments)
    data.check(f"{entry}:out", quantizer(data["xt"], torch.arange(80)))
    for n in (64, 65, 80, 256):
        data.check(f"{entry}:infer{n}", quantizer(data["z"][:, :n], torch.arange(n)))


@all_bits
@pytest.mark.parametrize("per_scale", [0, 1])
def test_token_aware_quantizer_of_var(bits: int, per_scale: int) -> None:
    data = golden("var")
    entry = f"taq{bits}:cw{per_scale}"
    spec = QuantSpec(bits, granularity="token_static")
    sizes = [s * s for s in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
    starts = [sum(sizes[:i]) for i in range(10)]
    segments = Segments(tuple(starts) if per_scale else (0, 1))
    params = choose_qparams(data["xt"], spec, torch.arange(680), segments)
    check(data, f"{entry}:", params, averaging=True)
    # a second call has moved them
    running_average = QParams(data[f"{entry}:ema2_delta"], data[f"{entry}:ema2_zp"])
    quantizer = static_quantizer(spec, running_average, segments)
    for n in (1, 4, 9, 100, 256):
        positions = torch.arange(n) + starts[sizes.index(n)]
        data.check(f"{entry}:infer{n}", quantizer(data["z"][:, :n], positions))


@all_bits
def test_token_aware_quantizer_of_par(bits: int) -> None:
    data = golden("par")
    entry = f"taq{bits}:cw0"
    how = RELEASED["par"]
    spec = QuantSpec(bits, granularity="token_static")
    positions = torch.arange(576)
    quantizer = RunningQuantizer(spec, how.tokens, averaging=True, dtype=how.token_dtype)
    for call, x in (("", data["xt"]), ("ema2_", data["xt2"])):
        out = quantizer(x, positions)
        for name, value in (
            ("delta", quantizer.params.scale),
            ("zp", quantizer.params.zero_point),
            ("out", out),
        ):
            data.check(f"{entry}:{call}{name}", value)
    quantizer.frozen = True
    for current, n in ((0, 1), (1, 1), (3, 1), (4, 4), (8, 4), (572, 4)):
        data.check(
            f"{entry}:infer_cur{current}_n{n}",
            quantizer(data["z"][:, :n], current + torch.arange(n)),
        )


@pytest.mark.parametrize("family", AVERAGING)
@all_bits
def test_averages_over_two_calls(family: str, bits: int) -> None:
    data = golden(family)
    spec = uniform(family, bits)
    for entry, granularity in (("x_tensor", "tensor"), ("x_channel", "in_channel")):
        quantizer = RunningQuantizer(spec.at(granularity), averaging=True)
        for call, x in (("", data["x"]), ("ema2_", data["x2"])):
            out = quantizer(x)
            check(data, f"uq{bits}:{entry}:{call}", quantizer.params, averaging=True)
            data.check(f"uq{bits}:{entry}:{call}out", out)
    first, second = (smoothquant_step(data[x].flatten(0, 1), data["w"]).scale for x in ("x", "x2"))
    data.check("smooth:ema2:scales", running_average(second, running_average(first, None)))


@all_bits
def test_log_quantizer_of_par(bits: int) -> None:
    data = golden("par")
    spec = QuantSpec(bits, format=RELEASED["par"].softmax)
    quantizer = RunningQuantizer(spec, averaging=True)
    data.check(f"log{bits}:out", quantizer(data["a4"]))
    data.check(f"log{bits}:delta", quantizer.params.scale.squeeze())


@families
@pytest.mark.parametrize("kind", ["full", "wide"])
def test_mahalanobis_distances_and_the_conditional_share(family: str, kind: str) -> None:
    data = golden(family)
    features = data[f"maha:{kind}:samples"][:, 0]
    conditional, unconditional = (
        dgc.released_distances(half) for half in features.split(len(features) // 2)
    )
    data.check(f"maha:{kind}:dist_cond", conditional)
    data.check(f"maha:{kind}:dist_uncond", unconditional)
    assert dgc.released_share(conditional, unconditional) == pytest.approx(
        float(data[f"maha:{kind}:pct"])
    )
