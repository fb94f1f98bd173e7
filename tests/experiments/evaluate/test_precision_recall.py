"""Precision and recall in blocks, against brute force and torch-fidelity, and ADM's float16
distances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.evaluate import precision_recall as module
from experiments.evaluate.precision_recall import fits_float16, precision_recall, squared_distances
from models.torchvision_shim import ensure_torchvision
from ptq.types import ConfigError
from tests.reference import made_up

ensure_torchvision()
from torch_fidelity.metric_prc import prc_features_to_metric  # noqa: E402


def brute(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return ((u[:, None].astype(np.float64) - v[None].astype(np.float64)) ** 2).sum(-1)


def numpy_half(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """ADM's float16 distances: every result rounded to float16, sums made in float32."""
    u = u.astype(np.float16)
    v = v.astype(np.float16)
    norm_u = (u * u).astype(np.float32).sum(1).astype(np.float16)
    norm_v = (v * v).astype(np.float32).sum(1).astype(np.float16)
    product = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
    return np.maximum(
        norm_u[:, None] - np.float16(2) * product + norm_v[None], np.float16(0)
    ).astype(np.float32)


def shares(
    gen_ref: np.ndarray, gen_gen: np.ndarray, ref_ref: np.ndarray, k: int = 3
) -> tuple[float, float]:
    """Precision and recall from the three tables of squared distances."""
    gen_radii = np.sort(gen_gen, axis=1)[:, k]
    ref_radii = np.sort(ref_ref, axis=1)[:, k]
    precision = (gen_ref <= ref_radii).any(1).mean()
    recall = (gen_ref <= gen_radii[:, None]).any(0).mean()
    return precision, recall


@pytest.fixture
def sets() -> tuple[Tensor, Tensor]:
    return made_up("generated", (203, 6)) + 0.4, made_up("reference", (150, 6))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of every kind at sizes that brute force can do, none of them a divisor of
    another."""
    monkeypatch.setattr(module, "ADM_BLOCK", 64)
    monkeypatch.setattr(module, "ROWS", 11)
    monkeypatch.setattr(module, "COLUMNS", 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_brute_force_and_torch_fidelity(
    sets: tuple[Tensor, Tensor], small_blocks: None, dtype: torch.dtype
) -> None:
    generated, reference = sets
    pairs = ((generated, reference), (generated, generated), (reference, reference))
    expected = shares(*(brute(a.numpy(), b.numpy()) for a, b in pairs))
    found = precision_recall(generated, reference, dtype)
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0.1 < found[0] < 0.9
    assert found[0] != found[1]
    theirs = prc_features_to_metric(
        generated.double(),
        reference.double(),
        prc_neighborhood=3,
        prc_batch_size=10_000,
        save_cpu_ram=False,
        verbose=False,
    )
    assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_block_sizes_do_not_matter(
    sets: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = precision_recall(*sets)
    for rows, columns in ((1, 1000), (50, 50), (1000, 1)):
        monkeypatch.setattr(module, "ROWS", rows)
        monkeypatch.setattr(module, "COLUMNS", columns)
        monkeypatch.setattr(module, "_last_radii", {})
        assert precision_recall(*sets) == whole


def test_radii_of_a_reference_are_worked_out_once_and_kept_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = made_up("reference", (40, 6))
    monkeypatch.setattr(module, "_last_radii", {})
    asked = []

    def squared_radii(points: Tensor, *rest: object) -> Tensor:
        asked.append(len(points))
        return original(points, *rest)

    original = module.squared_radii
    monkeypatch.setattr(module, "squared_radii", squared_radii)
    for n in (5, 9):
        precision_recall(made_up("generated", (n, 6)), reference)
    assert asked == [5, 40, 9]
    others = {
        "points": (reference + torch.eye(40, 6), 3, torch.float64),
        "neighbour": (reference, 2, torch.float64),
        "format": (reference, 3, torch.float32),
    }
    for name, (points, k, dtype) in others.items():
        found = module.reference_radii(points, k, dtype, "cpu")
        assert torch.equal(found, original(points, k, dtype)), name


def test_float16_distances_are_those_of_numpy() -> None:
    u = 3 * made_up("u", (40, 24))
    v = 3 * made_up("v", (31, 24))
    found = squared_distances(u, v, torch.float16)
    expected = numpy_half(u.numpy(), v.numpy())
    # one step at 256, where a sum rounded the other way
    assert np.abs(found.numpy() - expected).max() <= 0.125 + 1e-9
    assert (found.numpy() == expected).mean() > 0.99
    # rounding is there to be seen
    assert np.abs(expected - brute(u.numpy(), v.numpy())).max() > 0.01


def test_float16_counts_ties_as_adm_does(small_blocks: None) -> None:
    """On a grid of eighths every float16 distance is exact; between its steps, rounding makes
    ties."""
    generated = 40 + made_up("generated", (90, 3))
    reference = 40 + made_up("reference", (70, 3))
    pairs = ((generated, reference), (generated, generated), (reference, reference))
    half = precision_recall(generated, reference, torch.float16)
    assert half == pytest.approx(
        shares(*(numpy_half(a.numpy(), b.numpy()) for a, b in pairs)), abs=0.02
    )
    assert half != precision_recall(generated, reference, torch.float32)
    exact = [
        torch.from_numpy(np.random.RandomState(s).randint(-8, 8, (60, 3)) / 8).float()
        for s in (0, 1)
    ]
    assert precision_recall(*exact, torch.float16) == precision_recall(*exact, torch.float64)


def test_float16_falls_back_where_a_distance_is_infinite(small_blocks: None) -> None:
    generated = made_up("generated", (80, 4))
    reference = made_up("reference", (80, 4))
    assert fits_float16(generated, reference)
    assert not fits_float16(1000 * generated, reference)
    far = 1000 * generated, 1000 * reference
    assert precision_recall(*far, torch.float16) == precision_recall(*far, torch.float32)
    # only pairs with the second block overflow
    generated = torch.cat((generated[:64], 1000 * generated[64:]))
    kinds = {
        (rows.start // 64, columns.start // 64): bool(
            (block == squared_distances(generated[rows], reference[columns], torch.float16)).all()
        )
        for rows, columns, block in module.distance_blocks(
            generated, reference, torch.float16, "cpu"
        )
    }
    assert kinds == {(0, 0): True, (0, 1): True, (1, 0): False, (1, 1): False}


def test_equal_and_constant_sets() -> None:
    points = made_up("points", (50, 5))
    assert precision_recall(points, points) == (1.0, 1.0)
    same = torch.ones(20, 5)
    assert precision_recall(same, same.clone(), torch.float32) == (1.0, 1.0)
    precision, recall = precision_recall(same + 100, points)
    assert (precision, recall) == (0.0, 0.0)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_few_points(n: int) -> None:
    found = precision_recall(made_up("few", (n, 5)), made_up("many", (30, 5)))
    assert all(0 <= value <= 1 for value in found)


def test_unequal_dimensions_are_refused() -> None:
    with pytest.raises(ConfigError, match="pool: 3 features against 4"):
        precision_recall(torch.zeros(5, 3), torch.zeros(5, 4))
