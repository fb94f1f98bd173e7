"""KL-16: the variational autoencoder between images and the continuous latents of MAR.

Numerics and state-dict keys follow LTH14/mar `models/vae.py` (the LDM autoencoder). Surprises kept: down-sampling pads
on the right and at the bottom only; the encoder has attention where the training resolution reaches 16 pixels, whatever
the size of the image at hand, the decoder in its middle only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), _conv(inputs, outputs)
        self.norm2, self.conv2 = _norm(outputs), _conv(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = _conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Single-head attention over all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v = (_conv(channels, channels, 1) for _ in range(3))
        self.proj_out = _conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, H * W, C) each
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(h.transpose(1, 2).view_as(x))


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level has it, then the resampling."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, attention: bool = False,
        downsample: bool = False, upsample: bool = False,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outputs) for _ in range(blocks if attention else 0))
        if downsample:
            self.downsample = Downsample(outputs)
        if upsample:
            self.upsample = Upsample(outputs)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if hasattr(self, "downsample"):
            return self.downsample(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Encoder(nn.Module):
    def __init__(
        self, ch: int, mult: tuple[int, ...], blocks: int, z: int, resolution: int, attention: tuple[int, ...],
    ) -> None:
        super().__init__()
        widths = [ch * m for m in (1, *mult)]
        self.conv_in = _conv(3, ch)
        self.down = nn.ModuleList(
            Level(i, o, blocks, resolution // 2**n in attention, downsample=n + 1 < len(mult))
            for n, (i, o) in enumerate(zip(widths, widths[1:]))
        )
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = _norm(widths[-1]), _conv(widths[-1], 2 * z)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, ch: int, mult: tuple[int, ...], blocks: int, z: int) -> None:
        super().__init__()
        widths = [ch * m for m in mult]
        self.conv_in = _conv(z, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(  # stored from the finest level to the coarsest, run the other way
            Level(i, o, blocks + 1, upsample=n > 0) for n, (i, o) in enumerate(zip((*widths[1:], widths[-1]), widths))
        )
        self.norm_out, self.conv_out = _norm(widths[0]), _conv(widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


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
    """Images (B, 3, S, S) in [-1, 1] to a Gaussian over latents (B, embed_dim, s, s), and latents to images.

    Args:
        embed_dim: latent channels. ch, ch_mult: width, and its multipliers per resolution, finest first; each but the
            last halves the resolution. num_res_blocks: residual blocks per level (one more in the decoder).
        resolution, attn_resolutions: image side of training, and the sides at which the encoder has attention.
        scale: what brings the latents to unit variance for the transformer; kept here, applied by the generator.
    """

    def __init__(
        self, embed_dim: int, ch_mult: tuple[int, ...], ch: int = 128, num_res_blocks: int = 2, resolution: int = 256,
        attn_resolutions: tuple[int, ...] = (16,), scale: float = 0.2325,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.encoder = Encoder(ch, tuple(ch_mult), num_res_blocks, embed_dim, resolution, tuple(attn_resolutions))
        self.decoder = Decoder(ch, tuple(ch_mult), num_res_blocks, embed_dim)
        self.quant_conv = _conv(2 * embed_dim, 2 * embed_dim, 1)
        self.post_quant_conv = _conv(embed_dim, embed_dim, 1)

    def moments(self, images: Tensor) -> Tensor:
        """Mean and unclamped log variance of the latents, (B, 2 * embed_dim, s, s)."""
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor) -> Posterior:
        mean, logvar = self.moments(images).chunk(2, dim=1)
        return Posterior(mean, torch.clamp(logvar, -30, 20))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))
