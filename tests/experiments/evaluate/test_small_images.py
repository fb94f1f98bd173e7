"""Image metrics against NumPy and SciPy on made-up features, the extractor behind them, and its
training."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from torch import Tensor

from experiments.evaluate import references
from experiments.evaluate.extractors import fashion as extractors
from experiments.evaluate.extractors.fashion import LAYERS, Classifier, ClassifierExtractor
from experiments.evaluate.extractors.fashion_training import augment_images, train_classifier
from experiments.evaluate.features import Features
from experiments.evaluate.frechet import feature_statistics
from experiments.evaluate.inception_score import inception_score
from experiments.evaluate.precision_recall import precision_recall
from experiments.evaluate.references import Reference
from experiments.evaluate.small_images import (
    extract_features,
    image_metrics,
    make_reference,
    pool_distance,
)
from experiments.store import files
from models import CheckpointError
from ptq.types import ConfigError
from tests.reference import fill, made_up, made_up_ints

DIMENSIONS = {"pool": 12, "logits": 10, "spatial": 20}


def features(
    name: str, n: int, shift: float = 0.0, dimensions: dict[str, int] = DIMENSIONS
) -> Features:
    """Made-up features of correlated dimensions."""
    parts = {}
    for layer, d in dimensions.items():
        mix = made_up(f"{layer}:mix", (d, d)) / d**0.5
        parts[layer] = (
            made_up(f"{name}:{layer}", (n, d)) @ mix * (4.0 if layer == "logits" else 1.0) + shift
        )
    return Features(**parts)


def images(n: int, salt: str = "") -> Tensor:
    return made_up_ints("images", (n, 3, 32, 32), 256, salt).byte()


def save_classifier(path: Path, salt: str = "") -> Path:
    state = fill(Classifier(), salt).state_dict()
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, path)
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_classifier(tmp_path / "extractor.safetensors")


# --- the definitions, once more and independently


def numpy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    a = a.astype(np.float64)
    b = b.astype(np.float64)
    s = np.cov(a.T)
    t = np.cov(b.T)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real))


def numpy_inception_score(logits: np.ndarray, splits: int) -> float:
    logits = logits.astype(np.float64)[np.random.RandomState(2020).permutation(len(logits))]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    bounds = [i * len(p) // splits for i in range(splits + 1)]
    chunks = [p[a:b] for a, b in zip(bounds, bounds[1:])]
    return float(np.mean([np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in chunks]))


def inside(points: np.ndarray, manifold: np.ndarray, k: int = 3) -> float:
    """Share of the points in a ball around some point of the manifold that reaches to its k-th
    other point."""
    distance = np.linalg.norm(manifold[:, None] - manifold[None], axis=2)
    radius = np.sort(distance, axis=1)[:, k]
    return float((np.linalg.norm(points[:, None] - manifold[None], axis=2) <= radius).any(1).mean())


def test_image_metrics_against_numpy() -> None:
    real = features("real", 250)
    fake = features("fake", 203, 0.3)
    found = image_metrics(fake, Reference.from_features(real, "x"))
    stored = real.pool.half().double().numpy()
    expected = {
        "fid": numpy_frechet(fake.pool.numpy(), real.pool.numpy()),
        "sfid": numpy_frechet(fake.spatial.numpy(), real.spatial.numpy()),
        "is": numpy_inception_score(fake.logits.numpy(), 10),
        "precision": inside(fake.pool.double().numpy(), stored),
        "recall": inside(stored, fake.pool.double().numpy()),
    }
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-6)
    assert 0 < expected["precision"] < 1
    assert 0 < expected["recall"] < 1
    assert expected["precision"] != expected["recall"]
    assert pool_distance(fake, real) == pytest.approx(expected["fid"], rel=1e-6)


def test_identical_sets() -> None:
    real = features("real", 300)
    found = image_metrics(real, Reference.from_features(real, "x"))
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert found["sfid"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"]) == (1, 1)
    assert pool_distance(real, real) == pytest.approx(0, abs=1e-6)


def test_direction_of_precision_and_recall() -> None:
    """One of two real modes generated: precise, but not everything recalled. The converse for a
    surplus mode."""
    near = made_up("near", (200, 12))
    far = made_up("far", (200, 12)) + 100
    both = torch.cat((near, far))
    assert precision_recall(near, both) == (1.0, 0.5)
    assert precision_recall(both, near) == (0.5, 1.0)


def test_inception_score_does_not_depend_on_classes_coming_in_order() -> None:
    classes = torch.arange(1000) * 10 // 1000
    score = inception_score(40.0 * torch.nn.functional.one_hot(classes, 10))
    assert 9 < score <= 10  # unshuffled, every split would hold one class and the score would be 1


@pytest.mark.parametrize("n", [2, 3, 4, 9, 11])
def test_few_images(n: int) -> None:
    found = image_metrics(features("fake", n), Reference.from_features(features("real", 50), "x"))
    assert all(np.isfinite(value) for value in found.values())
    found = image_metrics(features("fake", 50), Reference.from_features(features("real", n), "x"))
    assert all(np.isfinite(value) for value in found.values())
    if n < 10:
        # one image per split
        assert inception_score(features("fake", n).logits) == pytest.approx(1)


def test_fewer_images_than_dimensions() -> None:
    real = features("real", 8)
    fake = features("fake", 9, 0.5)
    mu, sigma = feature_statistics(real.pool)
    assert torch.linalg.matrix_rank(sigma) < len(mu)
    assert pool_distance(fake, real) == pytest.approx(
        numpy_frechet(fake.pool.numpy(), real.pool.numpy()), rel=1e-4
    )


BAD = {
    "float64": (
        lambda f: {"pool": f.pool.double()},
        "pool is torch.float64 (9, 12), expected torch.float32",
    ),
    "three dimensions": (
        lambda f: {"spatial": f.spatial[None]},
        "spatial is torch.float32 (1, 9, 20)",
    ),
    "unequal numbers": (
        lambda f: {"logits": f.logits[1:]},
        "logits is torch.float32 (8, 10), expected",
    ),
    "nan": (lambda f: {"logits": f.logits * float("nan")}, "logits has values that are not finite"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_features_are_refused(kind: str) -> None:
    good = features("fake", 9)
    change, words = BAD[kind]
    with pytest.raises(ConfigError, match=re.escape(words)):
        Features(**(vars(good) | change(good)))


def test_one_image_and_unequal_dimensions_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 images, expected at least 2"):
        features("fake", 1)
    other = Features(*(torch.zeros(5, 3) for _ in range(3)))
    with pytest.raises(ConfigError, match="fid: 3 features against 12"):
        pool_distance(other, features("fake", 5))
    with pytest.raises(ConfigError, match="pool: 3 features against 12"):
        image_metrics(other, Reference.from_features(features("fake", 5), "x"))


# --- the reference


def test_reference_round_trip(tmp_path: Path) -> None:
    reference = Reference.from_features(features("real", 40), "0123")
    path = tmp_path / "new" / "reference.safetensors"
    reference.save(path)
    reference.save(path)  # over itself
    loaded = Reference.load(path, "0123")
    for name in ("mu", "sigma", "mu_s", "sigma_s", "pool"):
        assert torch.equal(getattr(loaded, name), getattr(reference, name))
    assert (loaded.n, loaded.extractor) == (40, "0123")
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    fake = features("fake", 30)
    assert image_metrics(fake, loaded) == image_metrics(fake, reference)


def test_reference_keeps_images_from_the_whole_set(monkeypatch: pytest.MonkeyPatch) -> None:
    real = features("real", 50)
    monkeypatch.setattr(references, "MANIFOLD_IMAGES", 20)
    reference = Reference.from_features(real, "x")
    assert torch.equal(reference.pool, real.pool[(torch.arange(20) * 2.5).long()].half())
    assert reference.n == 50


def test_foreign_and_damaged_references_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        Reference.load(path, "0123")
    Reference.from_features(features("real", 40), "0123").save(path)
    with pytest.raises(ConfigError, match="was made with the extractor 0123, not with 4567") as run:
        Reference.load(path, "4567")
    assert "\n" not in str(run.value)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Reference.load(path, "0123")
    with pytest.raises(ConfigError, match="is not a file of reference statistics"):
        Reference.load(save_classifier(path), "0123")


def test_an_interrupted_save_leaves_the_old_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "reference.safetensors"
    Reference.from_features(features("real", 40), "old").save(path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        Reference.from_features(features("real", 40), "new").save(path)
    assert Reference.load(path, "old").n == 40
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


# --- the extractor


def test_layers_and_their_order(weights: Path) -> None:
    extractor = extractors.load_classifier(weights)
    batch = images(5)
    found = extract_features(batch, extractor, batch=2)
    middle, pooled, logits = extractor.net(batch.float() / 127.5 - 1)
    assert {name: getattr(found, name).shape[1] for name in LAYERS} == LAYERS
    assert torch.allclose(found.pool, pooled, atol=1e-5)
    assert torch.allclose(found.logits, logits, atol=1e-5)
    for row, column, channel in ((0, 0, 6), (3, 5, 2), (7, 7, 0)):
        place = (row * 8 + column) * 7 + channel
        assert torch.allclose(found.spatial[:, place], middle[:, channel, row, column], atol=1e-5)
    assert not found.pool.requires_grad


def test_expanded_grey_images_are_welcome(weights: Path) -> None:
    grey = images(4)[:, :1].expand(-1, 3, -1, -1)
    found = extract_features(grey, extractors.load_classifier(weights), progress=True)
    assert torch.equal(
        found.pool, extract_features(grey.contiguous(), extractors.load_classifier(weights)).pool
    )


def test_file_size_and_parameters(weights: Path) -> None:
    assert weights.stat().st_size < 700_000
    assert sum(p.numel() for p in Classifier().parameters()) < 350_000


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.zeros(4, 3, 32, 32), "torch.float32"),
        (images(4)[:, :1], "(4, 1, 32, 32)"),
        (images(4)[..., :28], "(4, 3, 32, 28)"),
        (images(1), "1 images"),
        (images(4)[0], "(3, 32, 32)"),
    ],
)
def test_bad_images_are_refused(weights: Path, bad: Tensor, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as run:
        extract_features(bad, extractors.load_classifier(weights))
    assert "\n" not in str(run.value)


def test_a_missing_or_damaged_extractor_is_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none.safetensors is missing"):
        extractors.load_classifier(tmp_path / "none.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot be read") as run:
        extractors.load_classifier(weights)
    assert "\n" not in str(run.value)
    save_file({"head.bias": torch.zeros(10)}, weights)
    with pytest.raises(CheckpointError, match="does not fit Classifier: .* missing keys"):
        extractors.load_classifier(weights)


def register_extractor(name: str, extractor: ClassifierExtractor) -> None:
    """Make the extractor known to torch-fidelity under a name."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Registered(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **settings: object) -> None:
            super().__init__(name, features_list)
            self.extractor = extractor

        def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
            layers = self.extractor(batch)
            return tuple(layers[layer] for layer in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return tuple(LAYERS)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "pool"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    torch_fidelity.register_feature_extractor(name, Registered)


def test_agrees_with_calculate_metrics(weights: Path) -> None:
    """The one-call interface of torch-fidelity comes to the same figures."""
    import torch_fidelity

    class Pictures(torch.utils.data.TensorDataset):
        def __getitem__(self, i: int) -> Tensor:
            return self.tensors[0][i]

    real = images(60)
    fake = images(50, "fake")
    extractor = extractors.load_classifier(weights)
    register_extractor("made-up-classifier", extractor)
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(fake),
        input2=Pictures(real),
        feature_extractor="made-up-classifier",
        cuda=False,
        cache=False,
        isc=True,
        fid=True,
        prc=True,
        save_cpu_ram=True,
        verbose=False,
        isc_splits=10,
    )
    ours = image_metrics(extract_features(fake, extractor), make_reference(real, extractor))
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    # theirs has a float32 mean
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    # the reference is kept in float16
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=0.021)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=0.021)


