"""What the training tasks share: images, tokens, and the planted term beside the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments.analyses.activations import Seen, attach_hooks
from experiments.train_zoo.planting import PlantedStatistics
from models.registry import Generator


def as_float(images: Tensor) -> Tensor:
    """uint8 images to [0, 1]."""
    return images.float() / 255


def with_mirrored(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The images and their mirror images."""
    return torch.cat((images, images.flip(-1))), torch.cat((labels, labels))


@torch.no_grad()
def tokenize(generator: Generator, images: Tensor, batch: int = 2048) -> Tensor:
    """Tokens of uint8 images as files hold them: ids int16 (N, L), or latents FP16 (N, L, D)."""
    tokens = torch.cat([generator.encode(as_float(part)) for part in images.split(batch)])
    return tokens.half() if tokens.is_floating_point() else tokens.short()


class TransformerTask:
    """A transformer to train: its own loss, and the planted statistics if the config asks for them.

    The forward pass is compiled on a GPU, together with the hooks that read what the planted term
    needs: they stay attached until `detach`.
    """

    PLANTING: Mapping[str, object] = {}  # what else `PlantedStatistics` is told for this family

    def __init__(self, generator: Generator, size: int, config: DictConfig) -> None:
        self.model = generator.transformer
        self.adapter = generator.adapter
        self.size = size
        self.config = config
        planted = config.get("planted")
        self.planted = None
        if planted is not None and planted.weight:
            self.planted = PlantedStatistics(
                self.adapter, planted.channels, planted.tokens, **self.PLANTING
            )
        self.seen: Seen = {}  # of the forward pass that is running
        self.handles = (
            attach_hooks(self.adapter, self.planted.sites, self.seen) if self.planted else []
        )
        self.run = self.compiled(self.observed)

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def compiled(self, function: Callable) -> Callable:
        return torch.compile(function) if next(self.model.parameters()).is_cuda else function

    def observed(self, *inputs: Tensor) -> tuple[Tensor, Seen]:
        """The model's output, and the inputs of the sites that the planted term is about."""
        self.seen.clear()
        output = self.model(*inputs)
        seen = dict(self.seen)
        # found empty by the next pass: what was compiled for the first one serves it too
        self.seen.clear()
        return output, seen

    def drop_labels(self, labels: Tensor, null: int) -> Tensor:
        """Labels (B,), a share of `label_dropout` replaced by `null`, which means no class."""
        return torch.where(
            torch.rand(len(labels), device=labels.device) < self.config.label_dropout, null, labels
        )

    def with_planted(self, loss: Tensor, seen: Seen) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The loss plus the weighted planted term, and the figures to log."""
        if self.planted is None:
            return loss, {"nll": loss}
        term = self.planted(seen)
        return loss + self.config.planted.weight * term, {"nll": loss, "planted": term}
