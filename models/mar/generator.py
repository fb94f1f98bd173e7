"""MAR behind the interface of `models.registry.Generator`, with densities in place of
log-probabilities.

Tokens are continuous: latents (B, L, D) in the transformer's units. What a next-token predictor
has in `log_probs` and `targets`, MAR has in `density`: the diffusion loss, and the Gaussians
p(x_{t-1} | x_t), whose `gaussian_kl` compares two models; both on explicit draws of (mask, t,
noise).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.decoding import philox
from models.generation import ImageGenerator
from models.mar.adapter import MARAdapter
from models.mar.diffusion import STEPS, Gaussian, cosine_diffusion
from models.mar.sampler import generate
from models.mar.tokenizer import AutoencoderKL
from models.mar.transformer import MAR, loss_of_output
from models.preset import Preset

# training hides 1 - |normal| * std of the tokens, at least this share
MASK_RATIO_MIN = 0.7
MASK_RATIO_STD = 0.25


@dataclass(frozen=True)
class Draws:
    """What the density of images is measured on: hidden tokens (B, L), diffusion steps (B, L) and
    noise (B, L, D)."""

    mask: Tensor
    t: Tensor
    noise: Tensor


class Density(NamedTuple):
    """What a model makes of draws.

    Attributes:
        loss: diffusion loss (B, L) of the hidden tokens, zero for visible ones.
        transitions: p(x_{t-1} | x_t) of the N hidden tokens (N, D), in the order of the mask.
    """

    loss: Tensor
    transitions: Gaussian


class MARGenerator(ImageGenerator):
    """A MAR with its tokenizer."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        self.transformer = MAR(**preset.transformer)
        self.tokenizer = AutoencoderKL(**preset.tokenizer)
        self.adapter = MARAdapter(self.transformer)

    def sample(
        self, labels: Tensor, seed: int, index: Tensor, settings: dict[str, object]
    ) -> Tensor:
        """Tokens (B, L, D); see `models.mar.sampler.generate` for the settings."""
        index = index.to(labels.device)
        model = self.transformer
        orders = philox.uniform(seed, index, 0, model.seq_len).argsort(dim=1)  # (B, L)

        def noise(iteration: int, step: int, n: int) -> Tensor:
            draw = 1 + iteration * (STEPS + 1) + step  # 0 drew the orders
            drawn = philox.normal(seed, index, draw, n * model.token_embed_dim)  # (B, n * D)
            return drawn.view(-1, model.token_embed_dim).to(model.mask_token.dtype)

        return generate(model, labels, orders, noise, **settings)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1]."""
        latents = self.transformer.unpatchify(tokens)  # (B, C, s, s)
        latents = latents.to(self.tokenizer.post_quant_conv.weight) / self.tokenizer.scale
        return ((self.tokenizer.decode(latents) + 1) / 2).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokens (B, L, D) of images in [0, 1]: the posterior's mean, so nothing is drawn."""
        posterior = self.tokenizer.encode(2 * images - 1)  # (B, C, s, s) each
        return self.transformer.patchify(posterior.mean * self.tokenizer.scale)

    def draws(self, seed: int, index: Tensor) -> Draws:
        """Draws for images `index` (B,), distributed as in the authors' training: (seed, index)
        alone decides them."""
        model = self.transformer
        index = index.to(model.mask_token.device)
        length = model.seq_len

        # the mask ratio is a normal around 1, cut off above 1 and below the minimum, by inversion
        lowest = torch.tensor((MASK_RATIO_MIN - 1) / MASK_RATIO_STD, dtype=torch.float64)
        low = torch.special.ndtr(lowest).item()
        quantile = low + (0.5 - low) * philox.uniform(seed, index, 0)  # (B, 1)
        hidden = (length * (1 + MASK_RATIO_STD * torch.special.ndtri(quantile))).ceil()  # (B, 1)

        rank = philox.uniform(seed, index, 1, length).argsort(dim=1).argsort(dim=1)  # (B, L)
        t = (philox.uniform(seed, index, 2, length) * STEPS).long()  # (B, L)
        noise = philox.normal(seed, index, 3, length * model.token_embed_dim)  # (B, L * D)
        return Draws(rank < hidden, t, noise.view(*t.shape, -1).to(model.mask_token.dtype))

    @torch.no_grad()
    def density(self, tokens: Tensor, labels: Tensor, draws: Draws) -> Density:
        """Diffusion loss and transitions of one pass of the model, without guidance.

        `gaussian_kl(reference, quantized).sum(-1)` of two models' transitions is the KL of each
        token in nats.
        """
        hidden = draws.mask
        inputs = (draws.t, draws.noise)
        # (B, L, 2 D)
        output = self.transformer.denoise(tokens, hidden, labels, *inputs)
        loss = loss_of_output(output, tokens, hidden, *inputs)
        diffusion = cosine_diffusion(device=draws.t.device)
        t = draws.t[hidden]
        noised = diffusion.q_sample(tokens[hidden], t, draws.noise[hidden])  # (N, D)
        return Density(loss, diffusion.p_mean_variance(output[hidden], noised, t))


GENERATOR = MARGenerator
