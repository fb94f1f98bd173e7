"""LlamaGen described for quantization: PAR's sites and folds.

Its sink token is the class token, which under static token-wise quantization has parameters of its
own; all image tokens share theirs.
"""

from __future__ import annotations

from models.llamagen.transformer import LlamaGen
from models.par.adapter import PARAdapter
from ptq.types import Segments


class LlamaGenAdapter(PARAdapter):
    """Sites of a LlamaGen in the order in which a forward pass reaches them."""

    family = "llamagen"
    tables = ("tok_embeddings.weight", "cls_embedding.embedding_table.weight")

    def __init__(self, model: LlamaGen) -> None:
        super().__init__(model, sinks=1)

    @property
    def _tokens(self) -> Segments:
        """The class token, the image tokens."""
        return Segments((0, 1))
