"""Floating-point numbers of 4, 6 and 8 bits, and blocks of them that share a scale.

The grids, without infinities and NaN (OCP Microscaling Formats (MX) Specification v1.0, section
5.3; e4m3 is the 8-bit float of formats.py):

    | grid | exponent, mantissa bits | largest | smallest normal | smallest |
    | e2m1 | 2, 1                    | 6       | 1               | .5       |
    | e2m3 | 2, 3                    | 7.5     | 1               | .125     |
    | e3m2 | 3, 2                    | 28      | .25             | .0625    |

`fp4_e2m1`, `fp6_e2m3` and `fp6_e3m2` have a scale in float32 for every group, whatever the
granularity, as `fp8_e4m3` has: the largest magnitude becomes the largest number.

Blocks of 32, `mxfp4`, `mxfp6_e2m3`, `mxfp6_e3m2`: the scale is a power of two, stored as its
exponent in 8 bits (e8m0). Section 6.3 of the specification, for the largest number 2^emax (...):

    X = 2^(floor(log2 max |v|) - emax),      p_i = grid(v_i / X), at most the largest number

so that the largest values of a block may be cut off, by a fourth at most (7.99 becomes 6). A block
with infinity or NaN has the scale NaN, and so is NaN throughout.

Blocks of 16, `nvfp4` (NVIDIA, "Introducing NVFP4", and TensorRT Model Optimizer): the scale is an
8-bit float (e4m3), relative to one scale in float32 for the whole tensor,

    s = max |tensor| / (448 * 6),      d = e4m3(max |v| / 6 / s),      p_i = e2m1(v_i / (d s))

A weight has its own s; that of an activation is fixed in calibration, and d is found at run time.
A block that d would round to zero gets the smallest d, 2^-9, so that nothing is divided by zero.

Rounding is to nearest, ties to even mantissas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.numbers.numerics import QParams, one_for_zero
from ptq.registry.entries import register_format
from ptq.spec import QuantSpec

MX_BLOCK = 32
NV_BLOCK = 16
E8M0_BIAS = 127  # exponents from -127 to 127; the last of the 256 codes is NaN
E4M3_MAX = 448.0
E4M3_LEAST = 2.0**-9


@dataclass(frozen=True)
class FloatGrid:
    """The numbers of a small floating-point format, zero and negative ones included.

    Attributes:
        mantissa: bits of it.
        least_exponent: of normal numbers; those below have its step.
        largest: number.
    """

    mantissa: int
    least_exponent: int
    largest: float

    @property
    def largest_exponent(self) -> int:
        return exponent_of(torch.tensor(self.largest)).int().item()

    def round(self, x: Tensor) -> Tensor:
        """x rounded to the grid, beyond its end to the largest number."""
        x = x.clamp(-self.largest, self.largest)
        step = power_of_two_below(x).clamp_(min=2.0**self.least_exponent)
        step *= 2.0**-self.mantissa
        return (x / step).round_().mul_(step)

    def positive_numbers(self) -> Tensor:
        """The numbers from zero upwards, in order, float32."""
        count = 2**self.mantissa
        numbers = [torch.arange(count) * 2.0 ** (self.least_exponent - self.mantissa)]
        for exponent in range(self.least_exponent, self.largest_exponent + 1):
            numbers.append(torch.arange(count, 2 * count) * 2.0 ** (exponent - self.mantissa))
        return torch.cat(numbers)


def power_of_two_below(x: Tensor) -> Tensor:
    """2^floor(log2 |x|), exactly: the exponent's bits alone; 0 where x is 0 or subnormal."""
    if x.dtype == torch.float64:
        return (x.view(torch.int64) & 0x7FF0_0000_0000_0000).view(torch.float64)
    return (x.float().view(torch.int32) & 0x7F80_0000).view(torch.float32)


def exponent_of(x: Tensor) -> Tensor:
    """floor(log2 |x|), exactly; of zero some number."""
    return torch.frexp(x).exponent - 1


E2M1 = FloatGrid(mantissa=1, least_exponent=0, largest=6.0)
E2M3 = FloatGrid(mantissa=3, least_exponent=0, largest=7.5)
E3M2 = FloatGrid(mantissa=2, least_exponent=-2, largest=28.0)


