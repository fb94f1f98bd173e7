"""The convolutional blocks of the tokenizers that descend from CompVis's VQGAN, and the autoencoder
built from them.

Numerics and parameter names are those of the released files. VAR, PAR and MAR agree on the blocks,
but for VAR's own attention. VAR and MAR agree on the encoder and the decoder too; PAR stores its
levels under other names.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def same_conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = same_conv(inputs, outputs)
        self.norm2 = group_norm(outputs)
        self.conv2 = same_conv(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = same_conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention over all places of a feature map (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v = (same_conv(channels, channels, 1) for _ in range(3))
        self.proj_out = same_conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # (B, H * W, C) each
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(out.transpose(1, 2).view_as(x))


class Downsample(nn.Module):
    """A convolution of stride 2, padded below and to the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = same_conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if there is any, then a change
    of resolution."""

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
        width, mult: base width, and the levels' widths over it, finest first. blocks: residual
            blocks per level.
        z: output channels. attention: the block to use. attention_at: levels that have it, 0 the
            finest.
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
        widths = [width * m for m in (1, *mult)]
        last = len(mult) - 1
        self.conv_in = same_conv(3, width)
        self.down = nn.ModuleList(
            Level(i, o, blocks, attention if n in attention_at else None, downsample=n < last)
            for n, (i, o) in enumerate(zip(widths, widths[1:]))
        )
        self.mid = Middle(widths[-1], attention)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = same_conv(widths[-1], z)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
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
        widths = [width * m for m in mult]
        self.conv_in = same_conv(z, widths[-1])
        self.mid = Middle(widths[-1], attention)
        self.up = nn.ModuleList(  # stored from the finest level to the coarsest, run the other way
            Level(i, o, blocks + 1, attention if n in attention_at else None, upsample=n > 0)
            for n, (i, o) in enumerate(zip((*widths[1:], widths[-1]), widths))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = same_conv(widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
