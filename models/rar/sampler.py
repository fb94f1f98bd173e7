"""Sampling from RAR: one token per step, guidance with a cosine-power schedule, KV cache.

Follows `RAR.generate` of bytedance/1d-tokenizer. The released code draws from a global generator;
here the caller says how to draw, so that a sample depends on its own random numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from models.decoding.decoder import Decoder
from models.decoding.next_tokens import NextTokens, run_steps
from models.layers import KVCache
from models.rar.transformer import RAR

# draw(probabilities (B, V), step) -> ids (B,)
Draw = Callable[[Tensor, int], Tensor]


def guidance_at(step: int, steps: int, scale: float, power: float) -> float:
    """1 + (scale - 1) * (1 - cos(pi * (step / steps)^power)) / 2."""
    return 1 + (scale - 1) * (1 - math.cos(math.pi * (step / steps) ** power)) / 2


def branch_conditions(model: RAR, labels: Tensor, guided: bool) -> Tensor:
    """Condition token ids (B,), or with guidance (2 B,), conditional rows first."""
    condition = model.condition_ids(labels)
    if not guided:
        return condition
    return torch.cat((condition, torch.full_like(condition, model.none_condition)))


@torch.no_grad()
def generate(
    model: RAR,
    labels: Tensor,
    draw: Draw,
    guidance_scale: float,
    guidance_power: float,
    temperature: float,
    cached: bool = True,
    decoder: Decoder | None = None,
) -> Tensor:
    """Image tokens (B, L) for class labels (B,).

    Args:
        draw: picks the next ids from probabilities (B, V) at a step.
        guidance_scale: 0 switches guidance off; otherwise the scale grows from 1 to this value.
        guidance_power: exponent of the schedule. temperature: divides the guided logits.
        cached: reuse keys and values; False recomputes the whole prefix every step.
        decoder: replays the cached steps, for ids and conditions of these shapes.
    """
    batch = len(labels)
    length = model.image_seq_len
    guided = guidance_scale != 0
    condition = branch_conditions(model, labels, guided)
    # (B or 2 B, L)
    ids = torch.zeros(len(condition), length, dtype=torch.long, device=labels.device)
    all_positions = torch.arange(length + 1, device=labels.device)
    cache = [KVCache(length + 1) for _ in model.blocks] if cached else None
    if decoder is not None:
        ids, condition = decoder.begin(ids, condition)

    for step in range(length):
        # logits of the next token: (B, V), or (2 B, V) with guidance
        first = step + 1 if step else 0  # the first step feeds the cls token too
        end = step + 2
        if decoder is not None:
            logits = decoder(first, end)[:, -1]
        elif cached:
            positions = all_positions[first:end]
            logits = model(ids, condition, positions=positions, cache=cache)[:, -1]
        else:
            logits = model(ids[:, :step], condition)[:, -1]

        if guided:
            scale = guidance_at(step, length, guidance_scale, guidance_power)
            cond, uncond = logits.split(batch)  # (B, V) each
            logits = uncond + (cond - uncond) * scale

        drawn = draw((logits / temperature).softmax(dim=-1), step)  # (B,)
        # both branches go on with the same token
        ids[:, step] = torch.cat((drawn, drawn)) if guided else drawn
    return ids[:batch].clone()  # a decoder writes its next run into the same `ids`


@torch.no_grad()
def generate_in_graphs(
    model: RAR,
    labels: Tensor,
    uniforms: Tensor,
    decoder: Decoder,
    guidance_scale: float,
    guidance_power: float,
    temperature: float,
) -> Tensor:
    """Image tokens (B, L) as `generate` makes them, from random numbers (B, L): a replay a step.

    Sums are rounded in another order than there: AdaLN's, attention's and those of the draw.
    """
    length = model.image_seq_len
    guided = guidance_scale != 0
    scales = [guidance_at(step, length, guidance_scale, guidance_power) for step in range(length)]
    steps = [(0, 2), *((step + 1, step + 2) for step in range(1, length))]  # cls in the first
    return run_steps(
        decoder,
        steps,
        branch_conditions(model, labels, guided),
        uniforms,
        scales,
        NextTokens(guided, temperature, offset=1),  # position p predicts token p - 1
    )
