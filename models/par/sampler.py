"""Sampling from PAR: the first tokens one at a time, then a group per step; classifier-free
guidance, KV cache.

Follows `generate` of YuqingWang1029/PAR `autoregressive/models/generate.py`. The released code
draws from a global generator; here the caller says how to draw, so that a sample depends on its own
random numbers alone. Kept as released: guidance is off unless `cfg_scale` exceeds 1; `cfg_interval`
counts the single tokens from the second one, and starts again at the first group, where it counts
tokens; top-p is applied to what top-k has left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.decoding.decoder import Decoder
from models.decoding.next_tokens import NextTokens, run_steps
from models.layers import KVCache
from models.par.transformer import PAR

COLDEST = 1e-5  # the least temperature of the released code
# draw(probabilities (B, n, V), step) -> ids (B, n)
Draw = Callable[[Tensor, int], Tensor]


def truncate_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (..., V) with -inf outside the `top_k` largest and outside the smallest set of total
    probability > `top_p`; 0 and 1 keep all."""
    if top_k > 0:
        largest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values  # (..., k)
        logits = logits.masked_fill(logits < largest[..., -1:], float("-inf"))
    if top_p < 1:
        descending, order = logits.sort(dim=-1, descending=True)  # (..., V) each
        # total probability of the tokens that are more likely
        before = descending.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[..., 0] = 0  # the roll took the total of all there
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before > top_p)
        logits = logits.masked_fill(outside, float("-inf"))
    return logits


def guide_logits(logits: Tensor, scale: float, guided: bool) -> Tensor:
    """Guided logits (B, n, V) from those of both branches (2 B, n, V), conditional rows first."""
    cond, uncond = logits.chunk(2)  # (B, n, V) each
    return uncond + (cond - uncond) * scale if guided else cond


def is_guided(model: PAR, first: int, cfg_interval: int) -> bool:
    """Whether there is guidance at the step that begins at position `first`."""
    ar = model.layout.ar
    index = first - (1 if first < ar else ar)
    return cfg_interval < 0 or index <= cfg_interval


@torch.no_grad()
def generate(
    model: PAR,
    labels: Tensor,
    draw: Draw,
    cfg_scale: float,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cached: bool = True,
    max_new_tokens: int | None = None,
    decoder: Decoder | None = None,
) -> Tensor:
    """Image tokens (B, L) in generation order for class labels (B,).

    Args:
        draw: picks the next ids from probabilities (B, n, V) at a step, n = 1 or a group.
        cfg_scale: guidance scale; at most 1 switches guidance off.
        cfg_interval: last index with guidance in each of the two phases; negative for guidance
            throughout.
        temperature: divides the guided logits. top_k, top_p: see `truncate`.
        cached: reuse keys and values; False recomputes the whole prefix every step.
        max_new_tokens: stop after the first that many tokens, by default L.
        decoder: runs the cached steps, for ids and labels of these shapes.
    """
    layout = model.layout
    batch = len(labels)
    length = max_new_tokens or layout.tokens
    two_branches = cfg_scale > 1
    if two_branches:  # conditional rows first
        labels = torch.cat((labels, torch.full_like(labels, model.num_classes)))
    ids = torch.zeros(len(labels), length, dtype=torch.long, device=labels.device)  # (B or 2 B, L)
    all_positions = torch.arange(length, device=labels.device)
    cache = [KVCache(length) for _ in model.layers] if cached else None
    if decoder is not None:
        ids, labels = decoder.begin(ids, labels)

    for step, (first, end) in enumerate(layout.steps(length)):
        # logits of the n tokens of this step: (B, n, V), or (2 B, n, V) with guidance
        if decoder is not None:
            logits = decoder(first, end)
        else:
            fed = all_positions[first if cached else 0 : end]
            logits = model(ids, labels, fed, cache)[:, first - end :]

        if two_branches:
            guided = is_guided(model, first, cfg_interval)
            logits = guide_logits(logits, cfg_scale, guided)

        logits = truncate_logits(logits / max(temperature, COLDEST), top_k, top_p)
        probs = logits.softmax(dim=-1)
        # both branches go on with the same tokens
        ids[:, first:end] = draw(probs, step).repeat(len(ids) // batch, 1)
    return ids[:batch].clone()  # a decoder writes its next run into the same `ids`


@torch.no_grad()
def generate_in_graphs(
    model: PAR,
    labels: Tensor,
    uniforms: Tensor,
    decoder: Decoder,
    cfg_scale: float,
    cfg_interval: int = -1,
    temperature: float = 1.0,
) -> Tensor:
    """Image tokens (B, L) as `generate` makes them without top-k and top-p, from random numbers
    (B, L): a replay a step.

    Sums are rounded in another order than there: attention's and those of the draw.
    """
    steps = model.layout.steps(model.layout.tokens)
    two_branches = cfg_scale > 1
    scales: list[float] = []  # of every token
    for first, end in steps:
        guided = is_guided(model, first, cfg_interval)
        scales += [cfg_scale if guided else 1.0] * (end - first)
    if two_branches:  # conditional rows first
        labels = torch.cat((labels, torch.full_like(labels, model.num_classes)))
    finish = NextTokens(two_branches, max(temperature, COLDEST), offset=0)
    return run_steps(decoder, steps, labels, uniforms, scales, finish)
