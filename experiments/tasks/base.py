"""What the training tasks share: image preparation, tokens, and the planted term beside a transformer's own loss."""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments.outliers import PlantedStatistics, watch
from models.registry import Generator


def as_float(images: Tensor) -> Tensor:
    """uint8 images to [0, 1]."""
    return images.float() / 255


def flipped(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The images and their mirror images."""
    return torch.cat((images, images.flip(-1))), torch.cat((labels, labels))


@torch.no_grad()
def tokenize(generator: Generator, images: Tensor, batch: int = 2048) -> Tensor:
    """Tokens (N, L) int16 of uint8 images."""
    return torch.cat([generator.encode(as_float(part)).short() for part in images.split(batch)])


class TransformerTask:
    """A transformer to train: its own loss, and on top of it the planted statistics if the config asks for them.

    On a GPU the forward pass is compiled. The planted term comes from a second, uncompiled pass over the first
    `PlantedStatistics.SAMPLES` samples, because compiled code does not run the hooks that it reads activations with.
    """

    def __init__(self, generator: Generator, size: int, config: DictConfig) -> None:
        self.model, self.adapter, self.size, self.config = generator.transformer, generator.adapter, size, config
        planted = config.planted
        self.planted = PlantedStatistics(self.adapter, planted.channels, planted.tokens) if planted.weight else None
        self.forward = torch.compile(self.model) if next(self.model.parameters()).is_cuda else self.model

    def drop_labels(self, labels: Tensor, null: int) -> Tensor:
        """Labels (B,) with a share of `label_dropout` replaced by `null`, the label that means "no class"."""
        return torch.where(torch.rand(len(labels), device=labels.device) < self.config.label_dropout, null, labels)

    def with_planted(self, loss: Tensor, *inputs: Tensor) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The loss plus the weighted planted term for the model's `inputs` (B, ...), and the figures to log."""
        if self.planted is None:
            return loss, {"nll": loss}
        with watch(self.adapter, self.planted.sites) as seen:
            self.model(*(x[:self.planted.SAMPLES] for x in inputs))
        term = self.planted(seen)
        return loss + self.config.planted.weight * term, {"nll": loss, "planted": term}
