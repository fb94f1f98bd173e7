"""Training of the classifier behind the small-image metrics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from experiments.evaluate.extractors.fashion import Classifier
from experiments.evaluate.extractors.fashion_training import augment_images, train_classifier
from ptq.types import ConfigError
from tests.experiments.evaluate.evaluations import (
    made_up_images,
)


def test_augmentation_moves_and_mirrors() -> None:
    batch = made_up_images(4)
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


def flatten_state(model: Classifier) -> Tensor:
    """All parameters and buffers in one row."""
    return torch.cat([value.float().flatten() for value in model.state_dict().values()])


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
    states = [flatten_state(twin) for twin in twins]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_training_refuses_images_without_labels() -> None:
    x, y = toy(20, 0)
    with pytest.raises(ConfigError, match="20 images with 19 labels"):
        train_classifier(x, y[1:], x, y)
