"""The evaluator's figures on streamed, made-up features, against NumPy, SciPy and
torch-fidelity."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.evaluate import adm, frechet
from experiments.evaluate.adm import summarize_stream
from experiments.evaluate.evaluator import Target, score_summary
from experiments.evaluate.frechet import Moments
from experiments.evaluate.inception_score import ScoreAccumulator, number_splits, shuffle_splits
from models.torchvision_shim import ensure_torchvision
from ptq.types import ConfigError
from tests.experiments.evaluate.evaluations import made_up_layers
from tests.experiments.evaluate.numpy_figures import (
    feature_frechet,
    numpy_inception_score,
    share_inside,
    shuffle_logits,
)
from tests.reference import made_up

ensure_torchvision()
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric  # noqa: E402
from torch_fidelity.metric_isc import isc_features_to_metric  # noqa: E402
from torch_fidelity.metric_prc import prc_features_to_metric  # noqa: E402


def chunks(whole: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(whole["pool"]), size):
        yield {name: value[start : start + size] for name, value in whole.items()}


def target_of(whole: dict[str, Tensor]) -> Target:
    pool = Moments()
    spatial = Moments()
    pool.update(whole["pool"])
    spatial.update(whole["spatial"])
    return Target(pool.value(), spatial.value(), whole["pool"])


@pytest.mark.parametrize("size", [1, 7, 60, 500])
def test_every_figure_against_numpy_and_scipy_however_the_stream_is_cut(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(adm, "SPLIT", 50)
    real = made_up_layers("real", 250)
    fake = made_up_layers("fake", 203, 0.3)
    logits = fake["logits"].numpy()
    bounds = [50, 100, 150, 200, 203]
    expected = {
        "fid": feature_frechet(fake["pool"], real["pool"]),
        "sfid": feature_frechet(fake["spatial"], real["spatial"]),
        "is": numpy_inception_score(shuffle_logits(logits), bounds),
        "is_file_order": numpy_inception_score(logits, bounds),
        "precision": share_inside(fake["pool"].numpy(), real["pool"].numpy()),
        "recall": share_inside(real["pool"].numpy(), fake["pool"].numpy()),
    }
    summary = summarize_stream(chunks(fake, size), 203, split=50)
    found = score_summary(summary, target_of(real), torch.float32)
    assert found == pytest.approx(expected, rel=1e-6)
    assert torch.equal(summary.manifold, fake["pool"])
    assert torch.equal(summary.predicted, fake["logits"].argmax(1))
    assert expected["is"] != pytest.approx(expected["is_file_order"], rel=1e-3)


def test_against_torch_fidelity() -> None:
    real = made_up_layers("real", 250)
    fake = made_up_layers("fake", 203, 0.3)
    found = score_summary(
        summarize_stream(chunks(fake, 40), 203, split=None), target_of(real), torch.float64
    )
    statistics = [fid_features_to_statistics(f["pool"].double()) for f in (fake, real)]
    prc = prc_features_to_metric(
        fake["pool"],
        real["pool"],
        prc_neighborhood=3,
        prc_batch_size=100,
        save_cpu_ram=True,
        verbose=False,
    )
    assert found["fid"] == pytest.approx(
        fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"], rel=1e-6
    )
    assert found["is"] == pytest.approx(
        isc_features_to_metric(fake["logits"])["inception_score_mean"], rel=1e-6
    )
    assert (found["precision"], found["recall"]) == pytest.approx(
        (prc["precision"], prc["recall"]), abs=1e-6
    )


def test_splits_are_adms_or_torch_fidelitys_and_equal_for_fifty_thousand() -> None:
    assert number_splits(12_000, 5000).bincount().tolist() == [5000, 5000, 2000]
    assert number_splits(203, None).bincount().tolist() == [
        (i + 1) * 203 // 10 - i * 203 // 10 for i in range(10)
    ]
    assert number_splits(4, None).tolist() == [0, 1, 2, 3]
    assert torch.equal(number_splits(50_000, 5000), number_splits(50_000, None))


def test_shuffling_puts_images_where_the_permutation_says() -> None:
    order = np.random.RandomState(2020).permutation(100)
    found = shuffle_splits(number_splits(100, 30))
    assert all(int(found[image]) == place // 30 for place, image in enumerate(order))


def test_images_sorted_by_class_fool_the_score_in_file_order_only() -> None:
    classes = torch.arange(20_000) * 10 // 20_000
    logits = 40.0 * torch.nn.functional.one_hot(classes, 10)
    scores = {}
    for name, split in (
        ("is", shuffle_splits(number_splits(20_000, 5000))),
        ("is_file_order", number_splits(20_000, 5000)),
    ):
        score = ScoreAccumulator(split)
        for part in logits.split(1000):
            score.update(part)
        scores[name] = score.value()
    assert scores["is"] > 9.9
    assert scores["is_file_order"] < 3.1


def test_moments_do_not_lose_digits_far_from_zero() -> None:
    x = made_up("x", (500, 6)).double() + 1e6
    moments = Moments()
    for part in x.split(13):
        moments.update(part)
    mean, covariance = moments.value()
    assert torch.allclose(mean, x.mean(0), rtol=1e-14)
    assert torch.allclose(covariance, torch.from_numpy(np.cov(x.numpy().T)), rtol=1e-6, atol=1e-9)


# --- degenerate sets


def test_identical_sets() -> None:
    real = made_up_layers("real", 300)
    found = score_summary(summarize_stream(chunks(real, 100), 300), target_of(real))
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert found["sfid"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"]) == (1, 1)


def factored_frechet(one: Tensor, other: Tensor) -> float:
    """Frechet distance by factors of the covariances: exact also where these are singular."""
    mean_one, factor_one = centre(one)
    mean_other, factor_other = centre(other)
    root_trace = np.linalg.svd(factor_one @ factor_other.T, compute_uv=False).sum()
    distance = ((mean_one - mean_other) ** 2).sum()
    return float(distance + (factor_one**2).sum() + (factor_other**2).sum() - 2 * root_trace)


def centre(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,), and a factor (N, d) of the covariance, of features (N, d)."""
    rows = features.double().numpy()
    mean = rows.mean(0)
    return mean, (rows - mean) / (len(rows) - 1) ** 0.5


