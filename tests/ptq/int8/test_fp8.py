"""Linear layers in 8-bit floats: equality with simulation, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ptq.int8.fp8 import Fp8Linear
from ptq.modules import QuantLinear
from ptq.numbers.numerics import QParams
from ptq.numbers.quantizers import StaticQuantizer, fake_quantize_weight
from ptq.types import ConfigError, QuantSpec

FP8 = QuantSpec(8, range="minmax", format="fp8_e4m3")


def simulated(weights: QuantSpec, activations: QuantSpec) -> QuantLinear:
    torch.manual_seed(0)
    layer = QuantLinear(nn.Linear(64, 32))
    layer.weight, layer.weight_params = fake_quantize_weight(layer.weight, weights)
    layer.input = StaticQuantizer(activations, QParams(torch.tensor([0.01]), torch.tensor([0.0])))
    return layer.requires_grad_(False)


def test_a_layer_computes_what_simulation_does() -> None:
    layer = simulated(FP8, FP8)
    fp8 = Fp8Linear(layer)
    x = torch.randn(2, 5, 64).bfloat16()
    assert torch.equal(fp8.weight.float() * fp8.weight_scale, layer.weight)
    found = fp8(x)
    expected = layer(x.float())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.005 * expected.norm()


def test_what_is_not_in_8_bit_floats_is_refused() -> None:
    for weights, activations, said in (
        (FP8.at("out_channel"), FP8, "need the format fp8_e4m3 per tensor"),
        (FP8, QuantSpec(8), "need the format"),
        (QuantSpec(8), FP8, "the weight is not in fp8_e4m3"),
    ):
        with pytest.raises(ConfigError, match=f"^fp8: .*{said}"):
            Fp8Linear(simulated(weights, activations))
    layer = simulated(FP8, FP8)
    layer.down = torch.ones(2, 64)
    layer.up = torch.ones(32, 2)
    with pytest.raises(ConfigError, match="^fp8: .*allowed is that without a low-rank branch"):
        Fp8Linear(layer)