def magnitude_of(lo: Tensor, hi: Tensor) -> Tensor:
    """The largest magnitude of ranges lo, hi."""
    return torch.maximum(lo.abs(), hi.abs())


def without_zero_points(scale: Tensor) -> QParams:
    return QParams(scale, torch.zeros_like(scale))


def power_of_two_scale(magnitude: Tensor, grid: FloatGrid) -> Tensor:
    """The scales X of blocks with these largest magnitudes; 1 of a block of zeros, NaN of one
    without a largest number."""
    exponent = exponent_of(magnitude) - grid.largest_exponent
    exponent = exponent.clamp_(-E8M0_BIAS, E8M0_BIAS)
    scale = torch.ldexp(torch.ones_like(magnitude), exponent)
    scale = torch.where(magnitude > 0, scale, torch.ones_like(scale))
    return torch.where(magnitude.isfinite(), scale, torch.full_like(scale, torch.nan))


class ScaledFloats:
    """Numbers of a grid times a scale in floating point."""

    grid: FloatGrid

    @classmethod
    def choose_params(cls, lo: Tensor, hi: Tensor, spec: QuantSpec) -> QParams:
        return without_zero_points(one_for_zero(magnitude_of(lo, hi) / cls.grid.largest))

    @classmethod
    def simulate(cls, x: Tensor, params: QParams, spec: QuantSpec) -> Tensor:
        return cls.grid.round(x / params.scale) * params.scale


class BlockFloats(ScaledFloats):
    """Numbers of a grid times a power of two."""

    @classmethod
    def choose_params(cls, lo: Tensor, hi: Tensor, spec: QuantSpec) -> QParams:
        return without_zero_points(power_of_two_scale(magnitude_of(lo, hi), cls.grid))


@register_format("fp4_e2m1", operands=("weights", "activations"), bits=4)
class FP4(ScaledFloats):
    grid = E2M1


@register_format("fp6_e2m3", operands=("weights", "activations"), bits=6)
class FP6E2M3(ScaledFloats):
    grid = E2M3


@register_format("fp6_e3m2", operands=("weights", "activations"), bits=6)
class FP6E3M2(ScaledFloats):
    grid = E3M2


@register_format(
    "mxfp4", operands=("weights", "activations"), bits=4, block=MX_BLOCK, scale_bytes=1
)
class MXFP4(BlockFloats):
    grid = E2M1


@register_format(
    "mxfp6_e2m3", operands=("weights", "activations"), bits=6, block=MX_BLOCK, scale_bytes=1
)
class MXFP6E2M3(BlockFloats):
    grid = E2M3


@register_format(
    "mxfp6_e3m2", operands=("weights", "activations"), bits=6, block=MX_BLOCK, scale_bytes=1
)
class MXFP6E3M2(BlockFloats):
    grid = E3M2


@register_format(
    "nvfp4",
    operands=("weights", "activations"),
    bits=4,
    block=NV_BLOCK,
    tensor_scale=True,
    scale_bytes=1,
)
class NVFP4(ScaledFloats):
    """Numbers of e2m1 times an 8-bit float times the tensor's scale."""

    grid = E2M1

    @classmethod
    def tensor_scale(cls, lo: Tensor, hi: Tensor) -> Tensor:
        """s () of all groups of a tensor."""
        return one_for_zero(magnitude_of(lo, hi).amax() / (E4M3_MAX * cls.grid.largest))

    @classmethod
    def choose_params(
        cls, lo: Tensor, hi: Tensor, spec: QuantSpec, whole: Tensor | None = None
    ) -> QParams:
        """Scales d s of blocks; s is `whole`, or that of these blocks."""
        whole = cls.tensor_scale(lo, hi) if whole is None else whole
        relative = cls.block_codes(magnitude_of(lo, hi), whole)
        return without_zero_points(relative.to(lo.dtype) * whole)

    @classmethod
    def block_codes(cls, magnitude: Tensor, whole: Tensor) -> Tensor:
        """d as 8-bit floats."""
        relative = (magnitude / cls.grid.largest / whole).clamp(E4M3_LEAST, E4M3_MAX)
        return relative.to(torch.float8_e4m3fn)