@pytest.mark.parametrize("n", [2, 5, 9])
def test_fewer_samples_than_dimensions(n: int) -> None:
    real = made_up_layers("real", 8)
    fake = made_up_layers("fake", n, 0.5)
    found = score_summary(summarize_stream(chunks(fake, 4), n), target_of(real))
    assert found["fid"] == pytest.approx(factored_frechet(fake["pool"], real["pool"]), rel=1e-6)
    assert found["sfid"] == pytest.approx(
        factored_frechet(fake["spatial"], real["spatial"]), rel=1e-6
    )
    assert all(np.isfinite(value) for value in found.values())


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("n", [2, 5, 30, 90])
def test_a_distance_of_few_images_is_that_of_the_whole_covariance(
    monkeypatch: pytest.MonkeyPatch, n: int, swapped: bool
) -> None:
    draws = torch.Generator().manual_seed(n)
    mixing = torch.randn(64, 64, generator=draws)
    few = torch.randn(n, 64, generator=draws).relu() @ mixing
    many = torch.randn(200, 64, generator=draws).relu() @ mixing + 0.3
    pair = (many, few) if swapped else (few, many)
    statistics = [frechet.feature_statistics(features) for features in pair]
    whole = frechet.frechet_distance(*statistics, "fid")
    monkeypatch.setattr(frechet, "LARGE", 64)
    is_thin = any(frechet.thin_factor(sigma.numpy()) is not None for _, sigma in statistics)
    assert is_thin == (n - 1 < 32)
    found = frechet.frechet_distance(*statistics, "fid")
    if not is_thin:
        assert found == whole  # the same bits
    assert found == pytest.approx(whole, rel=1e-6)
    assert found == pytest.approx(factored_frechet(*pair), rel=1e-10)


def test_a_distance_of_images_that_are_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "LARGE", 64)
    flat = frechet.feature_statistics(torch.ones(4, 64))
    features = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) + 2.0
    expected = (features.double().mean(0) - 1.0).square().sum() + features.double().var(0).sum()
    distance = frechet.frechet_distance(flat, frechet.feature_statistics(features), "fid")
    assert distance == pytest.approx(float(expected), rel=1e-10)
    assert frechet.frechet_distance(flat, flat, "fid") == 0.0


def test_singular_covariance() -> None:
    real = made_up_layers("real", 100)
    fake = made_up_layers("fake", 90, 0.5)
    for whole in (real, fake):
        whole["pool"][:, 3] = whole["pool"][:, 2]
        whole["pool"][:, 7] = 1.5
    found = score_summary(summarize_stream(chunks(fake, 40), 90), target_of(real))
    assert found["fid"] == pytest.approx(factored_frechet(fake["pool"], real["pool"]), rel=1e-6)


def test_constant_images() -> None:
    real = made_up_layers("real", 100)
    fake = made_up_layers("fake", 1)
    fake = {name: value.repeat(30, 1) for name, value in fake.items()}
    found = score_summary(summarize_stream(chunks(fake, 12), 30), target_of(real))
    spread = (
        real["pool"].double().var(dim=0).sum()
        + (fake["pool"][0] - real["pool"].double().mean(0)).square().sum()
    )
    assert found["fid"] == pytest.approx(float(spread), rel=1e-6)
    assert found["is"] == pytest.approx(1)
    same = score_summary(summarize_stream(chunks(fake, 12), 30), target_of(fake))
    assert (same["fid"], same["precision"], same["recall"]) == (pytest.approx(0, abs=1e-6), 1, 1)


def test_what_the_target_lacks_is_null() -> None:
    real = made_up_layers("real", 50)
    fake = made_up_layers("fake", 40)
    whole = target_of(real)
    found = score_summary(summarize_stream(chunks(fake, 20), 40), Target(whole.pool, None, None))
    assert {k for k, v in found.items() if v is None} == {"sfid", "precision", "recall"}
    assert found["fid"] > 0


def test_bad_streams_are_refused() -> None:
    fake = made_up_layers("fake", 40)
    with pytest.raises(ConfigError, match="samples: 1 images, expected at least 2"):
        summarize_stream(chunks(made_up_layers("fake", 1), 1), 1)
    with pytest.raises(ConfigError, match="samples: 40 images, expected 41"):
        summarize_stream(chunks(fake, 20), 41)
    with pytest.raises(ConfigError, match="more than the 39 images"):
        summarize_stream(chunks(fake, 20), 39)
    fake["spatial"][25, 3] = float("nan")
    with pytest.raises(
        ConfigError, match="features: spatial of image 20 or one of the next is NaN"
    ):
        summarize_stream(chunks(fake, 20), 40)
