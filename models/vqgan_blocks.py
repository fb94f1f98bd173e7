"""The convolutional blocks of tokenizers that descend from CompVis's VQGAN, and their autoencoder.

Numerics and parameter names are those of the released files. VAR, PAR and MAR agree on the blocks,
but for VAR's own attention. VAR and MAR agree on the encoder and the decoder too; PAR stores its
levels under other names.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)  # PyTorch's own eps is 1e-5


def same_conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut, which is a 1x1 convolution where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = same_conv(inputs, outputs)
        self.norm2 = group_norm(outputs)
        self.conv2 = same_conv(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = same_conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, outputs, H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return h + x


class AttnBlock(nn.Module):
    """Single-head attention over all places of a feature map (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = same_conv(channels, channels, 1)
        self.k = same_conv(channels, channels, 1)
        self.v = same_conv(channels, channels, 1)
        self.proj_out = same_conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q = self.q(h).flatten(2).transpose(1, 2)  # (B, H * W, C)
        k = self.k(h).flatten(2).transpose(1, 2)
        v = self.v(h).flatten(2).transpose(1, 2)
        # (B, H * W, C); the axis put in and taken out is the single head
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(out.transpose(1, 2).view_as(x))  # back to (B, C, H, W)


class Downsample(nn.Module):
    """A convolution of stride 2, padded below and to the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # left, right, top, bottom


class Upsample(nn.Module):
    """Twice the size by repetition, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = same_conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each with its attention if any, then a resampling."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        attention: type[nn.Module] | None,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks)
        )
        self.attn = nn.ModuleList(attention(outputs) for _ in range(blocks if attention else 0))
        if downsample:
            self.downsample = Downsample(outputs)
        if upsample:
            self.upsample = Upsample(outputs)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Middle(nn.Module):
    """Two residual blocks with attention between them, at the coarsest resolution."""

    def __init__(self, channels: int, attention: type[nn.Module]) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = attention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images (B, 3, S, S) to (B, z, S / 2^(levels - 1), ...), with attention in the middle and at
    some levels.

    Args:
        width, mult: base width, and the levels' widths over it, finest first.
        blocks: residual blocks per level.
        z: output channels.
        attention: the attention block to use.
        attention_at: levels that have it, 0 the finest.
    """

    def __init__(
        self,
        width: int,
        mult: tuple[int, ...],
        blocks: int,
        z: int,
        attention: type[nn.Module],
        attention_at: tuple[int, ...],
    ) -> None:
        super().__init__()
        # what enters each level, and what leaves the last
        widths = [width * factor for factor in (1, *mult)]
        coarsest = len(mult) - 1
        self.conv_in = same_conv(3, width)
        self.down = nn.ModuleList()
        for n in range(len(mult)):
            level_attention = attention if n in attention_at else None
            self.down.append(
                Level(widths[n], widths[n + 1], blocks, level_attention, downsample=n < coarsest)
            )
        self.mid = Middle(widths[-1], attention)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = same_conv(widths[-1], z)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # (B, width, S, S)
        # every level but the coarsest halves the sides
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """The encoder's mirror image, with one more residual block per level; arguments as there, z
    input channels."""

    def __init__(
        self,
        width: int,
        mult: tuple[int, ...],
        blocks: int,
        z: int,
        attention: type[nn.Module],
        attention_at: tuple[int, ...],
    ) -> None:
        super().__init__()
        widths = [width * factor for factor in mult]
        wider = (*widths[1:], widths[-1])  # of the level before, on the way from coarse to fine
        self.conv_in = same_conv(z, widths[-1])
        self.mid = Middle(widths[-1], attention)
        self.up = nn.ModuleList()  # stored from the finest level to the coarsest, run the other way
        for n in range(len(mult)):
            level_attention = attention if n in attention_at else None
            self.up.append(Level(wider[n], widths[n], blocks + 1, level_attention, upsample=n > 0))
        self.norm_out = group_norm(widths[0])
        self.conv_out = same_conv(widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))  # (B, widths[-1], s, s)
        # every level but the finest doubles the sides
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
