"""Sampling from VAR: one scale per step, guidance that grows with the scale, KV cache.

Follows `VAR.autoregressive_infer_cfg` of FoundationVision/VAR (`models/var.py`,
`models/helpers.py`). The released code draws from one generator per batch; here the caller says how
to draw, so that a sample depends on its own random numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.decoding.decoder import Decoder
from models.decoding.drawing import draw_tokens, truncate_logits
from models.layers import KVCache
from models.var.tokenizer import MultiScaleQuantizer
from models.var.transformer import VAR

# draw(probabilities (B, T, V), scale) -> ids (B, T)
Draw = Callable[[Tensor, int], Tensor]
# noise(logits (B, T, V), scale) -> standard Gumbel numbers (B, T, V)
Noise = Callable[[Tensor, int], Tensor]


def guidance_at(scale: int, scales: int, cfg: float) -> float:
    """The t of (1 + t) * cond - t * uncond: 0 at the first scale, `cfg` at the last."""
    return cfg * scale / max(scales - 1, 1)


def smooth_weights(logits: Tensor, noise: Tensor, ratio: float) -> Tensor:
    """Weights (B, T, V) over codes for `more_smooth`: a Gumbel softmax that cools with the scale.

    Args:
        logits: truncated logits (B, T, V).
        noise: standard Gumbel numbers (B, T, V).
        ratio: 0 at the first scale, 1 at the last.
    """
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    return ((logits * (1 + ratio) + noise) / temperature).softmax(dim=-1)


@torch.no_grad()
def generate(
    model: VAR,
    quantizer: MultiScaleQuantizer,
    labels: Tensor,
    draw: Draw,
    cfg: float,
    top_k: int,
    top_p: float,
    more_smooth: bool = False,
    noise: Noise | None = None,
    decoder: Decoder | None = None,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Image tokens (B, L) of all scales and the feature map (B, C, P, P) for class labels (B,).

    Args:
        draw: picks the ids of a scale from probabilities (B, T, V).
        cfg: guidance at the last scale; 0 switches guidance off.
        top_k, top_p: see `truncate_logits`.
        more_smooth: feed on, and decode, mixtures of codes in place of the codes drawn. The image
            is then that of the feature map and not of the tokens. Needs `noise`, which is drawn
            after the ids of the same scale.
        decoder: replays the steps, for labels of this shape.
        uniforms: random numbers (B, L) of the tokens. With them, and a decoder that is not exact,
            a scale is guided, truncated and drawn in one operator, and its codes are enlarged by a
            product: sums are rounded in another order.
    """
    batch = len(labels)
    scales = len(model.patch_nums)
    guided = cfg != 0
    if guided:  # conditional rows first
        labels = torch.cat((labels, torch.full_like(labels, model.num_classes)))
    codebook = quantizer.embedding.weight  # (V, C)
    features = quantizer.empty(batch)  # (B, C, P, P)
    inputs = codebook.new_zeros(len(labels), 0, codebook.shape[1])  # none at the first scale
    all_positions = torch.arange(model.length, device=labels.device)
    cache = [KVCache(model.length) for _ in model.blocks]
    ids: list[Tensor] = []
    exact = decoder is None or decoder.exact or uniforms is None or more_smooth
    tables: list[Tensor] | None = None
    if decoder is not None:
        (labels,) = decoder.begin(labels, distinct=batch + 1 if guided else None)
    else:
        tables = model.modulate_ahead(labels, all_positions)  # the same at all scales
    weights = [guidance_at(scale, scales, cfg) for scale in range(scales)]
    weights_there = torch.tensor(weights, dtype=torch.float64, device=labels.device)  # (S,)

    for scale, (begin, end) in enumerate(model.spans):
        # logits of all tokens of this scale: (B, T, V), or (2 B, T, V) with guidance
        if decoder is not None:
            logits = decoder(begin, end, inputs)
        else:
            positions = all_positions[begin:end]
            logits = model(labels, inputs, positions, cache, tables=tables)

        # guide, and draw this scale's tokens
        if exact:
            # half precision is too coarse for top_p
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if guided:
                t = weights[scale]
                cond, uncond = logits.split(batch)  # (B, T, V) each
                logits = (1 + t) * cond - t * uncond
            logits = truncate_logits(logits, top_k, top_p)
            ids.append(draw(logits.softmax(dim=-1), scale))
        else:
            drawn = draw_tokens(
                logits.flatten(0, 1),
                uniforms[:, begin:end].flatten(),
                "grown" if guided else None,
                weights_there[scale : scale + 1],
                1.0,
                top_k,
                top_p,
            )
            ids.append(drawn.view(batch, -1))  # (B, T)

        # add their codes to the feature map
        if more_smooth:
            ratio = scale / max(scales - 1, 1)
            # (B, T, C), (B, T, V) mixtures of the codebook's (V, C)
            code_vectors = smooth_weights(logits, noise(logits, scale), ratio) @ codebook
        else:
            code_vectors = quantizer.embedding(ids[-1])  # (B, T, C)
        features = features + quantizer.lift(code_vectors, scale, exact)

        # the next scale sees the feature map at its own resolution
        if scale + 1 < scales:
            inputs = quantizer.pool(features, scale + 1)  # (B, p^2, C)
            if guided:
                inputs = torch.cat((inputs, inputs))  # both branches go on with the same tokens
    return torch.cat(ids, dim=1), features
