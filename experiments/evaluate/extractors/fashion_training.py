"""Training of the classifier behind the small-image metrics (`fashion.py`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.evaluate.extractors.fashion import Classifier, as_input
from ptq.types import ConfigError

Log = Callable[[Mapping[str, float], int], None]  # figures of an epoch, and steps so far


def augment_images(images: Tensor, flip: Tensor, offset: Tensor, reach: int) -> Tensor:
    """Images (B, C, H, W), mirrored where `flip` (B,) is true and moved by `offset` (B, 2) pixels.

    Offsets lie within +-reach. What moves in from outside is zero, the images' background.
    """
    batch, channels, height, width = images.shape
    device = images.device
    # indices into the padded images
    rows = torch.arange(height, device=device) + reach + offset[:, :1]  # (B, H)
    columns = torch.arange(width, device=device).expand(batch, -1)  # (B, W)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + reach + offset[:, 1:]
    padded = F.pad(images, (reach, reach, reach, reach))  # (B, C, H + 2 reach, W + 2 reach)
    samples = torch.arange(batch, device=device)
    planes = torch.arange(channels, device=device)
    # (B, C, H, W): the four indices spread over each other
    return padded[
        samples[:, None, None, None],
        planes[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


@torch.no_grad()
def classifier_accuracy(
    model: Classifier, images: Tensor, labels: Tensor, batch: int = 1000
) -> float:
    """Share of uint8 images (N, 3, 32, 32) whose class (N,) is the model's first choice."""
    hits = torch.zeros((), dtype=torch.int64, device=labels.device)
    for part, classes in zip(images.split(batch), labels.split(batch)):
        _, _, logits = model(as_input(part))
        hits += (logits.argmax(1) == classes).sum()
    return hits.item() / len(labels)


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged parameters and buffers towards the model's."""
    for mean, value in zip(average.state_dict().values(), model.state_dict().values()):
        if mean.is_floating_point():  # the norms count their batches in integers
            mean.lerp_(value, 1 - decay)


def draw_epoch(
    generator: torch.Generator, n: int, batch: int, reach: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All draws of an epoch over n images, a row for each whole batch.

    Returns:
        images (batches, batch), whether to mirror each, and offsets (batches, batch, 2).
    """
    batches = n // batch
    order = torch.randperm(n, generator=generator)[: batches * batch]
    flips = torch.rand(batches, batch, generator=generator) < 0.5
    offsets = torch.randint(-reach, reach + 1, (batches, batch, 2), generator=generator)
    return order.view(batches, batch), flips, offsets


def _ignore_figures(figures: Mapping[str, float], step: int) -> None:
    """The log of a training that nobody watches."""


def train_classifier(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    epochs: int = 15,
    batch: int = 256,
    lr: float = 0.2,
    weight_decay: float = 5e-4,
    ema: float = 0.998,
    reach: int = 2,
    seed: int = 0,
    log: Log = _ignore_figures,
) -> tuple[Classifier, float]:
    """Train the classifier on the device where images (N, 3, 32, 32), uint8, and labels (N,) lie.

    SGD with Nesterov momentum, one cycle of the learning rate, cross-entropy, random mirroring and
    shifts up to `reach` pixels, and an exponential moving average of weights and normalisation
    statistics. All randomness comes from `seed` and is drawn on the CPU; the caller's random state
    stays as it was. `log(figures, step)` is called once an epoch.

    Returns:
        the averaged model in eval mode, and its accuracy on the test images.
    """
    if len(images) < 2 or len(images) != len(labels):
        raise ConfigError(
            f"images: {len(images)} images with {len(labels)} labels, expected 2 or more of each"
        )
    device = images.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
    model.to(device)
    average = copy.deepcopy(model).eval()

    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, len(images))
    batches = len(images) // batch
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=epochs * batches + 1, pct_start=0.2
    )
    step = 0
    for _ in range(epochs):
        order, flips, offsets = draw_epoch(generator, len(images), batch, reach)
        total_loss = torch.zeros((), device=device)
        for index, flip, offset in zip(order.to(device), flips.to(device), offsets.to(device)):
            x = as_input(augment_images(images[index], flip, offset, reach))  # (batch, 3, 32, 32)
            _, _, logits = model(x)
            loss = F.cross_entropy(logits, labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            # short memory while there is little to remember
            _update_average(average, model, min(ema, step / (step + 9)))
            total_loss += loss.detach()
        accuracy = classifier_accuracy(average, test_images, test_labels)
        log({"loss": total_loss.item() / batches, "test_accuracy": accuracy}, step)
    return average, classifier_accuracy(average, test_images, test_labels)
