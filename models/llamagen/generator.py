"""LlamaGen behind the interface of `models.registry.Generator`: as PAR, with tokens in raster
order."""

from __future__ import annotations

from models.llamagen.adapter import LlamaGenAdapter
from models.llamagen.transformer import LlamaGen
from models.par.generator import PARGenerator


class LlamaGenGenerator(PARGenerator):
    """A LlamaGen with its tokenizer."""

    transformer_class = LlamaGen
    adapter_class = LlamaGenAdapter


GENERATOR = LlamaGenGenerator
