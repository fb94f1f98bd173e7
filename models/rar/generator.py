"""RAR behind the interface of `models.registry.Generator`."""

from __future__ import annotations

import torch
from torch import Tensor

from models.decoding import philox
from models.decoding.decoder import Decoder, Recorder
from models.generation import ImageGenerator
from models.preset import Preset
from models.rar.adapter import RARAdapter
from models.rar.sampler import generate, generate_in_graphs
from models.rar.tokenizer import MaskGitVQGAN
from models.rar.transformer import RAR

AHEAD = 8  # positions whose AdaLN is computed at once: .18 GB of RAR-B for 100 images


class RARGenerator(ImageGenerator):
    """A RAR with its tokenizer."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        self.transformer = RAR(**preset.transformer)
        self.tokenizer = MaskGitVQGAN(**preset.tokenizer)
        self.adapter = RARAdapter(self.transformer)
        self.decoder: Decoder | None = None  # decodes in its own way if it is there

    def sample(
        self, labels: Tensor, seed: int, index: Tensor, settings: dict[str, object]
    ) -> Tensor:
        """Tokens (B, L); see `models.rar.sampler.generate` for the settings."""
        length = self.transformer.image_seq_len
        uniforms = philox.first_uniforms(seed, index.to(labels.device), length)  # (L, B)
        decoder = self.decoder
        if decoder is not None and not decoder.exact:
            by_image = uniforms.t().contiguous()  # (B, L)
            return generate_in_graphs(self.transformer, labels, by_image, decoder, **settings)

        def draw(probs: Tensor, step: int) -> Tensor:
            return philox.categorical(probs, uniforms[step])

        return generate(self.transformer, labels, draw, **settings, decoder=decoder)

    def captured(
        self, compiled: bool, record: Recorder | None = None, exact: bool = False
    ) -> Decoder:
        """A decoder for this model."""
        return Decoder(
            self.transformer,
            self.transformer.blocks,
            self.transformer.image_seq_len + 1,
            compiled,
            record,
            ahead=AHEAD,
            exact=exact,
        )

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        return self.tokenizer.decode(tokens)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images)

    @torch.no_grad()
    def log_probs(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """(B, L, V), natural logarithm."""
        condition = self.transformer.condition_ids(labels)
        return self.transformer(tokens[:, :-1], condition).log_softmax(dim=-1)

    def targets(self, tokens: Tensor) -> Tensor:
        return tokens


GENERATOR = RARGenerator
