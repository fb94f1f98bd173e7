"""Sampling from MAR: tokens appear in a random order, more of them in each iteration, guided by the
null class.

Follows `MAR.sample_tokens` of LTH14/mar. The released code draws orders and noise from global
generators; here both are arguments, so that a sample depends on its own random numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from models.mar.diffusion import cosine_diffusion
from models.mar.transformer import MAR

# noise(iteration, diffusion step, n tokens an image) -> standard normal numbers (B * n, D)
Noise = Callable[[int, int, int], Tensor]


def mask_lengths(length: int, num_iter: int) -> list[int]:
    """Tokens still hidden after each iteration: a cosine, at least one fewer each time, never 0.

    The last entry is 1 although the last iteration reveals everything; its guidance follows this
    number.
    """
    lengths = []
    hidden = length
    for step in range(num_iter):
        share = math.cos(math.pi / 2 * (step + 1) / num_iter)
        hidden = max(1, min(hidden - 1, math.floor(length * share)))
        lengths.append(hidden)
    return lengths


def guidance_at(hidden: int, length: int, cfg: float, schedule: str) -> float:
    """Guidance scale when `hidden` of `length` tokens stay hidden: `linear` from 1 towards cfg, or
    `constant`.

    Raises:
        ValueError: another schedule.
    """
    if schedule == "linear":
        return 1 + (cfg - 1) * (length - hidden) / length
    if schedule == "constant":
        return cfg
    raise ValueError(f"cfg_schedule: {schedule!r} is not one of linear, constant")


def iteration_noise(noise: Noise, iteration: int, count: int) -> Callable[[int], Tensor]:
    """Noise (B * count, D) by diffusion step, of an iteration that reveals `count` tokens."""
    return lambda step: noise(iteration, step, count)


@torch.no_grad()
def generate(
    model: MAR,
    labels: Tensor,
    orders: Tensor,
    noise: Noise,
    num_iter: int,
    cfg: float,
    cfg_schedule: str = "linear",
    temperature: float = 1.0,
    diffusion_steps: str = "100",
) -> Tensor:
    """Image tokens (B, L, D) for class labels (B,); a label equal to the number of classes means
    "no class".

    Args:
        orders: permutation of the tokens of each image (B, L); the last ones of a row are generated
            first.
        noise: noise of the n tokens that each image gets in an iteration, images first, tokens in
            raster order. The diffusion steps count down from T, the start of a chain, to 0.
        num_iter: iterations; one more than there are tokens to reveal is idle.
        cfg, cfg_schedule: guidance scale, 1 switches guidance off; see `guidance_at`.
        temperature: of the diffusion chain. diffusion_steps: respacing, see
            `diffusion.spaced_timesteps`.
    """
    batch = len(labels)
    length = model.seq_len
    guided = cfg != 1.0
    diffusion = cosine_diffusion(diffusion_steps, labels.device)
    copies = 1
    if guided:  # conditional rows first
        labels = torch.cat((labels, torch.full_like(labels, model.num_classes)))
        copies = 2
    tokens = model.mask_token.new_zeros(batch, length, model.token_embed_dim)  # (B, L, D)
    rank = orders.argsort(dim=1)  # (B, L); hidden are the tokens of rank < hidden
    hidden = length

    for iteration, scheduled in enumerate(mask_lengths(length, num_iter)):
        # which tokens appear now
        still_hidden = 0 if iteration + 1 == num_iter else scheduled
        if still_hidden == hidden:
            continue
        mask = rank < hidden  # (B, L)
        predicted = mask & (rank >= still_hidden)  # (B, L)

        # what the transformer says about them: (N, C), N over all images
        z = model(tokens.repeat(copies, 1, 1), mask.repeat(copies, 1), labels)
        cond = z[:batch][predicted]
        uncond = z[batch:][predicted] if guided else None

        # the diffusion head draws them
        scale = guidance_at(scheduled, length, cfg, cfg_schedule)
        chain_noise = iteration_noise(noise, iteration, hidden - still_hidden)
        tokens[predicted] = model.diffloss.sample(
            cond, chain_noise, diffusion, temperature, scale, uncond
        )
        hidden = still_hidden
    return tokens
