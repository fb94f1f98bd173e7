"""Training of RAR transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from experiments.train_zoo.tasks.base import TransformerTask, tokenize
from models.registry import Generator


class RARTask(TransformerTask):
    """Next-token cross-entropy, label dropout, orders annealed from random to raster."""

    def __init__(
        self, generator: Generator, images: Tensor, labels: Tensor, config: DictConfig
    ) -> None:
        self.tokens = tokenize(generator, images)
        self.labels = labels
        super().__init__(generator, len(labels), config)

    @staticmethod
    def initialise(model: nn.Module) -> None:
        """RAR's start: truncated normals (0.02), zero biases and AdaLN projections."""
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name:
                nn.init.zeros_(parameter)
            elif parameter.ndim >= 2:
                nn.init.trunc_normal_(parameter, std=0.02)

    def loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        batch = len(index)
        length = self.tokens.shape[1]
        ids = self.tokens[index].long()  # (B, L)
        labels = self.labels[index]
        # (B,)
        condition = self.drop_labels(self.model.condition_ids(labels), self.model.none_condition)
        # of samples in random order: from all at the first step down to none
        share = max(
            0.0, 1 - step / max(self.config.random_order_until * self.config.schedule.steps, 1)
        )
        shuffled = torch.rand(batch, length, device=ids.device).argsort(dim=1)  # (B, L)
        raster = torch.arange(length, device=ids.device)  # (L,)
        # (B, L)
        orders = torch.where(torch.rand(batch, 1, device=ids.device) < share, shuffled, raster)
        ids = ids.gather(1, orders)  # (B, L), in the order of prediction
        logits, seen = self.run(ids[:, :-1], condition, orders)  # (B, L, V)
        nll = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
        return self.with_planted(nll, seen)
