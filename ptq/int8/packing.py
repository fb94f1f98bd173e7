"""Codes of fewer than 8 bits as a stream of bits: 4 codes of 6 bits are 3 bytes, 2 codes of 4 bits
are one.

Code i of the flat sequence takes the bits b i .. b i + b - 1, least significant first, byte by
byte; the last group of 8 codes, which is b bytes, is filled up with zeros. The stream holds c +
2^(b-1), which is never negative.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 8  # codes that end on a byte whatever their width


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many packed codes."""
    return -(-count // GROUP) * bits


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Signed codes of any shape, int8 of less than 8 `bits`, as bytes (packed_size,) uint8."""
    unsigned = codes.flatten().long() + 2 ** (bits - 1)
    groups = F.pad(unsigned, (0, -len(unsigned) % GROUP)).view(-1, GROUP)
    # at most 56 bits are taken
    words = (groups << bits * torch.arange(GROUP, device=codes.device)).sum(dim=1)
    return (
        (words[:, None] >> 8 * torch.arange(bits, device=codes.device) & 255)
        .to(torch.uint8)
        .flatten()
    )


def unpack_codes(packed: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
    """The signed codes int8 of a shape, of which `packed` (packed_size,) uint8 was made."""
    words = (packed.view(-1, bits).long() << 8 * torch.arange(bits, device=packed.device)).sum(
        dim=1
    )
    codes = (words[:, None] >> bits * torch.arange(GROUP, device=packed.device)) & 2**bits - 1
    return (
        (codes.flatten()[: torch.Size(shape).numel()] - 2 ** (bits - 1)).to(torch.int8).view(shape)
    )
