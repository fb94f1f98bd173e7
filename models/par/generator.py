"""PAR behind the interface of `models.registry.Generator`.

Tokens are in generation order everywhere; `decode` and `encode` go from and to the tokenizer's
raster order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoding import philox
from models.decoding.decoder import Decoder, Recorder
from models.generation import ImageGenerator
from models.par.adapter import PARAdapter
from models.par.sampler import generate, generate_in_graphs
from models.par.tokenizer import VQModel
from models.par.transformer import PAR
from models.preset import Preset

TRUNCATION = ("top_k", "top_p")  # settings that are off in the authors' sampler


class PARGenerator(ImageGenerator):
    """A PAR with its tokenizer.

    Attributes:
        transformer_class, adapter_class: what it is made of; LlamaGen has its own.
    """

    transformer_class: type[PAR] = PAR
    adapter_class: type[PARAdapter] = PARAdapter

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        self.transformer = self.transformer_class(**preset.transformer)
        self.tokenizer = VQModel(**preset.tokenizer)
        self.adapter = self.adapter_class(self.transformer)
        self.decoder: Decoder | None = None  # decodes in its own way if it is there

    def sample(
        self, labels: Tensor, seed: int, index: Tensor, settings: dict[str, object]
    ) -> Tensor:
        """Tokens (B, L); see `models.par.sampler.generate` for the settings."""
        index = index.to(labels.device)
        decoder = self.decoder
        truncated = settings.get("top_k", 0) > 0 or settings.get("top_p", 1.0) < 1
        if decoder is not None and not decoder.exact and not truncated:
            layout = self.transformer.layout
            uniforms = philox.span_uniforms(seed, index, layout.steps(layout.tokens))  # (B, L)
            guidance = {key: value for key, value in settings.items() if key not in TRUNCATION}
            return generate_in_graphs(self.transformer, labels, uniforms, decoder, **guidance)

        def draw(probs: Tensor, step: int) -> Tensor:
            u = philox.uniform(seed, index, step, probs.shape[1])  # (B, n)
            return philox.categorical(probs.flatten(0, 1), u.flatten()).view_as(u)

        return generate(self.transformer, labels, draw, **settings, decoder=decoder)

    def captured(
        self, compiled: bool, record: Recorder | None = None, exact: bool = False
    ) -> Decoder:
        """A decoder for this model."""
        return Decoder(
            self.transformer,
            self.transformer.layers,
            self.transformer.layout.tokens,
            compiled,
            record,
            exact=exact,
        )

    @torch.no_grad()
    def decode(self, tokens: Tensor, size: int | None = None) -> Tensor:
        """Images (B, 3, S, S) in [0, 1], resized to `size` pixels if it is given.

        The published figures are of 384-pixel images resized to 256, bicubically, without
        antialiasing and before clamping, as `size=256` does.
        """
        images = self.tokenizer.decode(self.transformer.layout.to_raster(tokens))
        if size is not None and size != images.shape[-1]:
            images = F.interpolate(images, size=(size, size), mode="bicubic")
        return (images / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.transformer.layout.from_raster(self.tokenizer.encode(images * 2 - 1))

    @torch.no_grad()
    def log_probs(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """(B, L, V), natural logarithm; tokens of a group are independent given those before it."""
        rows, _ = self.adapter.rows(tokens, labels)
        return self.adapter.forward(rows).log_softmax(dim=-1)

    def targets(self, tokens: Tensor) -> Tensor:
        return tokens


GENERATOR = PARGenerator
