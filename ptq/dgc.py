"""Distribution-Guided Calibration (DGC, section 4.3 of the paper): which calibration rows to keep.

The paper keeps the half of the candidates with the largest Mahalanobis distance from the
candidates' mean,

    rho_n = sqrt((f_n - mu)^T S^-1 (f_n - mu))

with f_n (D,) the feature of candidate n, mu and S the mean and covariance of all features. These
are the rows that widen the distribution the quantizers see. A candidate is one row of a
model's calibration input, with its class (conditional) or without (unconditional). `calibration.py`
draws the candidates and measures their features; two selectors stand here, `dgc` and
`dgc_released`.

`select_paper` does what the paper says, with a covariance that carries information. The feature is
the mean over all tokens but the sinks of the last block's output, standardised; S is Ledoit and
Wolf's shrinkage estimate; candidates are conditional and unconditional rows together.

`select_released` does what the released code does. The feature is token 0 (of MAR's encoder),
conditional and unconditional rows are measured separately, and S^-1 is `torch.linalg.pinv` of the
float32 sample covariance with its default tolerance. The code uses the distances for one number,
the share of conditional rows, and then takes the *first* rows of each kind. That share says little
about the data:

- In exact arithmetic all of n <= D distinct rows lie at (n - 1) / sqrt(n), whatever the data:
  S^-1 inverts exactly the subspace that the rows span. A row that occurs m times lies at
  sqrt((n - 1) (1/m - 1/n)) (`exact_distances`). All released presets have D >= 768 and n = 128.
- In float32 the tolerance cuts the directions whose variance is below D eps (eps 1.2e-7) of the
  largest. The kind of rows that keeps more directions looks farther away. VAR's conditional rows,
  measured without the attention mask, have a steep spectrum: on `var_twin` 31 to 36 of 127
  directions are left of them, 119 to 121 of the unconditional ones, and no conditional row at all
  is kept; by exact arithmetic it would be one half. On `mar_twin` all 127 are left of both kinds,
  the smallest at 2.0 to 2.7 times the tolerance, and the share is 1/2 (seeds 0 to 2, those of the
  committed results).
- Token 0 of RAR and PAR knows the class alone, so their unconditional rows are equal and all rows
  kept are conditional. So it is in VAR with its mask.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptq.registry.entries import register_selector
from ptq.released.families import BLOCK, RELEASED
from ptq.spec import require

if TYPE_CHECKING:
    from ptq.calibration import Selection

log = logging.getLogger(__name__)

FEATURE_NOISE = 1e-6  # relative rounding error of the rows' features taken together


def released_distances(features: Tensor) -> Tensor:
    """Mahalanobis distances (n,) of the released code: float32, features (n, D).

    They are computed on the CPU, so that no device's rounding decides which directions are cut.
    Rows that are equal up to rounding have the distance 0: there the released code divides noise
    by noise.
    """
    features = features.float().cpu()
    centred = features - features.mean(dim=0)  # (n, D)
    if _is_rounding(centred.double().square().sum(), features):
        return torch.zeros(len(features))
    covariance = centred.t() @ centred / (len(features) - 1)  # (D, D)
    inverse = torch.linalg.pinv(covariance)
    squared = ((centred @ inverse) * centred).sum(dim=1)  # (n,)
    return squared.clamp(min=0).sqrt()


def exact_distances(features: Tensor) -> Tensor:
    """The same in exact arithmetic (float64), to tell the definition from its rounding.

    With H the projector on the span of the centred rows the squared distance is (n - 1) H_nn, so an
    n x n eigenproblem is enough. The rank counts directions of the centred rows that stand out of
    rounding: of this computation, and of the features, which come from a float32 forward pass.
    """
    rows, dims = features.shape
    features = features.double()
    centred = features - features.mean(dim=0)  # (n, D)
    values, vectors = torch.linalg.eigh(centred @ centred.t())  # (n,) ascending, (n, n)
    eps = torch.finfo(torch.float64).eps
    computation_noise = values[-1] * rows * eps * max(1.0, dims**0.5)
    in_span = (values > computation_noise) & ~_is_rounding(values, features)  # (n,)
    leverage = vectors[:, in_span].square().sum(dim=1)  # (n,), the diagonal of H
    return ((rows - 1) * leverage).sqrt()


def _is_rounding(energy: Tensor, features: Tensor) -> Tensor:
    """Whether a sum of squared deviations is no more than the features' rounding error."""
    return energy <= FEATURE_NOISE**2 * features.double().square().sum()


