"""Hadamard matrices of the widths that occur, and rotations by them.

H (n, n) has entries +-1 and H H^T = n I, so R = H / sqrt(n) is orthogonal, and every entry of x R
mixes all channels of x with weights of equal magnitude: a large channel is spread evenly over all.
Orders built here are n = k 2^m with k from

    Sylvester   n = 2^m:      H_2n = [[H_n, H_n], [H_n, -H_n]]
    Paley I     k = q + 1,    q prime, q = 3 mod 4:   H = I + S,  S = [[0, 1], [-1, Q]]
    Paley II    k = 2 (q + 1), q prime, q = 1 mod 4:
                    H = C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]],  C = [[0, 1], [1, Q]]

Q_ij = chi(i - j), chi the quadratic character modulo q, x the Kronecker product. A width that is no
such order (100, whose matrix needs a field of 49 elements; 30, which no Hadamard matrix has) is cut
into blocks of the largest order that divides it: five of order 20, fifteen of order 2.

    order      12   20    28    36    44    60    68    200
    built by   I11  I19   II13  II17  I43   I59   I67   I199
    factor of  768  1280  3584  2304  1408  1920  8704  3200

A matrix is the Kronecker product of a small factor with a Sylvester matrix, and x R is two small
products, of order a and b with n = a b. In plain PyTorch this is faster than a fast Walsh-Hadamard
transform, whose log2(n) butterflies each pass over the memory.

Official code (spcl/QuaRot, fast-hadamard-transform) has a table of eleven orders k, and looks k up
apart for weights and for activations: with 20 heads the two differ, without an error. Here a
rotation is one object for both.
"""

from __future__ import annotations

from functools import cache
from math import isqrt

import torch
from torch import Tensor, nn

from ptq.spec import ConfigError

DENSE = 64  # up to this order one product is made


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, isqrt(n) + 1))


def _character(q: int) -> Tensor:
    """Q (q, q): chi(i - j), 1 for a square modulo the prime q, -1 for none, 0 for i = j."""
    i = torch.arange(q)
    chi = -torch.ones(q)
    chi[i * i % q] = 1
    chi[0] = 0
    return chi[(i[:, None] - i) % q]


def _bordered(q: int, sign: int) -> Tensor:
    """[[0, 1], [sign, Q]] (q + 1, q + 1)."""
    top = torch.cat((torch.zeros(1, 1), torch.ones(1, q)), dim=1)
    bottom = torch.cat((torch.full((q, 1), float(sign)), _character(q)), dim=1)
    return torch.cat((top, bottom))


def _kind(k: int) -> int:
    """Which of Paley's constructions over a prime field has the order k: 1, 2, or 0 for neither."""
    if k % 4:
        return 0
    if _is_prime(k - 1):
        return 1
    if k % 8 == 4 and _is_prime(k // 2 - 1):
        return 2
    return 0


def core_order(n: int) -> int | None:
    """The k of n = k 2^m: 1 for a power of two, else the least of Paley's; None without one."""
    odd = n // (n & -n)
    if odd == 1:
        return 1
    k = odd
    while n % k == 0:
        if _kind(k):
            return k
        k *= 2
    return None


@cache
def hadamard_matrix(n: int, device: torch.device | None = None) -> Tensor:
    """A Hadamard matrix H (n, n), float32, the same object for every call: not to be changed.

    Raises:
        ConfigError: there is no construction of this order here.
    """
    k = core_order(n)
    if k is None:
        raise ConfigError(
            f"hadamard: there is no matrix of order {n} here, allowed is k 2^m with k of Paley or 1"
        )
    matrix = torch.ones(1, 1)
    if _kind(k) == 1:
        matrix = torch.eye(k) + _bordered(k - 1, -1)
    elif _kind(k) == 2:
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        corner = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        matrix = torch.kron(_bordered(k // 2 - 1, 1), pair) + torch.kron(torch.eye(k // 2), corner)
    while len(matrix) < n:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return matrix.to(device)


@cache
def largest_order(width: int) -> int:
    """The largest order of a Hadamard matrix that divides `width`."""
    for blocks in range(1, width):
        if width % blocks == 0 and core_order(width // blocks):
            return width // blocks
    return 1


def kronecker_factors(n: int) -> tuple[int, int]:
    """Orders a = k 2^i, b = 2^j whose Kronecker product is H_n: a b = n, a + b smallest."""
    if n <= DENSE:
        return n, 1
    power_of_two = n // core_order(n)
    factors = []
    right = 1
    while right <= power_of_two:
        factors.append((n // right, right))
        right *= 2
    return min(factors, key=sum)


class HadamardRotation(nn.Module):
    """x R along the last dimension, R = diag(signs) H / sqrt(n), block by block: n is the largest
    order that divides `width`, and x may have any multiple of n channels.

    Args:
        seed: of random signs (width,), of which there are none without it; x then has `width`
            channels.
        device: where the matrices lie to begin with; rotations of one order share them.
    """

    def __init__(
        self, width: int, seed: int | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.order = largest_order(width)
        a, b = kronecker_factors(self.order)
        self.register_buffer("left", hadamard_matrix(a, device), persistent=False)
        self.register_buffer("right", hadamard_matrix(b, device), persistent=False)
        signs = None
        if seed is not None:
            # on the CPU, so that the signs are the same everywhere
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randint(2, (width,), generator=generator, device="cpu")
            signs = (2.0 * drawn - 1).to(device)
        self.register_buffer("signs", signs, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x R of x (..., width), in the number format of x."""
        if self.signs is not None:
            x = x * self.signs.to(x.dtype)
        return self._product(x, self.left, self.right)

    def inverse(self, x: Tensor) -> Tensor:
        """x R^T of x (..., width)."""
        x = self._product(x, self.left.t(), self.right.t())
        return x if self.signs is None else x * self.signs.to(x.dtype)

    def _product(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """x (left x right) / sqrt(n) per block: products with all rows of x at once."""
        blocks = x.reshape(*x.shape[:-1], -1, len(left), len(right))  # (..., blocks, a, b)
        if len(right) > 1:
            blocks = blocks @ right.to(x.dtype)
        turned = blocks.mT  # (..., blocks, b, a)
        # one product over all rows, not a batch of small ones
        turned = (turned.reshape(-1, len(left)) @ left.to(x.dtype)).view(turned.shape)
        return turned.mT.reshape(x.shape) * self.order**-0.5


class AcrossHeads(nn.Module):
    """What is left of the rotation of `heads` * `size` channels whose heads are rotated already,
    each by the R of `HadamardRotation(size)`: H_heads x I. Both together are H_heads x H_size.

    Where one of the two orders has no matrix (30 heads, heads of 100 channels) the heads are
    rotated back and all channels together, so that both together are the Hadamard rotation of the
    whole width.
    """

    def __init__(self, heads: int, size: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.size = size
        self.within = None
        if core_order(heads) and core_order(size):
            self.across = HadamardRotation(heads, device=device)
        else:
            self.across = HadamardRotation(heads * size, device=device)
            self.within = HadamardRotation(size, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """x R of x (..., heads * size)."""
        if self.within is not None:
            return self.across(self.within.inverse(x))
        # (..., size, heads) inside: heads last, where the rotation acts
        return self.across(x.unflatten(-1, (self.heads, -1)).mT).mT.reshape(x.shape)
