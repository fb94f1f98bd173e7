"""Linear layers that run in 8-bit floats (e4m3), the other format that current GPUs compute in: a
control for INT8."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq.modules import QuantLinear
from ptq.numbers.formats import e4m3_codes
from ptq.numbers.quantizers import StaticQuantizer
from ptq.spec import ConfigError


class Fp8Linear(nn.Module):
    """y = (x / sx)(W / sw)^T sx sw + b, both factors in e4m3 with one scale each; x and y in
    bfloat16.

    Raises:
        ConfigError: the simulated layer is not quantized so, or has a low-rank branch.
    """

    def __init__(self, linear: QuantLinear) -> None:
        super().__init__()
        quantizer = linear.input
        params = linear.weight_params
        if (
            not isinstance(quantizer, StaticQuantizer)
            or quantizer.spec.format != "fp8_e4m3"
            or params is None
            or quantizer.scale.numel() != 1
            or params.scale.numel() != 1
        ):
            raise ConfigError("fp8: weights and activations need the format fp8_e4m3 per tensor")
        self.register_buffer("input_scale", quantizer.scale.float().reshape(()))
        self.register_buffer("weight_scale", params.scale.float().reshape(()))
        self.register_buffer("weight", e4m3_codes(linear.weight, params.scale))
        if linear.down is not None or not torch.equal(
            self.weight.to(params.scale.dtype) * params.scale, linear.weight
        ):
            raise ConfigError(
                "fp8: the weight is not in fp8_e4m3 alone, allowed is that without a "
                "low-rank branch"
            )
        self.register_buffer("bias", None if linear.bias is None else linear.bias.bfloat16())
        self.transform = linear.transform

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if self.transform is not None:
            x = self.transform(x)
        codes = e4m3_codes(x.float(), self.input_scale)
        y = torch._scaled_mm(
            codes.flatten(0, -2),
            self.weight.t(),
            self.input_scale,
            self.weight_scale,
            self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return y.view(*x.shape[:-1], -1)
