"""The multi-scale VQVAE of VAR: token maps of growing size, whose lifted codes add up to an image.

Numerics and state-dict keys follow FoundationVision/VAR `models/vqvae.py`, `models/quant.py` and
`models/basic_vae.py`.

    f = sum over scales s of phi_s(up(codes_s)),  phi(h) = (1 - r) h + r conv(h),  r = 0.5,
with bicubic `up` to the largest map (the last scale is that large already), the convolution after
it, and area pooling on the way down. K convolutions serve S scales: scale s uses the one whose tick
is nearest to s / (S - 1). The ticks lie 1/K apart, but for K = 4 they are spread wider (the first
at 1/12). In the released models scales 2 and 7 of 0 .. 9 are equally near to two ticks but for
rounding, so the ticks are computed by the same NumPy operations as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vqgan_blocks import Decoder, Encoder, group_norm, same_conv


class AttnBlock(nn.Module):
    """Single-head attention over a feature map (B, C, H, W); one convolution makes q, k and v."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = same_conv(channels, 3 * channels, 1)
        self.proj_out = same_conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H * W, 3 * C)
        q, k, v = qkv.chunk(3, dim=-1)  # (B, H * W, C) each
        # (B, H * W, C); the axis put in and taken out is the single head
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(out.transpose(1, 2).view_as(x))


class Phi(nn.Conv2d):
    """(1 - ratio) * h + ratio * conv(h)."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, h: Tensor) -> Tensor:
        return h * (1 - self.ratio) + super().forward(h) * self.ratio


def nearest_tick(at: float, count: int) -> int:
    """Which of `count` convolutions serves the place `at` in [0, 1]; the lower of two as near."""
    edge = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(edge, 1 - edge, count)
    return int(np.abs(ticks - at).argmin())


@cache
def enlarging_matrix(side: int, largest: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bicubic enlargement of a map (side, side) as a product with (side^2, largest^2)."""
    pixels = torch.eye(side * side, dtype=torch.float64)  # one map for every pixel
    maps = pixels.unflatten(1, (1, side, side))  # (side^2, 1, side, side)
    enlarged = F.interpolate(maps, size=(largest, largest), mode="bicubic")
    return enlarged.flatten(1).to(device=device, dtype=dtype)


class MultiScaleQuantizer(nn.Module):
    """Token maps to features and back.

    Args:
        vocab_size, channels: size and dimension of the codebook.
        patch_nums: sides of the token maps, coarse to fine.
        share: number of convolutions `phi`; 0 for one per scale.
        ratio: the r of phi; 0 leaves phi out.
        unit_codes: compare directions only when looking for the nearest code.
    """

    def __init__(
        self,
        vocab_size: int,
        channels: int,
        patch_nums: tuple[int, ...],
        share: int,
        ratio: float,
        unit_codes: bool,
    ) -> None:
        super().__init__()
        self.patch_nums = tuple(patch_nums)
        self.unit_codes = unit_codes
        self.share = share
        self.sizes = [side * side for side in self.patch_nums]
        phis = nn.ModuleList(
            Phi(channels, abs(ratio)) if abs(ratio) > 1e-6 else nn.Identity()
            for _ in range(share or len(patch_nums))
        )
        # of training only
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.patch_nums), vocab_size))
        if share == 0:
            self.quant_resi = phis
        elif share == 1:
            self.quant_resi = nn.ModuleDict({"qresi": phis[0]})
        else:
            self.quant_resi = nn.ModuleDict({"qresi_ls": phis})
        self.embedding = nn.Embedding(vocab_size, channels)

    def phi(self, scale: int) -> nn.Module:
        """The convolution that serves a scale."""
        if self.share == 1:
            return self.quant_resi["qresi"]
        phis = self.quant_resi["qresi_ls"] if self.share else self.quant_resi
        place = scale / max(len(self.patch_nums) - 1, 1)
        return phis[nearest_tick(place, len(phis))]

    def empty(self, batch: int) -> Tensor:
        """The feature map (B, C, P, P) before the first scale."""
        side = self.patch_nums[-1]
        return self.embedding.weight.new_zeros(batch, self.embedding.embedding_dim, side, side)

    def lift(self, codes: Tensor, scale: int, exact: bool = True) -> Tensor:
        """What the code vectors (B, p^2, C) of a scale add to the feature map, (B, C, P, P).

        Not `exact`: enlarged by a product with `enlarging_matrix`, which takes a hundredth of the
        time and differs by rounding.
        """
        side = self.patch_nums[scale]
        largest = self.patch_nums[-1]
        h = codes.transpose(1, 2)  # (B, C, p^2)
        if scale == len(self.patch_nums) - 1:
            h = h.unflatten(2, (side, side))  # (B, C, p, p)
        elif exact:
            h = F.interpolate(h.unflatten(2, (side, side)), size=(largest, largest), mode="bicubic")
        else:
            h = h @ enlarging_matrix(side, largest, h.dtype, h.device)  # (B, C, P^2)
            h = h.unflatten(2, (largest, largest))
        return self.phi(scale)(h)

    def pool(self, features: Tensor, scale: int) -> Tensor:
        """Features (B, C, P, P) at a scale's resolution, (B, p^2, C): the transformer's input."""
        side = self.patch_nums[scale]
        pooled = F.interpolate(features, size=(side, side), mode="area")  # (B, C, p, p)
        return pooled.flatten(2).transpose(1, 2)

    def features(self, ids: Tensor) -> list[Tensor]:
        """The feature map (B, C, P, P) after each scale, for tokens (B, n) of the first scales."""
        total = self.empty(len(ids))
        maps = []
        for scale, size in enumerate(self.sizes):
            end = sum(self.sizes[: scale + 1])
            if end > ids.shape[1]:
                break
            codes = self.embedding(ids[:, end - size : end])  # (B, p^2, C)
            total = total + self.lift(codes, scale)
            maps.append(total)
        return maps

    def teacher_inputs(self, ids: Tensor) -> Tensor:
        """Transformer inputs (B, L - p_0^2, C) of scales 1 and on.

        Args:
            ids: tokens (B, n) of all scales but the last; more are passed over.
        """
        maps = self.features(ids[:, : sum(self.sizes[:-1])])
        # scale s is fed what all scales before it add up to
        inputs = [self.pool(features, scale) for scale, features in enumerate(maps, start=1)]
        if not inputs:  # a single scale has start tokens only
            return self.embedding.weight.new_zeros(len(ids), 0, self.embedding.embedding_dim)
        return torch.cat(inputs, dim=1)

    def nearest(self, z: Tensor) -> Tensor:
        """Ids (B, p^2) of the codes nearest to z (B, p^2, C)."""
        flat = z.flatten(0, 1)  # (B * p^2, C)
        codes = self.embedding.weight  # (V, C)
        if self.unit_codes:
            ids = (F.normalize(flat, dim=-1) @ F.normalize(codes, dim=-1).t()).argmax(dim=1)
        else:
            # |z|^2 + |c|^2, and with -2 z c the squared distance (B * p^2, V)
            distance = flat.square().sum(1, keepdim=True) + codes.square().sum(1)
            ids = torch.addmm(distance, flat, codes.t(), alpha=-2).argmin(dim=1)
        return ids.view(z.shape[:2])

    def forward(self, features: Tensor) -> Tensor:
        """Tokens (B, L) of a feature map (B, C, P, P); each scale codes what those before left."""
        ids = []
        for scale in range(len(self.patch_nums)):
            ids.append(self.nearest(self.pool(features, scale)))
            features = features - self.lift(self.embedding(ids[-1]), scale)
        return torch.cat(ids, dim=1)


