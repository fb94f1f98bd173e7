"""The mend for a CPU-only torch beside PyPI's torchvision, without which timm and torch-fidelity
cannot be imported.

PyPI's torchvision is built against CUDA. Beside a CPU-only torch its compiled operators do not
load, and torchvision then fails at import, because it attaches shape functions to two operators
that nobody has declared ("operator torchvision::nms does not exist", pytorch/vision issue 9077).
Declaring the two is enough for all that we use: image transforms, model definitions, timm and
torch-fidelity. `torchvision.ops` and `torchvision.io` stay unusable there.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

# qnms is declared in vain for torchvisions that lack it, which does no harm
NEEDED_AT_IMPORT = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _operators_load() -> bool:
    """Whether torchvision's compiled operators load; also true if there is no torchvision or it has
    none to load."""
    spec = importlib.util.find_spec("torchvision")  # finds the package without importing it
    if spec is None or spec.origin is None:
        return True
    for library in sorted(Path(spec.origin).parent.glob("_C.*")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
    return True


def ensure_torchvision() -> None:
    """Make `import torchvision` possible; call it before anything that imports torchvision, timm or
    torch_fidelity.

    Does nothing on CUDA and ROCm builds of torch, where torchvision's operators load, and when
    called again.
    """
    if torch.version.cuda is not None or torch.version.hip is not None or _operators_load():
        return
    for name in NEEDED_AT_IMPORT:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", _SCHEMA)
