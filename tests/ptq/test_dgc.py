"""What the released calibration distances say (how often a row occurs), and that the shrunk ones
find outliers."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor

from ptq import dgc


def features(n: int, dims: int, seed: int = 0) -> Tensor:
    """Correlated features with a spectrum that falls off."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dims, generator=generator) * torch.linspace(2, 0.1, dims)
    return x @ torch.linalg.qr(torch.randn(dims, dims, generator=generator)).Q + 3


@pytest.mark.parametrize(("n", "dims"), [(16, 16), (16, 40), (64, 200), (128, 768)])
def test_distinct_rows_in_as_many_dimensions_have_one_exact_distance(n: int, dims: int) -> None:
    x = features(n, dims)
    x[:5] *= 20  # however far some rows are
    expected = torch.full((n,), (n - 1) / math.sqrt(n), dtype=torch.float64)
    torch.testing.assert_close(dgc.exact_distances(x), expected, rtol=1e-6, atol=0)


def test_a_repeated_row_has_an_exact_distance_that_counts_its_repeats() -> None:
    counts = torch.tensor([1, 1, 2, 3, 5, 8] + [1] * 12)
    x = features(len(counts), 64).repeat_interleave(counts, dim=0)
    n = int(counts.sum())
    expected = ((n - 1) * (1 / counts.double() - 1 / n)).sqrt().repeat_interleave(counts)
    torch.testing.assert_close(dgc.exact_distances(x), expected, rtol=1e-6, atol=0)


def test_with_few_dimensions_the_exact_distance_is_mahalanobis() -> None:
    x = features(200, 12).double()
    centred = (x - x.mean(0)).numpy()
    inverse = np.linalg.inv(np.cov(x.numpy().T))
    expected = [math.sqrt(row @ inverse @ row) for row in centred]
    np.testing.assert_allclose(dgc.exact_distances(x).numpy(), expected, rtol=1e-8)


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_rows_that_differ_by_rounding_alone_have_no_distance(noise: float) -> None:
    x = features(1, 64).expand(32, -1).clone()
    x *= 1 + noise * torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    assert not dgc.exact_distances(x).any()
    assert not dgc.released_distances(x).any()


def test_the_released_share_for_a_causally_blind_token_is_all_conditional() -> None:
    """RAR and PAR: unconditional token-0 features are equal, so every conditional row is
    farther."""
    conditional = features(128, 200)[torch.arange(128) % 100]
    blind = features(1, 200).expand(128, -1)
    for n in (128, 40):
        for block in (None, 32):
            assert dgc.select_released(conditional, blind, n, block).tolist() == list(range(n))


def test_equal_distances_give_half_and_others_the_share_of_the_farthest() -> None:
    one = torch.ones(8, dtype=torch.float64)
    assert dgc.released_share(one, one + 5e-4) == 0.5
    assert dgc.released_share(one, one + 1) == 0.0
    assert dgc.released_share(torch.tensor([1.0, 5, 5, 5]), torch.tensor([1.0, 2, 3, 9])) == 0.75
    kept = dgc.select_released(features(32, 64, 0), features(32, 64, 1), 10)
    assert kept.tolist() == [0, 1, 2, 3, 4, 32, 33, 34, 35, 36]


