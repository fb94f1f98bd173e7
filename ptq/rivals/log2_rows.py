"""Attention weights as powers of two below the largest of their row.

    k = round(-log2(p / max p)),      p^ = max p 2^-k for k < 2^b, else 0

Shift-and-Sum's quantizer of attention weights (arXiv 2606.16131, `PerTokenLog2Quantizer` of its
code): the scale is found at run time, for every query and head. A masked key stays at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq.registry.entries import register_format


@register_format("log2_rows", operands=("softmax",), own_quantizer=True)
class RowLog2Quantizer(nn.Module):
    """Rounds attention weights p (B, H, T, S).

    Args:
        levels: number of powers, 2^b; zero is a code beyond, as in the authors' code.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, p: Tensor, positions: Tensor | None = None) -> Tensor:
        largest = p.amax(dim=-1, keepdim=True)  # (B, H, T, 1), not 0, as a row sees a key
        power = torch.round(-torch.log2(p / largest))
        return torch.where(power < self.levels, largest * torch.exp2(-power), 0)
