"""What a decoding step of one token is fed, in one operator (Triton, CUDA).

Looking up and adding three vectors a row is eight kernels of PyTorch, which take longer to start
than to run.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("ar_ptq::embed_token", mutates_args=())
def embed_token(
    ids: Tensor, positions: Tensor, tokens: Tensor, own: Tensor, following: Tensor
) -> Tensor:
    """The input (B, 1, C) at a position p: that of the token, of its place, and of the next place.

    Sums are rounded one after the other, on every device.

    Args:
        ids: tokens so far (B, L); token p - 2 is at position p.
        positions: p, (1,).
        tokens: vectors of token ids (V, C). own, following: of positions (P, C), read at p and at
            p + 1.
    """
    x = tokens[ids.index_select(1, positions - 2)]  # (B, 1, C)
    x = x + own.index_select(0, positions)
    return x + following.index_select(0, positions + 1)


@embed_token.register_kernel("cuda")
def _(ids, positions, tokens, own, following):
    from models.decoding import embedding_kernel  # Triton is there with CUDA only

    return embedding_kernel.launch_embed(ids, positions, tokens, own, following)


@embed_token.register_fake
def _(ids, positions, tokens, own, following):
    return tokens.new_empty(len(ids), 1, tokens.shape[1])
