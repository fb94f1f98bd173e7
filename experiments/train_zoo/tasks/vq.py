"""Training of VQ tokenizers; as it stands, of RAR's, which quantizes the encoder's output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from experiments.train_zoo.tasks.base import as_float


class VQTask:
    """A VQ tokenizer: L1 + L2 reconstruction, commitment, and a codebook that follows the encoder.

    The codes are exponential moving averages of what is assigned to them (van den Oord et al.,
    2017, appendix A.1), and dead ones restart from encoder outputs. A tokenizer with more around
    its codebook overrides `features`, `codes`, `decoded` and `normalised`.
    """

    DECAY = 0.99  # of the codes' running means

    def __init__(self, tokenizer: nn.Module, images: Tensor, config: DictConfig) -> None:
        self.images = images
        self.size = len(images)
        self.commitment = config.commitment
        # after that the codes are left to settle
        self.restart_until = int(0.7 * config.schedule.steps)
        codes = tokenizer.quantize.embedding.weight.requires_grad_(False)
        self.model = nn.Module()  # everything that a checkpoint keeps
        self.model.tokenizer = self.tokenizer = tokenizer
        self.model.register_buffer("count", torch.ones(len(codes), device=codes.device))
        self.model.register_buffer("total", torch.zeros_like(codes))

    def features(self, images: Tensor) -> Tensor:
        """What is quantized, (B, D, H, W) float32, of images (B, 3, S, S) in [0, 1]."""
        return self.tokenizer.encoder(images).float()

    def codes(self, ids: Tensor) -> Tensor:
        """Code maps (B, D, H, W) of ids (B, H, W)."""
        return self.tokenizer.quantize.embedding(ids).permute(0, 3, 1, 2)

    def decoded(self, codes: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1], not clamped, of code maps (B, D, H, W)."""
        return self.tokenizer.decoder(codes)

    def normalised(self, means: Tensor) -> Tensor:
        """The codes (V, D) that stand for the means of what is assigned to them."""
        return means

    @torch.no_grad()
    def update_codes(self, z: Tensor, ids: Tensor, step: int) -> None:
        """Move the codes to the running mean of what was assigned to them: z (n, D), ids (n,)."""
        codes = self.tokenizer.quantize.embedding.weight
        count = self.model.count
        total = self.model.total
        distributed = torch.distributed.is_initialized()
        fresh = z[torch.randint(len(z), (len(codes),), device=z.device)]  # (V, D)
        # every process draws its own: all take those of the first, to have the same codes
        if distributed:
            torch.distributed.broadcast(fresh, 0)
        if step == 0:
            codes.copy_(fresh)
            total.copy_(fresh)
            return
        hot = F.one_hot(ids, len(codes)).to(z.dtype)  # (n, V)
        new_count = hot.sum(0)  # (V,)
        new_total = hot.t() @ z  # (V, D)
        if distributed:
            torch.distributed.all_reduce(new_count)
            torch.distributed.all_reduce(new_total)
        count.lerp_(new_count, 1 - self.DECAY)
        total.lerp_(new_total, 1 - self.DECAY)
        if step % 50 == 0 and step < self.restart_until:
            dead = self.dead()
            mean = count.mean()
            # as if the mean number of features were assigned to each that restarts
            total.copy_(torch.where(dead[:, None], fresh * mean, total))
            count.copy_(torch.where(dead, mean, count))
        codes.copy_(self.normalised(total / count.clamp(min=1e-3)[:, None]))

    def dead(self) -> Tensor:
        """Codes (V,) that are hardly used."""
        return self.model.count < 0.05 * self.model.count.mean()

    def loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        images = as_float(self.images[index])
        z = self.features(images)  # (B, D, H, W)
        # distances and running means need full precision
        with torch.autocast(z.device.type, enabled=False):
            ids = self.tokenizer.quantize(z.detach())  # (B, H, W)
            self.update_codes(z.detach().permute(0, 2, 3, 1).flatten(0, 2), ids.flatten(), step)
        chosen = self.codes(ids)  # (B, D, H, W)
        commitment = F.mse_loss(z, chosen)
        # straight through: what the decoder asks of the codes moves the features
        decoded = self.decoded(z + (chosen - z).detach())
        l1 = F.l1_loss(decoded, images)
        l2 = F.mse_loss(decoded, images)
        figures = {"l1": l1, "commitment": commitment, "codes_used": 1 - self.dead().float().mean()}
        return l1 + 2 * l2 + self.commitment * commitment, figures