def steep(n: int, dims: int, rank: int, seed: int) -> Tensor:
    """Rows of full rank in float64; in float32 `rank` directions stand out of pinv's tolerance."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(dims, n, generator=generator, dtype=torch.float64)).Q
    sizes = torch.cat((torch.linspace(4, 1, rank), torch.full((n - rank,), 1e-4))).double()
    return (left * sizes @ right.t()).float()


def numpy_distances(x: Tensor) -> np.ndarray:
    """As the released code computes them: float32, NumPy's pseudo-inverse with PyTorch's default
    tolerance, one row at a time."""
    rows = x.numpy()
    centred = rows - rows.mean(axis=0)
    covariance = centred.T @ centred / np.float32(len(rows) - 1)
    tolerance = x.shape[1] * np.finfo(np.float32).eps
    inverse = np.linalg.pinv(covariance, rcond=tolerance)
    return np.array([math.sqrt(row @ inverse @ row) for row in centred])


@pytest.mark.parametrize(("rank", "other"), [(10, 40), (40, 10), (20, 30), (5, 60)])
def test_the_released_share_follows_the_rank_that_float32_leaves(rank: int, other: int) -> None:
    """By exact arithmetic all distances are equal and the share is one half."""
    conditional = steep(64, 96, rank, 0)
    unconditional = steep(64, 96, other, 1)
    exact = [dgc.exact_distances(x) for x in (conditional, unconditional)]
    assert dgc.released_share(*exact) == 0.5

    ours = [dgc.released_distances(x) for x in (conditional, unconditional)]
    theirs = [numpy_distances(x) for x in (conditional, unconditional)]
    for measured, expected in zip(ours, theirs):
        np.testing.assert_allclose(measured.numpy(), expected, rtol=2e-2)
    # the mean squared distance is the rank but for a factor, so the larger rank lies farther out
    assert float(ours[0].square().sum()) == pytest.approx(63 * rank, rel=0.03)
    farthest = np.argsort(-np.concatenate(theirs), kind="stable")[:64]
    share = float((farthest < 64).mean())
    assert dgc.released_share(*ours) == pytest.approx(share, abs=2 / 64)
    assert (share > 0.5) == (rank > other)


@pytest.mark.parametrize(
    ("share", "n", "block", "conditional"),
    [
        (6 / 128, 128, None, [6]),
        (6 / 128, 128, 32, [2, 2, 2, 2]),  # 1.5 of 32, rounded to even
        (10 / 128, 128, 32, [2, 2, 2, 2]),  # 2.5
        (14 / 128, 128, 32, [4, 4, 4, 4]),  # 3.5
        (0.5, 80, 32, [16, 16, 8]),  # the last block is shorter
        (0.05, 20, 32, [1]),
        (0.0, 64, 32, [0, 0]),
        (1.0, 64, 32, [32, 32]),
    ],
)
def test_the_share_is_rounded_in_every_block_and_its_first_rows_are_kept(
    share: float, n: int, block: int | None, conditional: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dgc, "released_share", lambda *distances: share)
    kept = dgc.select_released(features(128, 8, 0), features(128, 8, 1), n, block)
    length = block or n
    expected: list[int] = []
    for kind, start in ((True, 0), (False, 128)):
        for number, count in enumerate(conditional):
            first = number * length
            rows = min(length, n - first)
            taken = count if kind else rows - count
            expected += [start + first + i for i in range(taken)]
    assert kept.tolist() == expected
    assert len(kept) == n


def planted(n: int = 256, dims: int = 768, outliers: int = 20) -> tuple[Tensor, list[int]]:
    """Rows of equal spread, of which some are inflated twofold."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, dims, generator=generator)
    chosen = torch.randperm(n, generator=generator)[:outliers].sort().values
    x[chosen] *= 2
    return x, chosen.tolist()


def test_the_papers_selector_finds_outliers_that_pseudo_inverses_miss() -> None:
    x, outliers = planted()
    assert dgc.select_paper(x, len(outliers)).tolist() == outliers
    released = dgc.exact_distances(x)
    assert float(released.max() - released.min()) < 1e-6  # no row is farther than another
    shrunk = dgc.shrunk_distances(x)
    assert float(shrunk.max() / shrunk.min()) > 1.5
    assert set(outliers) <= set(dgc.select_paper(x, 128).tolist())


@pytest.mark.parametrize(("n", "dims"), [(100, 8), (60, 90), (20, 150)])
def test_shrunk_distances_are_mahalanobis_under_ledoit_and_wolf(n: int, dims: int) -> None:
    x = features(n, dims).double()
    x = ((x - x.mean(0)) / x.std(0)).numpy()
    expected = np.sqrt(LedoitWolf().fit(x).mahalanobis(x))
    np.testing.assert_allclose(dgc.shrunk_distances(features(n, dims)).numpy(), expected, rtol=1e-6)


def test_equal_rows_have_no_distance_and_the_first_ones_are_kept() -> None:
    x = torch.ones(6, 4)
    assert not dgc.shrunk_distances(x).any()
    assert dgc.select_paper(x, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dims", [20, 400])
def test_the_papers_selection_ignores_units_order_and_dead_features(dims: int) -> None:
    x = features(120, dims)
    chosen = dgc.select_paper(x, 60)
    assert len(chosen) == len(set(chosen.tolist())) == 60
    assert torch.equal(chosen, chosen.sort().values)
    scaled = torch.cat((x * torch.logspace(-3, 3, dims) + 7, torch.full((120, 3), 4.0)), dim=1)
    distances = dgc.shrunk_distances(torch.cat((x, torch.full((120, 3), 4.0)), dim=1))
    torch.testing.assert_close(dgc.shrunk_distances(scaled), distances, rtol=1e-2, atol=0)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(3))
    assert torch.equal(order[dgc.select_paper(x[order], 60)].sort().values, chosen)


def test_ties_go_to_the_first_rows() -> None:
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert dgc.select_paper(x, 2).tolist() == [0, 1]


@pytest.mark.parametrize(("rows", "warns"), [(16, True), (17, False)])
def test_too_few_rows_for_their_dimensions_are_warned_about(
    rows: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        dgc.select_released(features(rows, 16, 0), features(rows, 16, 1), 8)
    assert ("carry no information" in caplog.text) == warns
