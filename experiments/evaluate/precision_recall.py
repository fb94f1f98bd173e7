"""Precision and recall of generated features (Kynkaanniemi et al., 2019), in blocks of bounded
size.

The manifold of a set is the union of balls around its points that reach to their k-th other point,
k = 3. Precision is the share of generated points inside the reference's manifold, recall that of
reference points inside the generated one.

ADM's evaluator (`evaluations/evaluator.py` of openai/guided-diffusion) compares squared distances |u|^2 - 2 u.v + |v|^2
with squared radii. It computes them in float16, and for a block of 10,000 x 10,000 pairs in which any of them is
infinite in float32. `dtype=torch.float16` does the same, sums in float32 and every result rounded; float32 and float64
compute throughout in that format. Ties by rounding make the shares in float16 a few thousandths larger.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ptq.types import ConfigError

NEIGHBOUR = 3
ADM_BLOCK = 10_000  # pairs are in float16 or float32 by blocks of this side
# pairs held at a time
ROWS = 512
COLUMNS = 2048
DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def squared_distances(u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """|u_i - v_j|^2 (N, M) of u (N, d) and v (M, d), computed in `dtype`; that of float16 is returned in float32."""
    if dtype != torch.float16:
        u = u.to(dtype)
        v = v.to(dtype)
        return (
            (u @ v.T)
            .mul_(-2)
            .add_(u.square().sum(1)[:, None])
            .add_(v.square().sum(1))
            .clamp_(min=0)
        )
    u = u.half()
    v = v.half()
    norm_u, norm_v = (x.square().float().sum(1).half() for x in (u, v))
    product = (u.float() @ v.float().T).half()
    return (norm_u[:, None] - 2 * product + norm_v).clamp_(min=0).float()


def fits_float16(u: Tensor, v: Tensor) -> bool:
    """Whether all squared distances are finite in float16."""
    if 2 * (u.float().square().sum(1).max() + v.float().square().sum(1).max()) < 60_000:
        return True  # no intermediate result comes near 65,504
    parts = (squared_distances(rows, v, torch.float16) for rows in u.split(ROWS))
    return all(bool(part.isfinite().all()) for part in parts)


def distance_blocks(
    u: Tensor, v: Tensor, dtype: torch.dtype, device: str | torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances between all of u (N, d) and v (M, d), as (rows, columns, block)."""
    for a in range(0, len(u), ADM_BLOCK):
        for b in range(0, len(v), ADM_BLOCK):
            tall = u[a : a + ADM_BLOCK].to(device)
            wide = v[b : b + ADM_BLOCK].to(device)
            chosen = (
                torch.float32 if dtype == torch.float16 and not fits_float16(tall, wide) else dtype
            )
            for r in range(0, len(tall), ROWS):
                rows = tall[r : r + ROWS]
                for c in range(0, len(wide), COLUMNS):
                    columns = wide[c : c + COLUMNS]
                    yield (
                        slice(a + r, a + r + len(rows)),
                        slice(b + c, b + c + len(columns)),
                        squared_distances(rows, columns, chosen),
                    )


def squared_radii(
    x: Tensor, k: int, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Tensor:
    """Squared distance (N,) of every point of x (N, d) to its k-th other one, on `device`."""
    kept = torch.float32 if dtype == torch.float16 else dtype
    # the point itself is one of them
    nearest = torch.full((len(x), k + 1), float("inf"), dtype=kept, device=device)
    for rows, _, distance in distance_blocks(x, x, dtype, device):
        near = distance.topk(min(k + 1, distance.shape[1]), dim=1, largest=False).values
        nearest[rows] = (
            torch.cat((nearest[rows], near), dim=1).topk(k + 1, dim=1, largest=False).values
        )
    return nearest.amax(dim=1)


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
            f"pool: {generated.shape[1]} features against {reference.shape[1]}, expected equal numbers"
        )
    k = min(NEIGHBOUR, len(generated) - 1, len(reference) - 1)
    around_generated = squared_radii(generated, k, dtype, device)
    around_reference = squared_radii(reference, k, dtype, device)
    precise = torch.zeros(len(generated), dtype=torch.bool, device=device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=device)
    for rows, columns, distance in distance_blocks(generated, reference, dtype, device):
        precise[rows] |= (distance <= around_reference[columns]).any(dim=1)
        recalled[columns] |= (distance <= around_generated[rows, None]).any(dim=0)
    return precise.float().mean().item(), recalled.float().mean().item()
