"""Distribution-Guided Calibration (DGC, section 4.3 of the paper): which calibration rows to keep.

The paper keeps the half of the candidates with the largest Mahalanobis distance from the
candidates' mean,

    rho_n = sqrt((f_n - mu)^T S^-1 (f_n - mu))

with f_n (D,) the feature of candidate n, mu and S the mean and covariance of all features. These
are the rows that widen the distribution the quantizers see. A candidate is one row of a
model's calibration input, with its class (conditional) or without (unconditional). `calibration.py`
draws the candidates, measures their features and calls one of the two selectors that stand here.

`select_paper` does what the paper says, with a covariance that carries information. The feature is
the mean over all tokens but the sinks of the last block's output, standardised; S is Ledoit and
Wolf's shrinkage estimate; candidates are conditional and unconditional rows together.

`select_released` does what the released code does. The feature is token 0 (of MAR's encoder),
conditional and unconditional rows are measured separately, and S^-1 is the pseudo-inverse of the
sample covariance. With n <= D distinct rows that distance is (n - 1) / sqrt(n) for every row,
whatever the data: S^-1 then inverts exactly the subspace that the rows span. A row that occurs m
times has sqrt((n - 1) (1/m - 1/n)). All released presets have D >= 768 and n = 128, so the
distances say only how often a row is repeated, and a model with ten classes only counts repeats.
The code uses them for one number, the share of conditional rows, and then takes the *first* rows of
each kind.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)

FEATURE_NOISE = 1e-6  # relative rounding error of the rows' features taken together


def pinv_distances(features: Tensor) -> Tensor:
    """Mahalanobis distances (n,) under the pseudo-inverse of the sample covariance, features (n,
    D), in float64.

    With H the projector on the span of the centred rows the squared distance is (n - 1) H_nn, so an
    n x n eigenproblem is enough. The rank counts directions of the centred rows that stand out of
    rounding: of this computation, and of the features, which come from a float32 forward pass. Rows
    that differ by less than the latter count as equal; otherwise noise in the causally blind first
    token of RAR and PAR would set the distances.
    """
    rows, dims = features.shape
    features = features.double()
    centred = features - features.mean(dim=0)  # (n, D)
    values, vectors = torch.linalg.eigh(centred @ centred.t())  # (n,) ascending, (n, n)
    eps = torch.finfo(torch.float64).eps
    computation_noise = values[-1] * rows * eps * max(1.0, dims**0.5)
    feature_noise = FEATURE_NOISE**2 * features.square().sum()
    in_span = (values > computation_noise) & (values > feature_noise)  # (n,)
    leverage = vectors[:, in_span].square().sum(dim=1)  # (n,), the diagonal of H
    return ((rows - 1) * leverage).sqrt()


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
    farthest = distances.argsort(descending=True, stable=True)[:images]
    is_conditional = farthest < images
    return is_conditional.double().mean().item()


def select_released(conditional: Tensor, unconditional: Tensor, n: int) -> tuple[int, int]:
    """How many leading conditional and unconditional rows the released code keeps.

    Args:
        conditional, unconditional: features (N, D) each.
        n: rows to keep in all.
    """
    rows, dims = conditional.shape
    if rows <= dims:
        log.warning(
            "dgc_released: %d rows in %d dimensions; "
            "the released distances carry no information about a sample",
            rows,
            dims,
        )
    share = released_share(pinv_distances(conditional), pinv_distances(unconditional))
    num_conditional = round(share * n)
    return num_conditional, n - num_conditional


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
    x = (x - x.mean(dim=0)) / deviations
    shrinkage = ledoit_wolf_shrinkage(x.numpy(), assume_centered=True)
    values, vectors = torch.linalg.eigh(x @ x.t())  # e (n,) ascending, U (n, n)
    rounding = values[-1] * n * torch.finfo(values.dtype).eps
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