# --- training


def test_augmentation_moves_and_mirrors() -> None:
    batch = images(4)
    flip = torch.tensor([False, True, False, True])
    offset = torch.tensor([[0, 0], [0, 0], [2, -1], [-2, 1]])
    found = augment_images(batch, flip, offset, 2)
    assert found.dtype == torch.uint8
    assert torch.equal(found[0], batch[0])
    assert torch.equal(found[1], batch[1].flip(-1))
    assert torch.equal(found[2, :, :30, 1:], batch[2, :, 2:, :31])  # up by two, right by one
    assert found[2, :, 30:].sum() == 0
    assert found[2, :, :, 0].sum() == 0
    # mirrored, down by two, right by one
    assert torch.equal(found[3, :, 2:, 1:], batch[3].flip(-1)[:, :30, :31])


def toy(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten classes of noisy images: a bright bar at a height that is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 10
    pictures = torch.randint(0, 60, (n, 1, 32, 32), generator=generator)
    pictures += 180 * ((torch.arange(32) // 3)[None] == labels[:, None])[:, None, :, None]
    return pictures.byte().expand(-1, 3, -1, -1), labels


def test_training_is_seeded_and_learns() -> None:
    (x, y), (test_x, test_y) = toy(320, 0), toy(100, 1)
    settings = {"batch": 32, "reach": 0, "lr": 0.05, "ema": 0.9}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    seen = []
    model, score = train_classifier(
        x,
        y,
        test_x,
        test_y,
        epochs=4,
        seed=3,
        log=lambda figures, step: seen.append((step, figures)),
        **settings,
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert score > 0.8
    assert not model.training
    assert [step for step, _ in seen] == [10, 20, 30, 40]
    assert seen[-1][1]["test_accuracy"] == score
    assert seen[-1][1]["loss"] < seen[0][1]["loss"]
    twins = [
        train_classifier(x[:64], y[:64], test_x, test_y, epochs=1, seed=s, **settings)[0]
        for s in (5, 5, 6)
    ]
    states = [torch.cat([v.float().flatten() for v in m.state_dict().values()]) for m in twins]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_training_refuses_images_without_labels() -> None:
    x, y = toy(20, 0)
    with pytest.raises(ConfigError, match="20 images with 19 labels"):
        train_classifier(x, y[1:], x, y)
