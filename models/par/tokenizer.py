"""LlamaGen's VQ-16: the convolutional tokenizer of PAR, with attention at the coarsest resolution.

Numerics and state-dict keys follow YuqingWang1029/PAR `tokenizer/tokenizer_image/vq_model.py`. Kept
as released: codes are normalised to unit length whenever they are used, not when they are stored;
and the decoder's levels are stored from the coarsest to the finest, the order in which they run.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vqgan_blocks import AttnBlock, Downsample, ResBlock, Upsample, group_norm, same_conv


class Level(nn.Module):
    """Residual blocks at one resolution, each with its attention if any, then a resampling."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        attention: bool,
        resample: type[nn.Module] | None,
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            ResBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(outputs) for _ in range(blocks if attention else 0))
        if resample is not None:
            self.add_module(resample.__name__.lower(), resample(outputs))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def _middle_blocks(channels: int) -> nn.Sequential:
    return nn.Sequential(
        ResBlock(channels, channels), AttnBlock(channels), ResBlock(channels, channels)
    )


class Encoder(nn.Module):
    """Images (B, 3, S, S) to (B, z, S / 2^(levels - 1), ...)."""

    def __init__(self, width: int, mult: tuple[int, ...], blocks: int, z: int) -> None:
        super().__init__()
        widths = [width * factor for factor in (1, *mult)]
        self.conv_in = same_conv(3, width)
        self.conv_blocks = nn.Sequential()
        for n in range(len(mult)):
            is_coarsest = n == len(mult) - 1
            self.conv_blocks.append(
                Level(
                    widths[n],
                    widths[n + 1],
                    blocks,
                    attention=is_coarsest,
                    resample=None if is_coarsest else Downsample,
                )
            )
        self.mid = _middle_blocks(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = same_conv(widths[-1], z)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """The encoder's mirror image, with one more residual block per level."""

    def __init__(self, width: int, mult: tuple[int, ...], blocks: int, z: int) -> None:
        super().__init__()
        coarsest_first = (mult[-1], *reversed(mult))
        widths = [width * factor for factor in coarsest_first]
        self.conv_in = same_conv(z, widths[0])
        self.mid = _middle_blocks(widths[0])
        self.conv_blocks = nn.Sequential()
        for n in range(len(mult)):
            is_finest = n == len(mult) - 1
            self.conv_blocks.append(
                Level(
                    widths[n],
                    widths[n + 1],
                    blocks + 1,
                    attention=n == 0,
                    resample=None if is_finest else Upsample,
                )
            )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = same_conv(widths[-1], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_blocks(self.mid(self.conv_in(z)))
        return self.conv_out(F.silu(self.norm_out(x)))


class VectorQuantizer(nn.Module):
    """A codebook of `codes` vectors of length `dim`.

    `codebook_used` belongs to the training; nothing here reads it.
    """

    def __init__(self, codes: int, dim: int, normalised: bool) -> None:
        super().__init__()
        self.normalised = normalised
        self.embedding = nn.Embedding(codes, dim)
        self.register_buffer("codebook_used", torch.zeros(65536))

    def _normalise(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.normalised else x

    def codes(self, ids: Tensor) -> Tensor:
        """Code vectors (..., D) of ids (...)."""
        return self._normalise(self.embedding.weight)[ids]

    def forward(self, z: Tensor) -> Tensor:
        """Ids (B, H, W) of the codes nearest to z (B, D, H, W)."""
        flat = self._normalise(z.permute(0, 2, 3, 1).flatten(0, 2))  # (B * H * W, D)
        codes = self._normalise(self.embedding.weight)  # (V, D)
        # |z|^2 + |c|^2 - 2 z c, the squared distance (B * H * W, V)
        distance = flat.pow(2).sum(1, keepdim=True) + codes.pow(2).sum(1) - 2 * flat @ codes.t()
        return distance.argmin(dim=1).view(z.shape[0], *z.shape[2:])


class VQModel(nn.Module):
    """Images in [-1, 1], (B, 3, S, S), to raster-ordered codes (B, L) and back.

    Args:
        ch_mult: width multipliers per resolution, finest first; each but the last halves the
            resolution.
        ch: base width.
        num_res_blocks: residual blocks per level; the decoder has one more.
        z_channels: width of encoder output and decoder input.
        codebook_size, codebook_embed_dim: number and length of the codes.
        codebook_l2_norm: compare and use codes at unit length.
    """

    def __init__(
        self,
        ch_mult: tuple[int, ...],
        ch: int,
        num_res_blocks: int,
        z_channels: int,
        codebook_size: int,
        codebook_embed_dim: int,
        codebook_l2_norm: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(ch, tuple(ch_mult), num_res_blocks, z_channels)
        self.decoder = Decoder(ch, tuple(ch_mult), num_res_blocks, z_channels)
        self.quantize = VectorQuantizer(codebook_size, codebook_embed_dim, codebook_l2_norm)
        self.quant_conv = same_conv(z_channels, codebook_embed_dim, 1)
        self.post_quant_conv = same_conv(codebook_embed_dim, z_channels, 1)

    def features(self, images: Tensor) -> Tensor:
        """What is quantized: (B, D, H, W)."""
        return self.quant_conv(self.encoder(images))

    def codes(self, ids: Tensor) -> Tensor:
        """Code maps (B, D, H, W) of raster-ordered ids (B, L)."""
        side = math.isqrt(ids.shape[1])
        return self.quantize.codes(ids).transpose(1, 2).unflatten(2, (side, side))

    def encode(self, images: Tensor) -> Tensor:
        return self.quantize(self.features(images)).flatten(1)

    def decode(self, ids: Tensor) -> Tensor:
        """Images, not clamped: values may leave [-1, 1]."""
        return self.decoder(self.post_quant_conv(self.codes(ids)))
