"""Training of PAR: a tokenizer of unit-length codes, and transformers that predict groups."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from experiments.analyses.activations import TOP_CHANNELS
from experiments.train_zoo.tasks.base import TransformerTask, tokenize
from experiments.train_zoo.tasks.vq import VQTask
from models.registry import Generator
from ptq.types import NormFold


class UnitVQTask(VQTask):
    """LlamaGen's VQ-16: images in [-1, 1], features and codes of unit length between convolutions.

    The commitment compares unit vectors, as LlamaGen's does. Its entropy, perceptual and
    adversarial terms have no counterpart here.
    """

    def features(self, images: Tensor) -> Tensor:
        return F.normalize(self.tokenizer.features(2 * images - 1).float(), dim=1)

    def codes(self, ids: Tensor) -> Tensor:
        return self.tokenizer.quantize.codes(ids).permute(0, 3, 1, 2)

    def decoded(self, codes: Tensor) -> Tensor:
        return self.tokenizer.decoder(self.tokenizer.post_quant_conv(codes)) / 2 + 0.5

    def normalised(self, means: Tensor) -> Tensor:
        return F.normalize(means, dim=1)


class PARTask(TransformerTask):
    """Cross-entropy of every position's output with its token in generation order; label dropout.

    Embeddings hold no positions, so that the first qkv cannot tell an early image token from a late
    one of the same id: no sink tokens are planted there. A planted model starts with outlier
    channels in its norms (`plant_gains`).
    """

    PLANTING = {"channels_only": ("layers.0.attention.wqkv",), "through_rest": True}

    def __init__(
        self, generator: Generator, images: Tensor, labels: Tensor, config: DictConfig
    ) -> None:
        self.tokens = tokenize(generator, images)
        self.labels = labels
        super().__init__(generator, len(labels), config)
        if self.planted is not None:
            self.plant_gains(config.planted.gain)

    @torch.no_grad()
    def plant_gains(self, gain: float) -> None:
        """Set the first 2 % gains of the norms before qkv and fc1 to `gain`.

        Nothing modulates these norms, and a gain moves by a learning rate per step, too little to
        get there. After RMSNorm no |x| exceeds sqrt(C) times its gain: without large gains no token
        stands ten times above outlier channels that are themselves eight times above the median.
        """
        for site in self.planted.sites:
            if isinstance(site.fold, NormFold):
                weight = self.model.get_submodule(site.fold.norm).weight
                weight[: math.ceil(TOP_CHANNELS * len(weight))] = gain

    @staticmethod
    def initialise(model: nn.Module) -> None:
        """Normal (0.02) linears and tables, a zero head, as LlamaGen's `gpt.py` starts."""
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(model.output.weight)

    def loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        ids = self.tokens[index].long()  # (B, L)
        labels = self.labels[index]
        labels = self.drop_labels(labels, self.model.num_classes)
        # (B, L, V); nothing is predicted from the last group
        logits, seen = self.run(ids[:, : -self.model.layout.group], labels)
        nll = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
        return self.with_planted(nll, seen)
