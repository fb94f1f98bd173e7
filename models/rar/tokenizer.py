"""MaskGIT-VQGAN: the convolutional tokenizer of RAR (and of MaskGIT), without attention.

Numerics and state-dict keys follow bytedance/1d-tokenizer `modeling/modules/maskgit_vqgan.py`. Two
oddities of the released weights are kept: where a residual block changes its width, the shortcut
convolution reads the block's own output and the block's input is dropped; and down-sampling is
average pooling.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)  # PyTorch's own eps is 1e-5


def _same_conv(inputs: int, outputs: int, kernel: int, bias: bool = True) -> nn.Conv2d:
    # stride 1: "same" padding
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(inputs)
        self.conv1 = _same_conv(inputs, outputs, 3, bias=False)
        self.norm2 = _group_norm(outputs)
        self.conv2 = _same_conv(outputs, outputs, 3, bias=False)
        if inputs != outputs:
            self.nin_shortcut = _same_conv(outputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, outputs, H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x
        return h + shortcut


class Level(nn.Module):
    """Residual blocks at one resolution, with the convolution that follows an up-sampling."""

    def __init__(self, inputs: int, outputs: int, blocks: int, upsample: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks)
        )
        if upsample:
            self.upsample_conv = _same_conv(outputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if hasattr(self, "upsample_conv"):
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Encoder(nn.Module):
    """Images (B, channels, S, S) to (B, z, S / 2^(levels - 1), ...)."""

    def __init__(
        self, channels: int, width: int, mult: tuple[int, ...], blocks: int, z: int
    ) -> None:
        super().__init__()
        widths = [width * factor for factor in (1, *mult)]
        self.conv_in = _same_conv(channels, width, 3, bias=False)
        self.down = nn.ModuleList(
            Level(inputs, outputs, blocks) for inputs, outputs in zip(widths, widths[1:])
        )
        self.mid = nn.ModuleList(ResBlock(widths[-1], widths[-1]) for _ in range(blocks))
        self.norm_out = _group_norm(widths[-1])
        self.conv_out = _same_conv(widths[-1], z, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(x)
            if i + 1 < len(self.down):
                x = F.avg_pool2d(x, 2)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """The encoder's mirror image."""

    def __init__(
        self, channels: int, width: int, mult: tuple[int, ...], blocks: int, z: int
    ) -> None:
        super().__init__()
        widths = [width * factor for factor in mult]
        wider = (*widths[1:], widths[-1])  # of the level before, on the way from coarse to fine
        self.conv_in = _same_conv(z, widths[-1], 3)
        self.mid = nn.ModuleList(ResBlock(widths[-1], widths[-1]) for _ in range(blocks))
        self.up = nn.ModuleList(  # stored from the finest level to the coarsest, run the other way
            Level(wider[n], widths[n], blocks, upsample=n > 0) for n in range(len(mult))
        )
        self.norm_out = _group_norm(widths[0])
        self.conv_out = _same_conv(widths[0], channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VectorQuantizer(nn.Module):
    """A codebook of `codes` vectors of length `dim`."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)

    def forward(self, z: Tensor) -> Tensor:
        """Ids (B, H, W) of the codes nearest to z (B, D, H, W)."""
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)  # (B * H * W, D)
        codes = self.embedding.weight  # (V, D)
        # |z|^2 + |c|^2 - 2 z c, the squared distance (B * H * W, V)
        distance = flat.pow(2).sum(1, keepdim=True) + codes.pow(2).sum(1) - 2 * flat @ codes.t()
        return distance.argmin(dim=1).view(z.shape[0], *z.shape[2:])


class MaskGitVQGAN(nn.Module):
    """Images in [0, 1], (B, 3, S, S), to raster-ordered codes (B, L) and back.

    Args:
        channel_mult: width multipliers per resolution, finest first; each but the last halves the
            resolution.
        hidden_channels: base width.
        num_res_blocks: residual blocks per level.
        z_channels: code dimension.
        num_embeddings: codebook size.
        num_channels: image channels.
    """

    def __init__(
        self,
        channel_mult: tuple[int, ...],
        hidden_channels: int,
        num_res_blocks: int,
        z_channels: int,
        num_embeddings: int,
        num_channels: int = 3,
    ) -> None:
        super().__init__()
        args = (num_channels, hidden_channels, tuple(channel_mult), num_res_blocks, z_channels)
        self.encoder = Encoder(*args)
        self.decoder = Decoder(*args)
        self.quantize = VectorQuantizer(num_embeddings, z_channels)

    def encode(self, images: Tensor) -> Tensor:
        return self.quantize(self.encoder(images)).flatten(1)

    def decode(self, ids: Tensor) -> Tensor:
        side = int(ids.shape[1] ** 0.5)
        # (B, side, side, D)
        codes = self.quantize.embedding(ids).view(ids.shape[0], side, side, -1)
        z = codes.permute(0, 3, 1, 2).contiguous()  # (B, D, side, side)
        return self.decoder(z).clamp(0, 1)
