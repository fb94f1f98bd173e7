"""Which attentions of a model can be in integers, and the modules that make them so."""

from __future__ import annotations

from torch import nn

from ptq.int8 import attention, numerators
from ptq.modules import QuantMatMul
from ptq.staq.numerators import NumeratorQuantizer


def simulation_reason(qk: QuantMatMul, pv: QuantMatMul) -> str | None:
    """Why attention stays simulated, in one line; None if it can be in integers."""
    if pv.simulated is not None:
        return pv.simulated
    if isinstance(pv.a, NumeratorQuantizer):
        return numerators.numerator_reason(qk, pv)
    return attention.simulation_reason(qk, pv)


def find_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Attention in integers, by the names of the products `qk` and `pv` that it replaces, wherever
    that can be."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        qk = getattr(module, "qk", None)
        pv = getattr(module, "pv", None)
        if not isinstance(qk, QuantMatMul) or not isinstance(pv, QuantMatMul):
            continue
        if simulation_reason(qk, pv) is not None:
            continue
        is_numerators = isinstance(pv.a, NumeratorQuantizer)
        make = numerators.numerator_modules if is_numerators else attention.attention_modules
        found[f"{name}.qk"], found[f"{name}.pv"] = make(qk, pv)
    return found
