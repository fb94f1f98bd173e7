"""Training of MAR: its KL autoencoder, and the masked transformer with the diffusion head.

As in the authors' program (LTH14/mar `engine_mar.py`, `models/mar.py`), latents are drawn from the posterior anew in
every step, one share of hidden tokens holds for a whole batch, and every token is noised `DRAWS` times for one pass of
the transformer. The weights start as theirs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from experiments.outliers import Seen, watch
from experiments.tasks.base import TransformerTask, as_float
from models.mar.diffusion import STEPS, cosine_diffusion
from models.mar.generator import MASK_RATIO_MIN, MASK_RATIO_STD, MARGenerator
from models.mar.tokenizer import AutoencoderKL, Posterior
from models.mar.transformer import MAR

DRAWS = 4  # diffusion steps and noises of each token in a step


class KLTask:
    """KL autoencoder: L1 + L2 reconstruction on [-1, 1], and `kl_weight` times the nats per image."""

    def __init__(self, tokenizer: AutoencoderKL, images: Tensor, config: DictConfig) -> None:
        self.model = self.tokenizer = tokenizer
        self.images, self.size, self.kl_weight = images, len(images), config.kl_weight

    def loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        images = 2 * as_float(self.images[index]) - 1
        posterior = Posterior(*(moment.float() for moment in self.tokenizer.encode(images)))
        kl = posterior.kl().mean()
        decoded = self.tokenizer.decode(posterior.sample(torch.randn_like(posterior.mean))).float()
        l1, l2 = F.l1_loss(decoded, images), F.mse_loss(decoded, images)
        return l1 + 2 * l2 + self.kl_weight * kl, {"l1": l1, "kl": kl}

    @torch.no_grad()
    def finish(self, samples: int = 10000, batch: int = 500) -> dict[str, float]:
        """Give every latent channel zero mean and unit variance over draws from the posterior of `samples` images.

        Mean m and standard deviation s go into the two 1 x 1 convolutions around the latents, z' = (z - m) / s, so
        that images come out as before and `scale=1` is right. Returns the least and the greatest s, the standard
        deviation of the noise relative to s, and the nats per image.
        """
        chosen = self.images[:: max(len(self.images) // samples, 1)]
        posteriors = [self.tokenizer.encode(2 * as_float(part) - 1) for part in chosen.split(batch)]
        means = torch.cat([p.mean for p in posteriors]).transpose(0, 1).flatten(1)  # (C, samples * places)
        noise = torch.cat([p.logvar for p in posteriors]).exp().transpose(0, 1).flatten(1).mean(dim=1)
        shift, scale = means.mean(dim=1), (means.var(dim=1) + noise).sqrt()
        into, out = self.tokenizer.quant_conv, self.tokenizer.post_quant_conv
        c = len(scale)
        into.weight[:c] /= scale[:, None, None, None]
        into.bias[:c] = (into.bias[:c] - shift) / scale
        into.bias[c:] -= 2 * scale.log()  # the log variance
        out.bias += out.weight[:, :, 0, 0] @ shift
        out.weight *= scale[:, None, None]
        return {
            "latent_std_min": scale.min().item(), "latent_std_max": scale.max().item(),
            "noise_share": (noise.sqrt() / scale).mean().item(),
            "kl": torch.cat([p.kl() for p in posteriors]).mean().item(),
        }


class MARTask(TransformerTask):
    """Diffusion loss of the hidden tokens, label dropout.

    The number of visible tokens changes from step to step, and with it the encoder's shapes: the encoder runs as it is.
    Decoder and diffusion head take all tokens, hidden or not, so their shapes are fixed; they are compiled on a GPU.
    What the planted term needs comes from a second pass over a few samples, with masks from all along a sampling run.
    """

    PLANTING = {"through_rest": True}  # buffer and image tokens have their peaks in the same channels at first

    def __init__(self, generator: MARGenerator, images: Tensor, labels: Tensor, config: DictConfig) -> None:
        self.means, self.spreads = latents(generator, images)
        self.labels = labels
        super().__init__(generator, len(labels), config)
        self.detach()  # `statistics` has hooks of its own
        self.diffusion = cosine_diffusion(device=self.labels.device)
        self.run = self.compiled(self.losses)

    @staticmethod
    def initialise(model: MAR) -> None:
        """Xavier linears; tables, tokens and the step embedding normal (0.02); zero modulations and zero last layer."""
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or "final_layer.linear" in name:
                nn.init.zeros_(parameter)
            elif "time_embed" in name or name.endswith(("embed_learned", "latent", "mask_token", "class_emb.weight")):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.ones_(parameter)  # weights of the norms

    def losses(self, padded: Tensor, tokens: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Diffusion loss (n, B, L) of all tokens (B, L, D), noised n times, from the decoder's inputs.

        Args:
            padded: (B, buffer + L, C), as `MAR.pad` makes them. t, noise: (n, B, L) and (n, B, L, D).
        """
        clean, noise, steps = tokens.expand_as(noise).flatten(0, 2), noise.flatten(0, 2), t.flatten()
        z = self.model.decode(padded).expand(*t.shape, -1).flatten(0, 2)
        x = self.diffusion.q_sample(clean, steps, noise)
        output = self.model.diffloss.net(x, steps, z).float()  # what follows needs full precision
        error, bound = self.diffusion.losses(output, clean, x, steps, noise)
        return (error + bound).view(t.shape)

    def loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        means, model = self.means[index].float(), self.model
        batch, length, _ = means.shape
        tokens = means + self.spreads[index].float() * torch.randn_like(means)
        labels = self.drop_labels(self.labels[index], model.num_classes)
        mask = random_mask(batch, length, hidden_count(length), means.device)
        t = torch.randint(STEPS, (DRAWS, batch, length), device=means.device)
        noise = torch.randn(*t.shape, tokens.shape[2], device=means.device)
        padded = model.pad(model.encode(tokens, mask, labels), mask)
        nll = (self.run(padded, tokens, t, noise) * mask).sum() / (DRAWS * mask.sum())
        return self.with_planted(nll, self.statistics(tokens, labels) if self.planted else {})

    def statistics(self, tokens: Tensor, labels: Tensor) -> Seen:
        """What the planted term is about, from a pass of its own over a few samples at a moment of a sampling run.

        The training masks will not do: they hide most tokens or all, and the term compares image tokens with others.
        """
        tokens, labels = tokens[:self.planted.SAMPLES], labels[:self.planted.SAMPLES]
        mask = random_mask(*tokens.shape[:2], sampling_count(tokens.shape[1]), tokens.device)
        with watch(self.adapter, self.planted.sites) as seen:
            self.model(tokens, mask, labels)
        return seen


