"""What stands between two integer products along the residual stream (`operators.norm_codes`):

    x'    = x + gate * branch                     the residual stream, rounded to its type
    h     = norm(x') * weight + bias              LayerNorm, RMSNorm or nothing
    y     = h * (kappa + scale) + shift           AdaLN's modulation
    codes = round((y - sink mean) / x_scale) + x_zero_point
    sums  = sum of each row's codes

Every part but the codes may be missing. On CUDA it is one kernel (`norm_kernel.py`), which reads
x and branch once and writes x' and codes once; the next product gets its sums for nothing, so
weights with zero points cost no pass of their own.

The branch is the output of a product, or the integer parts of one whose K was split among programs:
then the kernel adds the parts up, exactly, and applies the product's epilogue (`epilogue.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ptq.int8 import ops
from ptq.int8.epilogue import Epilogue, apply_epilogue, params_by_row


class Norm(NamedTuple):
    """How a row is normalised.

    Attributes:
        kind: "layer", "rms", or "none": not at all; or "silu": AdaLN's projection has that in the
            place of a norm.
        weight, bias: (C,), or None.
        eps: added to the variance or mean square.
    """

    kind: str = "none"
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0


class Modulation(NamedTuple):
    """AdaLN's part: h * (kappa + scale) + shift.

    `scale`, `shift` (G, C), like the gate of a branch, may be parts of one projection's output. Row
    r reads row min(r // max(1, M // G), G - 1) of them: one for each token (G = M), one for each
    image (G = B), or one for each image of a class and a last one that all images without a class
    share.

    Attributes:
        kappa: (C,), or None: 1.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    kappa: Tensor | None = None


class Branch(NamedTuple):
    """What is added to the residual stream.

    Attributes:
        value: (M, C) of the stream's type, or int32 (S, M, C): parts of a product.
        gate: (G, C), or None: 1.
        epilogue: of the product, if `value` are its parts.
    """

    value: Tensor
    gate: Tensor | None = None
    epilogue: Epilogue | None = None


class Grid(NamedTuple):
    """The grid of the codes: that of the linear layer that reads them.

    Attributes:
        x_params, positions: as in `Epilogue`.
        bits: of the codes.
        sink_mean: (C,), taken off the tokens at positions below `sinks`; or None.
    """

    x_params: Tensor
    positions: Tensor | None
    bits: int = 8
    sink_mean: Tensor | None = None
    sinks: int = 0


def modulation_rows(values: Tensor, rows: int) -> Tensor:
    """Row by row what `Modulation` says, float32 (M, C)."""
    count = len(values)
    row = torch.arange(rows, device=values.device) // max(1, rows // count)  # (M,)
    return values[row.clamp(max=count - 1)].float()


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """Rows x (M, C) float32 normalised."""
    weight = None if norm.weight is None else norm.weight.float()
    bias = None if norm.bias is None else norm.bias.float()
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
    if norm.kind == "silu":
        x = F.silu(x)
    if norm.kind == "rms":
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + norm.eps)
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def at_sinks(vector: Tensor, sinks: int, positions: Tensor, rows: int) -> Tensor:
    """The vector (C,) in the rows of tokens at positions below `sinks`, else zero: (M, C)."""
    is_sink = (positions < sinks).repeat(rows // len(positions))  # (M,)
    return torch.where(is_sink[:, None], vector, torch.zeros_like(vector))


def reference_norm_codes(
    x: Tensor, norm: Norm, modulation: Modulation, grid: Grid, branch: Branch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `operators.norm_codes` computes, in plain PyTorch."""
    rows = len(x)
    stream = x
    if branch is not None:
        value = branch.value
        if branch.epilogue is not None:
            value = apply_epilogue(value.sum(dim=0), None, branch.epilogue, torch.float32)
        value = value.float()  # (M, C)
        if branch.gate is not None:
            value = value * modulation_rows(branch.gate, rows)
        stream = (x.float() + value).to(x.dtype)
    y = normalise(stream.float(), norm)
    if modulation.scale is not None:
        kappa = 1.0 if modulation.kappa is None else modulation.kappa.float()
        y = y * (kappa + modulation_rows(modulation.scale, rows))
    if modulation.shift is not None:
        y = y + modulation_rows(modulation.shift, rows)
    if grid.sink_mean is not None:
        y = y - at_sinks(grid.sink_mean, grid.sinks, grid.positions, rows)
    x_scale, zero_point, _ = params_by_row(grid.x_params, grid.positions, rows).squeeze(-1)  # (M,)
    codes = ops.static_codes(
        y * (1 / x_scale)[:, None], torch.ones_like(x_scale), zero_point, grid.bits
    )
    return stream, codes, codes.sum(dim=1, dtype=torch.int32)
