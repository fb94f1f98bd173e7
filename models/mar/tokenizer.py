"""KL-16: the variational autoencoder between images and the continuous latents of MAR.

Numerics and state-dict keys follow LTH14/mar `models/vae.py` (the LDM autoencoder). Surprise kept:
the encoder has attention where the training resolution reaches 16 pixels, whatever the size of the
image at hand, the decoder in its middle only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.vqgan_blocks import AttnBlock, Decoder, Encoder, same_conv


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents, (B, C, H, W) each; its mode is the mean."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """A latent from standard normal noise (B, C, H, W)."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL from the standard normal in nats per image (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] to a Gaussian over latents (B, embed_dim, s, s), and latents
    to images.

    Args:
        embed_dim: latent channels. ch, ch_mult: width, and its multipliers per resolution, finest
            first; each but the last halves the resolution. num_res_blocks: residual blocks per
            level (one more in the decoder).
        resolution, attn_resolutions: image side of training, and the sides at which the encoder has
            attention.
        scale: what brings the latents to unit variance for the transformer; kept here, applied by
            the generator.
    """

    def __init__(
        self,
        embed_dim: int,
        ch_mult: tuple[int, ...],
        ch: int = 128,
        num_res_blocks: int = 2,
        resolution: int = 256,
        attn_resolutions: tuple[int, ...] = (16,),
        scale: float = 0.2325,
    ) -> None:
        super().__init__()
        self.scale = scale
        levels = tuple(n for n in range(len(ch_mult)) if resolution // 2**n in attn_resolutions)
        self.encoder = Encoder(ch, tuple(ch_mult), num_res_blocks, 2 * embed_dim, AttnBlock, levels)
        self.decoder = Decoder(ch, tuple(ch_mult), num_res_blocks, embed_dim, AttnBlock, ())
        self.quant_conv = same_conv(2 * embed_dim, 2 * embed_dim, 1)
        self.post_quant_conv = same_conv(embed_dim, embed_dim, 1)

    def moments(self, images: Tensor) -> Tensor:
        """Mean and unclamped log variance of the latents, (B, 2 * embed_dim, s, s)."""
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor) -> Posterior:
        mean, logvar = self.moments(images).chunk(2, dim=1)  # (B, embed_dim, s, s) each
        return Posterior(mean, torch.clamp(logvar, -30, 20))  # bounds of the LDM code

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))