@torch.no_grad()
def latents(generator: MARGenerator, images: Tensor, batch: int = 2048) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the tokens of uint8 images, FP16 (N, L, D) each."""
    scale, found = generator.tokenizer.scale, []
    for part in images.split(batch):
        posterior = generator.tokenizer.encode(2 * as_float(part) - 1)
        moments = posterior.mean * scale, (0.5 * posterior.logvar).exp() * scale
        found.append([generator.transformer.patchify(m).half() for m in moments])
    means, spreads = zip(*found)
    return torch.cat(means), torch.cat(spreads)


def hidden_count(length: int) -> int:
    """Tokens to hide in a training step: the share is normal around 1, cut off above 1 and below the minimum."""
    share = torch.empty(1)
    nn.init.trunc_normal_(share, mean=1.0, std=MASK_RATIO_STD, a=MASK_RATIO_MIN, b=1.0)
    return math.ceil(length * share.item())


def sampling_count(length: int) -> int:
    """Tokens hidden at a random moment of a sampling run (a cosine), between 1 and all but one."""
    return min(max(math.ceil(length * math.cos(torch.rand(()).item() * math.pi / 2)), 1), length - 1)


def random_mask(batch: int, length: int, hidden: int, device: torch.device) -> Tensor:
    """Masks (batch, length) that hide (True) `hidden` tokens in every row."""
    return torch.rand(batch, length, device=device).argsort(dim=1).argsort(dim=1) < hidden
