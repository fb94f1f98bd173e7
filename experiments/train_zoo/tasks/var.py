"""Training of VAR: its multi-scale VQVAE, and its transformer by next-scale prediction."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from experiments.train_zoo.tasks.base import TransformerTask, as_float, tokenize
from experiments.train_zoo.tasks.vq import VQTask
from models.registry import Generator
from models.var.tokenizer import VQVAE
from models.var.transformer import VAR


class MultiScaleVQTask(VQTask):
    """The multi-scale VQVAE: L1 + L2, commitment at every scale, a codebook that follows.

        f_s = sum over scales t <= s of phi_t(up(codes_t)),
        codes_t nearest to the pooled rest f - f_{t-1},
        quantization loss = mean over s of  commitment * |stop(f_s) - f|^2  +  |f_s - stop(f)|^2,
    as in FoundationVision/VAR `models/quant.py`. There the second term moves codes and convolutions
    phi; here it moves the convolutions, which start as the identity, and the codes are running
    means of the rests of all scales that were assigned to them, because a shared codebook learned
    by gradient loses most of its entries in so short a training.
    """

    def __init__(self, tokenizer: VQVAE, images: Tensor, config: DictConfig) -> None:
        super().__init__(tokenizer, images, config)
        # so that the first rests, and codes, are plain features
        nn.init.zeros_(tokenizer.quantize.embedding.weight)
        for scale in range(len(tokenizer.quantize.patch_nums)):
            phi = tokenizer.quantize.phi(scale)
            if isinstance(phi, nn.Conv2d):
                nn.init.dirac_(phi.weight)
                nn.init.zeros_(phi.bias)

    def quantize(self, f: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The quantized features (B, C, P, P) of f, with straight-through gradient, and their loss.

        Moves the codes; f in full precision, outside autocast.
        """
        quantizer = self.tokenizer.quantize
        fixed = f.detach()
        total = torch.zeros_like(fixed)  # (B, C, P, P)
        loss = fixed.new_zeros(())
        rests: list[Tensor] = []  # (B, p^2, C) of each scale
        ids: list[Tensor] = []  # (B, p^2)
        for scale in range(len(quantizer.patch_nums)):
            rests.append(quantizer.pool(fixed - total.detach(), scale))
            ids.append(quantizer.nearest(rests[-1]))
            total = total + quantizer.lift(quantizer.embedding(ids[-1]), scale)
            loss = loss + self.commitment * F.mse_loss(f, total.detach()) + F.mse_loss(total, fixed)
        self.update_codes(
            torch.cat(rests, dim=1).flatten(0, 1), torch.cat(ids, dim=1).flatten(), step
        )
        return f + (total - f).detach(), loss / len(ids)

    def loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        images = as_float(self.images[index]) * 2 - 1
        f = self.tokenizer.encode_features(images).float()  # (B, C, P, P)
        # distances and running means need full precision
        with torch.autocast(f.device.type, enabled=False):
            quantized, quantization = self.quantize(f, step)
        decoded = self.tokenizer.decode_features(quantized)
        l1 = F.l1_loss(decoded, images)
        l2 = F.mse_loss(decoded, images)
        figures = {
            "l1": l1,
            "quantization": quantization,
            "codes_used": 1 - self.dead().float().mean(),
        }
        return l1 + l2 + quantization, figures


class VARTask(TransformerTask):
    """Cross-entropy of all scales' tokens, given the scales before and the class; label dropout."""

    def __init__(
        self, generator: Generator, images: Tensor, labels: Tensor, config: DictConfig
    ) -> None:
        self.tokens = tokenize(generator, images)
        self.labels = labels
        self.quantizer = generator.tokenizer.quantize
        super().__init__(generator, len(labels), config)

    @staticmethod
    def initialise(model: VAR, adaln: float = 0.5, gate: float = 1e-3, head: float = 0.02) -> None:
        """VAR's start: truncated normals of deviation (3 C)^(-1/2), what writes to the stream
        scaled down, zero biases.

        The rows of AdaLN that make scale and shift are scaled by `adaln`, those that make gates by
        `gate`, the head by `head`, proj and fc2 by (2 depth)^(-1/2), as `VAR.init_weights` of
        FoundationVision/VAR and the authors' command for their smallest model say.

        Raises:
            ValueError: the model shares one AdaLN.
        """
        if model.shared_ada_lin is not None:
            raise ValueError("model: shared_aln is True, only False is initialised")
        dim = model.head.in_features
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif not name.endswith("scale_mul_1H11"):
                nn.init.trunc_normal_(parameter, std=(3 * dim) ** -0.5)
        with torch.no_grad():
            model.head.weight *= head
            model.head_nm.ada_lin[1].weight *= adaln
            for block in model.blocks:
                block.ada_lin[1].weight[: 2 * dim] *= gate  # gates come first
                block.ada_lin[1].weight[2 * dim :] *= adaln
                for linear in (block.attn.proj, block.ffn.fc2):
                    linear.weight /= math.sqrt(2 * len(model.blocks))

    def loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        ids = self.tokens[index].long()  # (B, L)
        labels = self.drop_labels(self.labels[index], self.model.num_classes)
        # inputs as inference makes them
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            inputs = self.quantizer.teacher_inputs(ids)
        logits, seen = self.run(labels, inputs)  # (B, L, V)
        nll = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
        return self.with_planted(nll, seen)