def released_share(conditional: Tensor, unconditional: Tensor) -> float:
    """Share of conditional rows that the released code keeps, from the distances (N,) of both
    kinds.

    It is one half if the distances agree (within its tolerances), else what the N largest of the
    2 N hold.
    """
    if torch.allclose(conditional, unconditional, rtol=1e-5, atol=1e-3):
        return 0.5
    images = len(conditional)
    distances = torch.cat((conditional, unconditional))  # (2 N,)
    farthest = distances.argsort(descending=True, stable=True)[:images]  # (N,)
    is_conditional = farthest < images
    return is_conditional.double().mean().item()


def select_released(
    conditional: Tensor, unconditional: Tensor, n: int, block: int | None = None
) -> Tensor:
    """Indices (n,) in the joint pool of the rows that the released code keeps.

    Args:
        conditional, unconditional: features (N, D) each; unconditional rows come second in the
            joint pool.
        n: rows to keep in all, at most N.
        block: the released files hold the pool in blocks of so many images of either kind, and the
            share is rounded, and the first rows are taken, in every block; None is one block.
    """
    images, dims = conditional.shape
    if images <= dims:
        log.warning(
            "dgc_released: %d rows in %d dimensions; "
            "the released distances carry no information about a sample",
            images,
            dims,
        )
    share = released_share(released_distances(conditional), released_distances(unconditional))
    conditional_parts: list[Tensor] = []
    unconditional_parts: list[Tensor] = []
    for first in range(0, n, block or n):
        length = min(block or n, n - first)
        num_conditional = round(share * length)
        conditional_parts.append(first + torch.arange(num_conditional))
        unconditional_parts.append(images + first + torch.arange(length - num_conditional))
    return torch.cat((*conditional_parts, *unconditional_parts))


def shrunk_distances(features: Tensor) -> Tensor:
    """Mahalanobis distances (n,) of standardised features (n, D) under Ledoit and Wolf's
    covariance.

    With the covariance (1 - a) X^T X / n + a v I (a: shrinkage, v = sum e / (n D): mean variance of
    a feature) and X X^T = U diag(e) U^T the squared distance of row i is

        sum_k U_ik^2 e_k / ((1 - a) e_k / n + a v),

    so no D x D matrix is inverted.
    """
    # imported here, since every config imports this module and few runs select by distances
    from sklearn.covariance import ledoit_wolf_shrinkage

    x = features.double().cpu()
    n, dims = x.shape
    deviations = x.std(dim=0)  # (D,)
    # a constant feature is centred alone
    deviations = torch.where(deviations > 0, deviations, torch.ones_like(deviations))
    x = (x - x.mean(dim=0)) / deviations  # (n, D)
    shrinkage = ledoit_wolf_shrinkage(x.numpy(), assume_centered=True)
    values, vectors = torch.linalg.eigh(x @ x.t())  # e (n,) ascending, U (n, n)
    rounding = values[-1] * n * torch.finfo(values.dtype).eps
    # 0 for directions outside the span of the rows, where rounding left a trace
    values = torch.where(values > rounding, values, 0.0)
    variances = (1 - shrinkage) * values / n + shrinkage * values.sum() / (n * dims)
    # without variance there is no distance either: 0 / 1
    variances = torch.where(variances > 0, variances, 1.0)
    return (vectors.square() @ (values / variances)).sqrt()


def select_paper(features: Tensor, n: int) -> Tensor:
    """Indices (n,), ascending, of the n rows of features (N, D) farthest from the mean.

    Of equally distant rows the first ones are kept.
    """
    distances = shrunk_distances(features)
    farthest = distances.argsort(descending=True, stable=True)[:n]
    return farthest.sort().values


@register_selector("dgc")
def farthest_rows(selection: Selection) -> Tensor:
    """The rows farthest from the mean of the joint pool."""
    return select_paper(selection.features(), selection.n)


@register_selector("dgc_released", rows_per_image=1)
def released_rows(selection: Selection) -> Tensor:
    """The released code's share of conditional rows, then the first rows of each kind."""
    require("calib.selector: dgc_released of family", selection.adapter.family, tuple(RELEASED))
    features = selection.features(first_token=True)
    block = BLOCK if RELEASED[selection.adapter.family].averaging else None
    return select_released(*features.split(selection.images), selection.n, block)
