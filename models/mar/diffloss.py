"""The diffusion head of MAR: an MLP that denoises one token given the decoder's output for it, and
its sampler.

Numerics and state-dict keys follow LTH14/mar `models/diffloss.py`. The rows of a call are tokens of
any images at any place, so no token positions are passed to the linears here.

Kept surprise: guidance mixes the predicted noise only, the variance is the conditional one. The
released sampler also carries the null-class rows through the chain and drops them at the end; here
only the network sees them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.layers import Linear
from models.mar.diffusion import Diffusion

FREQUENCIES = 256
# outputs of the modulations, in the order of their rows
BLOCK_CHUNKS = ("shift", "scale", "gate")
FINAL_CHUNKS = ("shift", "scale")


def timestep_embedding(t: Tensor, dim: int = FREQUENCIES) -> Tensor:
    """Cosines, then sines, of t (N,) times dim / 2 frequencies from 1 down to almost 1/10000;
    float32 (N, dim).

    One unit in the last place of a frequency moves the angle by 3e-5 at the last steps, so the
    exponential is taken in double precision: its float32 rounding is then the same on every
    machine.
    """
    half = dim // 2
    # (dim / 2,)
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angle = t[:, None].float() * exponent.double().exp().float()  # (N, dim / 2)
    return torch.cat((angle.cos(), angle.sin()), dim=1)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(FREQUENCIES, width), nn.SiLU(), Linear(width, width))

    def forward(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.mlp(timestep_embedding(t).to(dtype))


class ResBlock(nn.Module):
    """A residual MLP whose normed input is shifted and scaled, and its output gated, by the
    condition.

    `kappa` is the literal 1 of LN(x) * (1 + scale(y)) + shift(y), kept as a vector (not in the
    state dict) so that a per-channel scale of the MLP's input can be folded into the modulation.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 3 * width))
        self.register_buffer("kappa", torch.ones(width), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)  # (N, width) each
        return x + gate * self.mlp(self.in_ln(x) * (self.kappa + scale) + shift)


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))
        self.register_buffer("kappa", torch.ones(width), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)  # (N, width) each
        return self.linear(self.norm_final(x) * (self.kappa + scale) + shift)


class DenoisingMLP(nn.Module):
    """Noised tokens x (N, D) at steps t (N,) of the full diffusion, conditions z (N, C) -> (N, 2
    D)."""

    def __init__(self, channels: int, condition: int, width: int, depth: int) -> None:
        super().__init__()
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = Linear(condition, width)
        self.input_proj = Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        y = self.time_embed(t, x.dtype) + self.cond_embed(z)  # (N, width)
        x = self.input_proj(x)  # (N, width)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)

    def guided(self, x: Tensor, t: Tensor, z: Tensor, scale: float) -> Tensor:
        """Output (2 N, 2 D) for x (N, D), of which both halves share the noise guided away from the
        second.

        t (2 N,) and z (2 N, C) hold the conditional rows, then those of the null class.
        """
        noise, place = self(torch.cat((x, x)), t, z).chunk(2, dim=1)  # (2 N, D) each
        cond, uncond = noise.chunk(2)  # (N, D) each
        return torch.cat(((uncond + scale * (cond - uncond)).repeat(2, 1), place), dim=1)


class DiffLoss(nn.Module):
    """The denoising MLP with the chain that samples from it.

    Args:
        channels: token size D. condition: decoder width C. width, depth: of the MLP.
    """

    def __init__(self, channels: int, condition: int, width: int, depth: int) -> None:
        super().__init__()
        self.net = DenoisingMLP(channels, condition, width, depth)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        noise: Callable[[int], Tensor],
        diffusion: Diffusion,
        temperature: float = 1.0,
        cfg: float = 1.0,
        uncond: Tensor | None = None,
    ) -> Tensor:
        """Tokens (N, D) for conditions z (N, C).

        Args:
            noise: standard normal numbers (N, D) of a step: `noise(T)` is where the chain of T
                steps starts, `noise(t)` what is added at step t; asked for in this order, from T
                down to 0, where it has no effect.
            temperature: scales the added noise, not the start.
            cfg, uncond: guidance scale, and the null class's conditions (N, C); None means no
                guidance.
        """
        x = noise(diffusion.steps)  # (N, D)
        rows = z if uncond is None else torch.cat((z, uncond))  # (N or 2 N, C)
        for step in reversed(range(diffusion.steps)):
            t = torch.full((len(rows),), step, device=x.device)
            original = diffusion.timestep_map[t]  # the network knows steps of the full diffusion
            if uncond is None:
                output = self.net(x, original, rows)  # (N, 2 D)
            else:
                # the conditional rows, (N, 2 D)
                output = self.net.guided(x, original, rows, cfg)[: len(x)]
            x = diffusion.p_sample(output, x, t[: len(x)], noise(step), temperature)
        return x
