"""Precision and recall of generated features (Kynkaanniemi et al., 2019), in bounded memory.

The manifold of a set is the union of balls around its points that reach to their k-th other point,
k = 3. Precision is the share of generated points inside the reference's manifold, recall that of
reference points inside the generated one.

ADM's evaluator (`evaluations/evaluator.py` of openai/guided-diffusion) compares squared distances
|u|^2 - 2 u.v + |v|^2 with squared radii. It computes them in float16, and for a block of
10,000 x 10,000 pairs in which any of them is infinite in float32. `dtype=torch.float16` does the
same, sums in float32 and every result rounded; float32 and float64 compute throughout in that
format. Ties by rounding make the shares in float16 a few thousandths larger.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.weights.digests import tensors_digest
from ptq.types import ConfigError

NEIGHBOUR = 3
ADM_BLOCK = 10_000  # pairs are in float16 or float32 by blocks of this side
# pairs held at a time
ROWS = 512
COLUMNS = 2048
DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
SAFE_IN_FLOAT16 = 60_000  # no intermediate result below it comes near 65,504
Block = tuple[slice, slice, Tensor]  # rows, columns, squared distances between them

_last_radii: dict[tuple[str, int, torch.dtype, torch.device], Tensor] = {}


def squared_distances(u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """|u_i - v_j|^2 (N, M) of u (N, d) and v (M, d), computed in `dtype`.

    Distances in float16 are returned as float32.
    """
    if dtype == torch.float16:
        return _half_distances(u.half(), v.half())
    u = u.to(dtype)
    v = v.to(dtype)
    distances = (u @ v.T).mul_(-2)  # (N, M), the largest tensor: changed in place
    distances.add_(u.square().sum(1)[:, None])
    distances.add_(v.square().sum(1))
    return distances.clamp_(min=0)  # rounding can leave less


def _half_distances(u: Tensor, v: Tensor) -> Tensor:
    """Squared distances as ADM has them: sums in float32, every result rounded to float16."""
    norm_u = u.square().float().sum(1).half()  # (N,)
    norm_v = v.square().float().sum(1).half()  # (M,)
    product = (u.float() @ v.float().T).half()  # (N, M)
    return (norm_u[:, None] - 2 * product + norm_v).clamp_(min=0).float()


def fits_float16(u: Tensor, v: Tensor) -> bool:
    """Whether all squared distances between u (N, d) and v (M, d) are finite in float16."""
    largest_norms = u.float().square().sum(1).max() + v.float().square().sum(1).max()
    # |u - v|^2 is at most 2 (|u|^2 + |v|^2)
    if 2 * largest_norms < SAFE_IN_FLOAT16:
        return True
    for rows in u.split(ROWS):
        if not bool(squared_distances(rows, v, torch.float16).isfinite().all()):
            return False
    return True


def distance_blocks(
    u: Tensor, v: Tensor, dtype: torch.dtype, device: str | torch.device
) -> Iterator[Block]:
    """Squared distances between all of u (N, d) and v (M, d), a block at a time."""
    # the outer blocks decide the number format, the inner ones bound the memory
    for top in range(0, len(u), ADM_BLOCK):
        for left in range(0, len(v), ADM_BLOCK):
            tall = u[top : top + ADM_BLOCK].to(device)
            wide = v[left : left + ADM_BLOCK].to(device)
            block_dtype = dtype
            if dtype == torch.float16 and not fits_float16(tall, wide):
                block_dtype = torch.float32
            for row in range(0, len(tall), ROWS):
                points = tall[row : row + ROWS]
                rows = slice(top + row, top + row + len(points))
                for column in range(0, len(wide), COLUMNS):
                    others = wide[column : column + COLUMNS]
                    columns = slice(left + column, left + column + len(others))
                    yield rows, columns, squared_distances(points, others, block_dtype)


def squared_radii(
    points: Tensor, k: int, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Tensor:
    """Squared distance (N,) of every point (N, d) to its k-th other one, on `device`."""
    distance_dtype = torch.float32 if dtype == torch.float16 else dtype
    # the point itself is the nearest of the k + 1
    shape = (len(points), k + 1)
    nearest = torch.full(shape, float("inf"), dtype=distance_dtype, device=device)
    for rows, _, distances in distance_blocks(points, points, dtype, device):
        block_k = min(k + 1, distances.shape[1])
        block_nearest = distances.topk(block_k, dim=1, largest=False).values
        candidates = torch.cat((nearest[rows], block_nearest), dim=1)  # (rows, k + 1 + block_k)
        nearest[rows] = candidates.topk(k + 1, dim=1, largest=False).values
    return nearest.amax(dim=1)


def reference_radii(
    reference: Tensor, k: int, dtype: torch.dtype, device: str | torch.device
) -> Tensor:
    """`squared_radii` of a reference, which serves many runs of a process: they are worked out once
    for the last reference that was asked for. Those of 10,000 points take a second."""
    key = (tensors_digest([("reference", reference)]), k, dtype, torch.device(device))
    if key not in _last_radii:
        _last_radii.clear()
        _last_radii[key] = squared_radii(reference, k, dtype, device)
    return _last_radii[key]


def precision_recall(
    generated: Tensor,
    reference: Tensor,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
) -> tuple[float, float]:
    """Precision and recall of features (N, d) against (M, d).

    In a set of fewer than four points, balls reach to the farthest other point.

    Raises:
        ConfigError: the numbers of features differ.
    """
    if generated.shape[1] != reference.shape[1]:
        raise ConfigError(
            f"pool: {generated.shape[1]} features against {reference.shape[1]}, "
            "expected equal numbers"
        )
    k = min(NEIGHBOUR, len(generated) - 1, len(reference) - 1)
    generated_reach = squared_radii(generated, k, dtype, device)  # (N,)
    reference_reach = reference_radii(reference, k, dtype, device)  # (M,)
    precise = torch.zeros(len(generated), dtype=torch.bool, device=device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=device)
    for rows, columns, distances in distance_blocks(generated, reference, dtype, device):
        precise[rows] |= (distances <= reference_reach[columns]).any(dim=1)
        recalled[columns] |= (distances <= generated_reach[rows, None]).any(dim=0)
    return precise.float().mean().item(), recalled.float().mean().item()
