"""Training of MAR: its KL autoencoder, and the masked transformer with the diffusion head.

As in the authors' program (LTH14/mar `engine_mar.py`, `models/mar.py`), latents are drawn from the
posterior anew in every step, one share of hidden tokens holds for a whole batch, and every token is
noised `DRAWS` times for one pass of the transformer. The weights start as theirs.

Other than there, where seven tenths of the tokens or more are hidden, the share is that of a random
moment of a sampling run. A small model does not generalise from few visible tokens to many: trained
the authors' way, it predicts a token from 60 others (the last iteration) no better than from the
class alone, and from 25 best.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from experiments.train_zoo.tasks.base import TransformerTask, as_float
from models.mar.diffusion import STEPS, cosine_diffusion
from models.mar.generator import MARGenerator
from models.mar.tokenizer import AutoencoderKL, Posterior
from models.mar.transformer import MAR

DRAWS = 4  # diffusion steps and noises of each token in a step
PLANTED_EVERY = 4  # steps; the planted term, which costs as much as all else, has this weight then


class KLTask:
    """KL autoencoder: L1 + L2 reconstruction on [-1, 1], and `kl_weight` times nats per image."""

    def __init__(self, tokenizer: AutoencoderKL, images: Tensor, config: DictConfig) -> None:
        self.model = self.tokenizer = tokenizer
        self.images = images
        self.size = len(images)
        self.kl_weight = config.kl_weight

    def loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        images = 2 * as_float(self.images[index]) - 1  # (B, 3, S, S)
        posterior = self.tokenizer.encode(images)
        # out of the bfloat16 that autocast leaves
        posterior = Posterior(posterior.mean.float(), posterior.logvar.float())
        kl = posterior.kl().mean()
        decoded = self.tokenizer.decode(posterior.sample(torch.randn_like(posterior.mean))).float()
        l1 = F.l1_loss(decoded, images)
        l2 = F.mse_loss(decoded, images)
        return l1 + 2 * l2 + self.kl_weight * kl, {"l1": l1, "kl": kl}

    @torch.no_grad()
    def finish(self, samples: int = 10000, batch: int = 500) -> dict[str, float]:
        """Give every latent channel zero mean and unit variance.

        Both are over draws from the posteriors of `samples` images. Mean m and standard deviation s
        go into the two 1 x 1 convolutions around the latents, z' = (z - m) / s, so that images come
        out as before and `scale=1` is right.

        Returns:
            The least and the greatest s, the standard deviation of the noise relative to s, and the
            nats per image.
        """
        chosen = self.images[:: max(len(self.images) // samples, 1)]
        posteriors = [self.tokenizer.encode(2 * as_float(part) - 1) for part in chosen.split(batch)]
        means = by_channel(torch.cat([posterior.mean for posterior in posteriors]))  # (C, n H W)
        logvars = torch.cat([posterior.logvar for posterior in posteriors])
        noise = by_channel(logvars.exp()).mean(dim=1)  # (C,), the mean variance of a posterior
        shift = means.mean(dim=1)  # (C,)
        scale = (means.var(dim=1) + noise).sqrt()  # (C,)
        into = self.tokenizer.quant_conv
        out = self.tokenizer.post_quant_conv
        channels = len(scale)
        into.weight[:channels] /= scale[:, None, None, None]
        into.bias[:channels] = (into.bias[:channels] - shift) / scale
        into.bias[channels:] -= 2 * scale.log()  # the log variance
        out.bias += out.weight[:, :, 0, 0] @ shift
        out.weight *= scale[:, None, None]
        return {
            "latent_std_min": scale.min().item(),
            "latent_std_max": scale.max().item(),
            "noise_share": (noise.sqrt() / scale).mean().item(),
            "kl": torch.cat([posterior.kl() for posterior in posteriors]).mean().item(),
        }


def by_channel(moments: Tensor) -> Tensor:
    """Moments (N, C, H, W) as a row per channel, (C, N H W)."""
    return moments.transpose(0, 1).flatten(1)


class MARTask(TransformerTask):
    """Diffusion loss of the hidden tokens, label dropout.

    The number of visible tokens changes from step to step, and with it the shapes of the encoder
    and of the diffusion head, which takes the hidden ones: on a GPU both passes of a step are
    compiled once for all numbers. The second pass, over a few samples, is that of the planted term,
    which needs a visible token to compare the buffer with.
    """

    # buffer and image tokens have their peaks in the same channels at first
    PLANTING = {"through_rest": True}

    def __init__(
        self, generator: MARGenerator, images: Tensor, labels: Tensor, config: DictConfig
    ) -> None:
        self.means, self.spreads = encode_latents(generator, images)
        self.labels = labels
        super().__init__(generator, len(labels), config)
        self.diffusion = cosine_diffusion(device=self.labels.device)
        self.run = self.compiled(self.losses)
        self.term = self.compiled(self.planted_term)

    @staticmethod
    def initialise(model: MAR) -> None:
        """Xavier linears, normal (0.02) embeddings and tokens, zero modulations and last layer."""
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or "final_layer.linear" in name:
                nn.init.zeros_(parameter)
            elif "time_embed" in name or name.endswith(
                ("embed_learned", "latent", "mask_token", "class_emb.weight")
            ):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.ones_(parameter)  # weights of the norms

    def losses(
        self,
        tokens: Tensor,
        mask: Tensor,
        seen: Tensor,
        labels: Tensor,
        hidden: Tensor,
        t: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Mean diffusion loss of the R hidden ones of the tokens (B, L, D), each noised n times.

        Args:
            mask, seen, labels: as in `MAR.encode`. hidden: the hidden tokens' numbers in 0 .. B L -
                1, (R,).
            t, noise: (n, R) and (n, R, D).
        """
        model = self.model
        encoded = model.encode(tokens, mask, labels, seen)
        decoded = model.decode(model.pad(encoded, mask, seen))  # (B, L, C)
        z = decoded.flatten(0, 1)[hidden]  # (R, C)
        z = z.expand(len(t), -1, -1).flatten(0, 1)  # (n R, C)
        clean = tokens.flatten(0, 1)[hidden].expand_as(noise).flatten(0, 1)  # (n R, D)
        steps = t.flatten()  # (n R,)
        noise = noise.flatten(0, 1)  # (n R, D)
        x = self.diffusion.q_sample(clean, steps, noise)
        output = model.diffloss.net(x, steps, z).float()  # what follows needs full precision
        error, bound = self.diffusion.losses(output, clean, x, steps, noise)
        self.seen.clear()  # the hooks are there for `planted_term`
        return (error + bound).mean()

    def planted_term(self, tokens: Tensor, mask: Tensor, seen: Tensor, labels: Tensor) -> Tensor:
        """The planted term of a pass over tokens (B, L, D); the others as in `MAR.encode`."""
        model = self.model
        model.decode(model.pad(model.encode(tokens, mask, labels, seen), mask, seen))
        term = self.planted(self.seen)
        self.seen.clear()
        return term

    def masked(self, batch: int, count: int) -> tuple[Tensor, Tensor]:
        """Masks (batch, L) that hide `count` random tokens a row, and slots the encoder sees."""
        mask = random_mask(batch, self.model.seq_len, count, self.labels.device)
        return mask, any_length(self.model.seen(mask, self.model.seq_len - count), dim=1)

    def loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        means = self.means[index].float()  # (B, L, D)
        batch, length, dim = means.shape
        tokens = means + self.spreads[index].float() * torch.randn_like(means)
        labels = self.drop_labels(self.labels[index], self.model.num_classes)
        count = hidden_count(length)
        mask, seen = self.masked(batch, count)
        # (B count,), as `nonzero` would give after waiting for a GPU to count
        hidden = mask.flatten().byte().argsort(descending=True, stable=True)[: batch * count]
        # (DRAWS, R), R = B count
        t = torch.randint(STEPS, (DRAWS, batch * count), device=means.device)
        noise = torch.randn(*t.shape, dim, device=means.device)  # (DRAWS, R, D)
        nll = self.run(
            tokens,
            mask,
            seen,
            labels,
            any_length(hidden, dim=0),
            any_length(t, dim=1),
            any_length(noise, dim=1),
        )
        if self.planted is None or (step + 1) % PLANTED_EVERY:
            return nll, {"nll": nll}
        tokens = tokens[: self.planted.SAMPLES]
        labels = labels[: self.planted.SAMPLES]
        count = min(hidden_count(length), length - 1)  # one is visible, to compare with
        mask, seen = self.masked(len(tokens), count)
        term = self.term(tokens, mask, seen, labels)
        total = nll + PLANTED_EVERY * self.config.planted.weight * term
        return total, {"nll": nll, "planted": term}


