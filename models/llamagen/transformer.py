"""The LlamaGen transformer: a LLaMA-style decoder of image tokens in raster order, one a step.

Numerics and state-dict keys follow FoundationVision/LlamaGen `autoregressive/models/gpt.py`,
class-conditional. PAR is built on it, so that it is PAR with one region and without special tokens:
the class at position 0, token p at position p + 1, and the output at position p predicts token p.
Kept as released: the class token has no place in the grid, and its rotation is cos = sin = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.par.transformer import PAR


class LlamaGen(PAR):
    """The generator.

    Args:
        dim, n_layer, n_head: transformer dimensions.
        vocab_size: image token vocabulary, V.
        block_size: image tokens per image, L, a square number.
        num_classes: classes, N; label N means "no class".
        n_kv_head, multiple_of: see `PAR`.
    """

    def __init__(
        self,
        dim: int,
        n_layer: int,
        n_head: int,
        vocab_size: int,
        block_size: int,
        num_classes: int,
        n_kv_head: int | None = None,
        multiple_of: int = 256,
    ) -> None:
        super().__init__(
            dim=dim,
            n_layer=n_layer,
            n_head=n_head,
            vocab_size=vocab_size,
            block_size=block_size,
            spe_token_num=0,
            ar_token_num=1,
            num_classes=num_classes,
            n_kv_head=n_kv_head,
            multiple_of=multiple_of,
        )
        del self.spe_tok_embeddings  # of no tokens, and not in the released files

    def embed(self, ids: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        """Inputs (B, T, C) at `positions`, given image tokens (B, n) and labels (B,)."""
        class_token = self.cls_embedding["embedding_table"](labels)[:, None]  # (B, 1, C)
        image = self.tok_embeddings(ids[:, (positions - 1).clamp(min=0)])  # (B, T, C)
        return torch.where((positions == 0)[:, None], class_token, image)
