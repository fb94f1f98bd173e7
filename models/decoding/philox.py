"""Counter-based random numbers: image i's draws depend on (seed, i) alone, on any device.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised
over images. The counter is (draw, step, image low, image high) and the key is the seed, so no
generator state is passed around, and shards, resumed runs and other devices see the same numbers
bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# multipliers
_M0 = 0xD2511F53
_M1 = 0xCD9E8D57
# key increments (golden ratio, sqrt(3) - 1)
_W0 = 0x9E3779B9
_W1 = 0xBB67AE85
_MASK = 0xFFFFFFFF


def _multiply_wide(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of m * x for x < 2^32 held in int64, without overflowing a signed 64-bit
    product."""
    # x in halves of 16 bits
    low = x & 0xFFFF
    high = x >> 16
    # both < 2^48
    a = m * low
    b = m * high
    total = a + ((b & 0xFFFF) << 16)
    return (b >> 16) + (total >> 32), total & _MASK


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, ...]:
    """Four 32-bit words (int64 tensors) for broadcastable counters (int64 tensors holding 32-bit
    words)."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0 = key[0] & _MASK
    k1 = key[1] & _MASK
    for _ in range(10):
        h0, l0 = _multiply_wide(_M0, c0)
        h1, l1 = _multiply_wide(_M1, c2)
        c0 = h1 ^ c1 ^ k0
        c1 = l1
        c2 = h0 ^ c3 ^ k1
        c3 = l0
        k0 = (k0 + _W0) & _MASK
        k1 = (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _unit_interval(high: Tensor, low: Tensor) -> Tensor:
    """Numbers in (0, 1), float64, of two 32-bit words each: the middles of 2^52 equal steps."""
    return ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52


def uniform(seed: int, index: Tensor, step: int, n: int = 1) -> Tensor:
    """Uniform numbers in (0, 1), float64 (B, n), for images `index` (B,) and a decoding `step`."""
    if index.is_cuda:  # in one kernel, where starting two hundred takes longer than running them
        numbers = torch.arange(n, device=index.device)
        return uniform_numbers(seed, index, torch.full_like(numbers, step), numbers)
    # (ceil(n / 2),): a counter yields two numbers
    draws = torch.arange((n + 1) // 2, device=index.device)
    image = index.long()[:, None]  # (B, 1)
    words = philox(
        (draws[None], torch.full_like(image, step), image & _MASK, image >> 32), (seed, seed >> 32)
    )
    high = torch.stack((words[0], words[2]), dim=-1).flatten(1)[:, :n]  # (B, n)
    low = torch.stack((words[1], words[3]), dim=-1).flatten(1)[:, :n]  # (B, n)
    return _unit_interval(high, low)


@torch.library.custom_op("ar_ptq::uniform_numbers", mutates_args=())
def uniform_numbers(seed: int, index: Tensor, steps: Tensor, numbers: Tensor) -> Tensor:
    """Of every image (B,), the numbers (n,) of `uniform` at steps (n,), float64 (B, n), in one go.

    Number j of step s is element j of `uniform(seed, index, s, ...)`. On CUDA it is one kernel.
    """
    image = index.long()[:, None]  # (B, 1)
    counter = ((numbers >> 1)[None], steps[None], image & _MASK, image >> 32)
    words = philox(counter, (seed, seed >> 32))  # (B, n) each
    second = (numbers & 1).bool()  # (n,): of the two numbers that a counter yields
    return _unit_interval(
        torch.where(second, words[2], words[0]), torch.where(second, words[3], words[1])
    )


@uniform_numbers.register_kernel("cuda")
def _(seed, index, steps, numbers):
    from models.decoding import philox_kernel  # Triton is there with CUDA only

    return philox_kernel.launch_philox(seed, index.long(), steps, numbers)


def first_uniforms(seed: int, index: Tensor, steps: int) -> Tensor:
    """The first number of `uniform` at steps 0 .. steps - 1, (steps, B)."""
    every_step = torch.arange(steps, device=index.device)  # (steps,)
    numbers = uniform_numbers(seed, index, every_step, torch.zeros_like(every_step))  # (B, steps)
    return numbers.t().contiguous()


def span_uniforms(seed: int, index: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """The numbers of `uniform` for tokens that are drawn a span per step, (B, L).

    Args:
        spans: first and end place of the tokens of every step, one after the other.
    """
    steps: list[int] = []
    numbers: list[int] = []
    for step, (begin, end) in enumerate(spans):
        steps += [step] * (end - begin)
        numbers += range(end - begin)
    places = torch.tensor([steps, numbers], device=index.device)  # (2, L)
    return uniform_numbers(seed, index, *places)


def normal(seed: int, index: Tensor, step: int, n: int) -> Tensor:
    """Standard normal numbers, float64 (B, n), by Box-Muller on `uniform`."""
    u = uniform(seed, index, step, n + n % 2)  # (B, n), n made even: a pair gives a pair
    radius = (-2 * u[:, 0::2].log()).sqrt()  # (B, n / 2)
    angle = 2 * torch.pi * u[:, 1::2]  # (B, n / 2)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)[:, :n]


def categorical(probs: Tensor, u: Tensor) -> Tensor:
    """Draw one category per row by inversion, ids (B,).

    Args:
        probs: (B, V), not negative; rows need not add up to one.
        u: uniform numbers (B,) in (0, 1).
    """
    cdf = probs.double().cumsum(dim=-1)  # (B, V)
    place = u.double() * cdf[:, -1]  # (B,); rows need not add up to one
    ids = torch.searchsorted(cdf, place[:, None]).squeeze(1)
    return ids.clamp_(max=probs.shape[1] - 1)
