"""Sampling from RAR: one token per step, guidance with a cosine-power schedule, KV cache.

Follows `RAR.generate` of bytedance/1d-tokenizer. The released code draws from a global generator;
here the caller says how to draw, so that a sample depends on its own random numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.decoding.decoder import Decoder
from models.decoding.drawing import draw_tokens
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


@dataclass(frozen=True)
class NextToken:
    """The end of a step: draws the next token and puts it where the next step reads it.

    All that changes from step to step is looked up by position, so that one graph serves them.
    """

    guided: bool
    temperature: float

    def __call__(
        self,
        logits: Tensor,
        positions: Tensor,
        inputs: tuple[Tensor, ...],
        uniforms: Tensor,
        scales: Tensor,
    ) -> Tensor:
        """The drawn ids (B,).

        Args:
            logits: (B, 1, V), or with guidance (2 B, 1, V). positions: of the step, (T,).
            inputs: the model's; of these the tokens so far (B or 2 B, L) are written in place.
            uniforms: the random number of every token, (L, B). scales: of guidance, (L,).
        """
        ids = inputs[0]
        step = positions[-1:] - 1  # (1,): position p predicts token p - 1
        drawn = draw_tokens(
            logits[:, -1],
            uniforms[step][0],
            "scaled" if self.guided else None,
            scales[step],
            self.temperature,
            0,
            0.0,
        )
        # both branches go on with the same token
        branches = len(ids) // len(drawn)
        ids.index_copy_(1, step, drawn.repeat(branches)[:, None])
        return drawn


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
    """Image tokens (B, L) as `generate` makes them, from random numbers (L, B): a replay a step.

    Sums are rounded in another order than there: AdaLN's, attention's and those of the draw.
    """
    batch = len(labels)
    length = model.image_seq_len
    guided = guidance_scale != 0
    condition = branch_conditions(model, labels, guided)
    # (B or 2 B, L)
    ids = torch.zeros(len(condition), length, dtype=torch.long, device=labels.device)
    scales = [guidance_at(step, length, guidance_scale, guidance_power) for step in range(length)]
    ids, _ = decoder.begin(
        ids,
        condition,
        distinct=batch + 1 if guided else None,  # all rows without a class are alike
        finish=NextToken(guided, temperature),
        state=(uniforms, torch.tensor(scales, dtype=torch.float64, device=labels.device)),
    )
    for step in range(length):
        decoder(step + 1 if step else 0, step + 2)  # the first step feeds the cls token too
    return ids[:batch].clone()  # the decoder writes its next run into the same `ids`
