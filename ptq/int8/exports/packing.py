"""Codes of fewer than 8 bits as a stream: 4 codes of 6 bits are 3 bytes, 2 codes of 4 bits one.

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
    code_places = bits * torch.arange(GROUP, device=codes.device)  # (GROUP,)
    byte_places = 8 * torch.arange(bits, device=codes.device)  # (bits,)
    words = (groups << code_places).sum(dim=1)  # a group each, at most 56 bits
    return (words[:, None] >> byte_places & 255).to(torch.uint8).flatten()


def unpack_codes(packed: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
    """The signed codes int8 of a shape, of which `packed` (packed_size,) uint8 was made."""
    code_places = bits * torch.arange(GROUP, device=packed.device)  # (GROUP,)
    byte_places = 8 * torch.arange(bits, device=packed.device)  # (bits,)
    words = (packed.view(-1, bits).long() << byte_places).sum(dim=1)  # a group each
    unsigned = (words[:, None] >> code_places) & 2**bits - 1
    count = torch.Size(shape).numel()
    signed = unsigned.flatten()[:count] - 2 ** (bits - 1)
    return signed.to(torch.int8).view(shape)
