"""GELU as the epilogue of an integer product computes it: by one tanh.

    gelu(x) = x / 2 (1 + tanh u)
    u       = c (e1 + e3 c^2 + e5 c^4), c = x limited to [-5, 5]       for GELU by erf
    u       = x (t1 + t3 x^2)                                          for GELU's tanh form, exactly

A GPU has one instruction for a tanh that is good to eleven bits, `tanh.approx.f32`; with it GELU
and its rounding fit behind a product without keeping the matrix units waiting, which erf and tanh
of the library do not. The polynomial was fitted so that u is the argument of tanh whose GELU is
that by erf: its absolute error is below 3e-5. Codes differ from those of exact GELU by at most
one, in one of a thousand elements at 40 steps per unit (`tests/ptq/int8/test_gelu.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

ERF_LIMIT = 5.0
ERF_POLYNOMIAL = (0.797507865, 0.0370056616, -0.000351519041)  # e1, e3, e5
TANH_POLYNOMIAL = (0.7978845608, 0.0356774081)  # t1, t3
FORMS = ("erf", "tanh")


def approximate_gelu(x: Tensor, form: str) -> Tensor:
    """GELU of float32 x by the formula above, with the library's tanh.

    Args:
        form: "erf" or "tanh".
    """
    if form == "erf":
        first, third, fifth = ERF_POLYNOMIAL
        limited = x.clamp(-ERF_LIMIT, ERF_LIMIT)
        square = limited * limited
        argument = limited * (first + square * (third + square * fifth))
    else:
        first, third = TANH_POLYNOMIAL
        argument = x * (first + third * x * x)
    half = 0.5 * x
    return half + half * torch.tanh(argument)