def any_length(x: Tensor, dim: int) -> Tensor:
    """The tensor, after telling the compiler that its size along `dim` changes between calls."""
    torch._dynamo.mark_dynamic(x, dim)
    return x


@torch.no_grad()
def encode_latents(
    generator: MARGenerator, images: Tensor, batch: int = 2048
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the tokens of uint8 images, FP16 (N, L, D) each."""
    scale = generator.tokenizer.scale
    means = []
    spreads = []
    for part in images.split(batch):
        posterior = generator.tokenizer.encode(2 * as_float(part) - 1)
        mean = posterior.mean * scale  # (B, C, H, W)
        spread = (0.5 * posterior.logvar).exp() * scale
        means.append(generator.transformer.patchify(mean).half())
        spreads.append(generator.transformer.patchify(spread).half())
    return torch.cat(means), torch.cat(spreads)


def hidden_count(length: int) -> int:
    """Tokens hidden at a random moment of a sampling run (a cosine), at least one."""
    return max(math.ceil(length * math.cos(torch.rand(()).item() * math.pi / 2)), 1)


def random_mask(batch: int, length: int, hidden: int, device: torch.device) -> Tensor:
    """Masks (batch, length) that hide (True) `hidden` tokens in every row."""
    # the second sorting makes ranks of an order
    return torch.rand(batch, length, device=device).argsort(dim=1).argsort(dim=1) < hidden
