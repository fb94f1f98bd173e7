"""All methods that solve for an input transform, by the name of their switch."""

from __future__ import annotations

from ptq.gps import GPS
from ptq.methods.os_plus import OSPlus
from ptq.methods.quarot import OnlineHadamard
from ptq.methods.repq import RepQ
from ptq.methods.shift import SymmetricShift
from ptq.methods.smoothquant import SmoothQuant
from ptq.methods.solver import Method
from ptq.methods.svdquant import SVDQuant
from ptq.options import TRANSFORMS
from ptq.spec import require_agreement
from ptq.staq.block_hadamard import BlockHadamard
from ptq.staq.geometric import Geometric

METHODS: dict[str, Method] = {
    "smoothquant": SmoothQuant,
    "os_plus": OSPlus,
    "repq": RepQ,
    "shift": SymmetricShift,
    "gps": GPS,
    "geometric": Geometric,
    "hadamard": OnlineHadamard,
    "block_hadamard": BlockHadamard,
    "svd": SVDQuant,
}

require_agreement(
    "method",
    {"ptq/options.py (TRANSFORMS)": TRANSFORMS, "ptq/methods/registry.py (METHODS)": METHODS},
)
