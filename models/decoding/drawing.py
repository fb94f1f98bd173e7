"""From logits to tokens in one operator: guidance, top-k, top-p and the draw (Triton, CUDA).

The samplers' own operators (`truncate_logits`, `philox.categorical`) sort every row. Without a
sort: a logit stays if it is not below the k-th largest, and what it takes to leave the tail of
total probability 1 - top_p is found by halving the range of logits. Sums are in float64, so that a
row gets the token that the operators give it, but where float32 rounding decides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.decoding import philox

# guidance by name: conditional and unconditional logits (N, V) and a weight to guided logits
GUIDANCE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "grown": lambda cond, uncond, weight: (1 + weight).float() * cond - weight.float() * uncond,
    "scaled": lambda cond, uncond, weight: uncond + (cond - uncond) * weight.float(),
}


def truncate_logits(logits: Tensor, top_k: int, top_p: float, stable: bool = False) -> Tensor:
    """Logits (..., V) with -inf outside the `top_k` largest, and of these in the tail whose total
    probability is 1 - `top_p`.

    0 switches either off. Logits that tie with the k-th stay. The most likely token always stays.
    Of logits that tie at the end of the tail, `stable` drops the first ones; else it is the sorting
    that decides.
    """
    if top_k > 0:
        largest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values  # (..., k)
        logits = logits.masked_fill(logits < largest[..., -1:], float("-inf"))
    if top_p > 0:
        ascending, order = logits.sort(dim=-1, stable=stable)  # (..., V) each
        tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        tail[..., -1] = False
        dropped = torch.zeros_like(tail).scatter_(-1, order, tail)  # back in the order of codes
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits


@torch.library.custom_op("ar_ptq::draw_tokens", mutates_args=())
def draw_tokens(
    logits: Tensor,
    uniforms: Tensor,
    guidance: str | None,
    weight: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Tensor:
    """Token ids (N,), one for every row.

    Args:
        logits: (N, V), or with guidance (2 N, V), conditional rows first; float32 or half
            precision.
        uniforms: numbers (N,) in (0, 1), float64.
        guidance: one of `GUIDANCE`, or None. weight: its weight, float64 (1,).
        temperature: divides the guided logits. top_k, top_p: see `truncate_logits`.
    """
    logits = logits.float()
    if guidance is not None:
        cond, uncond = logits.chunk(2)  # (N, V) each
        logits = GUIDANCE[guidance](cond, uncond, weight)
    truncated = truncate_logits(logits / temperature, top_k, top_p, stable=True)
    return philox.categorical(truncated.softmax(dim=-1), uniforms)


@torch.library.custom_op("ar_ptq::draw_next", mutates_args=("ids",))
def draw_next(
    ids: Tensor,
    logits: Tensor,
    positions: Tensor,
    uniforms: Tensor,
    scales: Tensor,
    guided: bool,
    temperature: float,
    offset: int,
) -> Tensor:
    """Draw the next n tokens of every image, write them into `ids`, and return them (B, n).

    Args:
        ids: tokens so far, (B, L), or with guidance (2 B, L): both branches go on with the same.
        logits: (B, n, V), or with guidance (2 B, n, V), conditional rows first.
        positions: of a step, (T,); the last n, less `offset`, are the places of the tokens.
        uniforms: the random number of every place, float64 (B, L).
        scales: of guidance at every place, float64 (L,); the first of the n counts.
        guided: by the form `scaled`. temperature: divides the guided logits.
    """
    count = logits.shape[1]
    places = positions[-count:] - offset  # (n,)
    drawn = draw_tokens(
        logits.flatten(0, 1),
        uniforms[:, places].flatten(),
        "scaled" if guided else None,
        scales[places[:1]],
        temperature,
        0,
        0.0,
    )
    drawn = drawn.view(-1, count)  # (B, n)
    branches = len(ids) // len(drawn)
    ids.index_copy_(1, places, drawn.repeat(branches, 1))
    return drawn


@draw_next.register_kernel("cuda")
def _(ids, logits, positions, uniforms, scales, guided, temperature, offset):
    from models.decoding import drawing_kernel

    return drawing_kernel.launch_draw_next(
        ids, logits, positions, uniforms, scales, guided, temperature, offset
    )


@draw_next.register_fake
def _(ids, logits, positions, uniforms, scales, guided, temperature, offset):
    return ids.new_empty(len(uniforms), logits.shape[1])


@draw_tokens.register_kernel("cuda")
def _(logits, uniforms, guidance, weight, temperature, top_k, top_p):
    from models.decoding import drawing_kernel  # Triton is there with CUDA only

    return drawing_kernel.launch_draw(logits, uniforms, guidance, weight, temperature, top_k, top_p)


@draw_tokens.register_fake
def _(logits, uniforms, guidance, weight, temperature, top_k, top_p):
    return uniforms.new_empty(len(uniforms), dtype=torch.long)
