"""Number formats for the input of fc2: negative and positive numbers have a step and a grid each.

GELU leaves small negative and large positive values, and a grid with one step wastes half its codes
on the negative side. Two methods for VAR give either side its own range:

    | format           | negative numbers      | positive numbers   | from          |
    | two_sided_int    | 2^(b-1) - 1 steps     | 2^(b-1) - 1 steps  | Shift-and-Sum |
    | two_sided_float  | b = 4: 7 steps (e1m2) | floats, e2m1       | FPQVAR        |
    |                  | b = 6: 32 steps       | floats, e2m3       |               |

Sources: Moon and Ham, 2026, arXiv 2606.16131 (cvlab-yonsei/Shift-and-Sum, `quant/quantizer.py`,
`fc2`), at six bits per token and at four in groups of 64; Wei et al., 2025, arXiv 2505.16335,
"dual format" (PKU-SEC-Lab/FPQVAR, `quant_utils.py`), in groups of 128 and per token. Zero is on
both sides, so a code is one of 2^b - 1, and of 2^b for floats of six bits.

The parameters of a range are two steps: `scale` of positive numbers and, where other formats have
their zero point, that of negative ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq.numbers.numerics import QParams, one_for_zero
from ptq.numbers.small_floats import E2M1, E2M3, FloatGrid
from ptq.registry.entries import register_format
from ptq.spec import QuantSpec

# of floats, by bits: steps below zero, and the grid above
FLOATS = {4: (7, E2M1), 6: (32, E2M3)}


def sides_of(spec: QuantSpec) -> tuple[int, FloatGrid | None]:
    """How many steps there are below zero, and the grid above; None: as below."""
    if spec.format == "two_sided_float":
        return FLOATS[spec.bits]
    return spec.levels // 2 - 1, None


class TwoSided:
    """Uniform steps below zero, and a grid above."""

    @staticmethod
    def choose_params(lo: Tensor, hi: Tensor, spec: QuantSpec) -> QParams:
        steps, floats = sides_of(spec)
        largest = steps if floats is None else floats.largest
        above = one_for_zero(hi.clamp(min=0) / largest)
        return QParams(above, one_for_zero((-lo).clamp(min=0) / steps))

    @staticmethod
    def simulate(x: Tensor, params: QParams, spec: QuantSpec) -> Tensor:
        steps, floats = sides_of(spec)
        above = x.clamp(min=0) / params.scale
        if floats is None:
            above = torch.round(above).clamp(max=steps)
        else:
            above = floats.round(above)
        below = torch.round((-x).clamp(min=0) / params.zero_point).clamp(max=steps)
        return above * params.scale - below * params.zero_point


@register_format("two_sided_int", operands=("activations",))
class TwoSidedIntegers(TwoSided):
    """Shift-and-Sum's."""


@register_format("two_sided_float", operands=("activations",), bits=tuple(FLOATS))
class TwoSidedFloats(TwoSided):
    """FPQVAR's."""
