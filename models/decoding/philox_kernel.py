"""The CUDA kernel of `philox.uniform_numbers` (Triton): ten rounds in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # numbers that a program makes

# multipliers, and what is added to the key from round to round (`philox.py`)
M0 = tl.constexpr(0xD2511F53)
M1 = tl.constexpr(0xCD9E8D57)
W0 = tl.constexpr(0x9E3779B9)
W1 = tl.constexpr(0xBB67AE85)
MASK = tl.constexpr(0xFFFFFFFF)
STEP = tl.constexpr(2.0**-52)


@triton.jit
def _uniform_kernel(
    index, steps, numbers, out, seed,
    N,  # numbers of an image
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < N
    image = tl.load(index + tl.program_id(0))
    number = tl.load(numbers + place, mask=inside, other=0)
    # words of 32 bits in 64, so that a product keeps its high half
    c0 = (number >> 1).to(tl.uint64)
    c1 = tl.load(steps + place, mask=inside, other=0).to(tl.uint64)
    c2 = tl.zeros_like(c0) + (image & MASK).to(tl.uint64)
    c3 = tl.zeros_like(c0) + (image >> 32).to(tl.uint64)
    k0 = tl.zeros_like(c0) + (tl.load(seed) & MASK).to(tl.uint64)
    k1 = tl.zeros_like(c0) + ((tl.load(seed) >> 32) & MASK).to(tl.uint64)
    for _ in tl.static_range(10):
        first = c0 * M0
        second = c2 * M1
        c0 = (second >> 32) ^ c1 ^ k0
        c1 = second & MASK
        c2 = (first >> 32) ^ c3 ^ k1
        c3 = first & MASK
        k0 = (k0 + W0) & MASK
        k1 = (k1 + W1) & MASK
    one_of_two = (number & 1) == 0
    high = tl.where(one_of_two, c0, c2)
    low = tl.where(one_of_two, c1, c3)
    value = ((high << 20) | (low >> 12)).to(tl.int64).to(tl.float64)
    tl.store(out + tl.program_id(0).to(tl.int64) * N + place, (value + 0.5) * STEP, mask=inside)


def launch_philox(seed: int, index: Tensor, steps: Tensor, numbers: Tensor) -> Tensor:
    """`philox.uniform_numbers` for int64 tensors on a CUDA device."""
    images = len(index)
    count = len(steps)
    out = torch.empty(images, count, dtype=torch.float64, device=index.device)
    grid = (images, triton.cdiv(count, BLOCK))
    key = torch.full((1,), seed, device=index.device)  # a kernel's integers have 32 bits or 64
    _uniform_kernel[grid](
        index.contiguous(), steps.contiguous(), numbers.contiguous(), out, key, count, BLOCK
    )
    return out