class VQVAE(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] to tokens (B, L) of all scales and back.

    S = 2^(levels - 1) * patch_nums[-1].

    Args:
        vocab_size, z_channels: size and dimension of the codebook.
        patch_nums: sides of the token maps.
        ch, ch_mult: base width, and its multipliers per resolution, finest first.
        num_res_blocks: residual blocks per level.
        share_quant_resi, quant_resi, using_znorm: share, ratio and unit_codes of
            `MultiScaleQuantizer`.
        quant_conv_ks: kernel of the convolutions around the quantizer.
    """

    def __init__(
        self,
        vocab_size: int,
        z_channels: int,
        ch: int,
        patch_nums: tuple[int, ...],
        share_quant_resi: int = 4,
        quant_resi: float = 0.5,
        using_znorm: bool = False,
        quant_conv_ks: int = 3,
        ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
    ) -> None:
        super().__init__()
        coarsest = (len(ch_mult) - 1,)  # attention there alone, and in the middle
        args = (ch, tuple(ch_mult), num_res_blocks, z_channels, AttnBlock, coarsest)
        self.encoder = Encoder(*args)
        self.decoder = Decoder(*args)
        self.quantize = MultiScaleQuantizer(
            vocab_size, z_channels, patch_nums, share_quant_resi, quant_resi, using_znorm
        )
        self.quant_conv = same_conv(z_channels, z_channels, quant_conv_ks)
        self.post_quant_conv = same_conv(z_channels, z_channels, quant_conv_ks)

    def encode_features(self, images: Tensor) -> Tensor:
        """Continuous features (B, z_channels, P, P) of images."""
        return self.quant_conv(self.encoder(images))

    def decode_features(self, features: Tensor) -> Tensor:
        """Images of features (B, z_channels, P, P), not clamped."""
        return self.decoder(self.post_quant_conv(features))

    def encode(self, images: Tensor) -> Tensor:
        return self.quantize(self.encode_features(images))

    def decode(self, ids: Tensor) -> Tensor:
        return self.decode_features(self.quantize.features(ids)[-1]).clamp(-1, 1)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> object:
        """As always, but code counts of another number of scales are passed over.

        So one file serves models of any scales.
        """
        key = "quantize.ema_vocab_hit_SV"
        counts = self.quantize.ema_vocab_hit_SV
        if key in state_dict and state_dict[key].shape[0] != counts.shape[0]:
            state_dict = {**state_dict, key: counts}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
