"""VAR behind the interface of `models.registry.Generator`.

Images are in [0, 1] here and in [-1, 1] inside the tokenizer. Tokens are those of all scales,
coarse to fine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.decoding import philox
from models.decoding.decoder import Decoder, Recorder
from models.generation import ImageGenerator
from models.preset import Preset
from models.var.adapter import VARAdapter
from models.var.sampler import generate
from models.var.tokenizer import VQVAE
from models.var.transformer import VAR


class VARGenerator(ImageGenerator):
    """A VAR with its tokenizer."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        self.transformer = VAR(**preset.transformer)
        self.tokenizer = VQVAE(**preset.tokenizer)
        self.adapter = VARAdapter(self.transformer, self.tokenizer.quantize)
        self.decoder: Decoder | None = None  # decodes in its own way if it is there

    def _generate(
        self, labels: Tensor, seed: int, index: Tensor, settings: dict[str, object]
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and the feature map (B, C, P, P).

        Token j of scale s takes number j of step s; the Gumbel noise of the S scales of
        `more_smooth` takes steps S .. 2S - 1, one number per token and code.
        """
        index = index.to(labels.device)
        spans = self.transformer.spans
        scales = len(spans)
        uniforms = philox.span_uniforms(seed, index, spans)  # (B, L)

        def draw(probs: Tensor, scale: int) -> Tensor:
            begin, end = spans[scale]
            u = uniforms[:, begin:end]  # (B, T)
            ids = philox.categorical(probs.flatten(0, 1), u.flatten())
            return ids.view(probs.shape[:2])

        def noise(logits: Tensor, scale: int) -> Tensor:
            u = philox.uniform(seed, index, scales + scale, logits[0].numel())  # (B, T * V)
            return -(-u.log()).log().view(logits.shape).to(logits.dtype)

        return generate(
            self.transformer,
            self.tokenizer.quantize,
            labels,
            draw,
            noise=noise,
            **settings,
            decoder=self.decoder,
            uniforms=uniforms,
        )

    def captured(
        self, compiled: bool, record: Recorder | None = None, exact: bool = False
    ) -> Decoder:
        """A decoder for this model, with a step of its own for every scale."""
        return Decoder(
            self.transformer,
            self.transformer.blocks,
            self.transformer.length,
            compiled,
            record,
            stride=1,
            ahead=self.transformer.length,  # AdaLN depends on the class alone
            exact=exact,
        )

    def sample(
        self, labels: Tensor, seed: int, index: Tensor, settings: dict[str, object]
    ) -> Tensor:
        """Tokens (B, L); see `models.var.sampler.generate` for the settings.

        Raises:
            ValueError: `more_smooth` is on; its images are not those of the tokens (`sample_images`
                makes them).
        """
        if settings.get("more_smooth"):
            raise ValueError(
                "sampler.more_smooth: True has no tokens that decode to its image; "
                "use sample_images"
            )
        return self._generate(labels, seed, index, settings)[0]

    @torch.no_grad()
    def sample_images(
        self, labels: Tensor, seed: int, index: Tensor, settings: dict[str, object]
    ) -> Tensor:
        """Images (B, 3, S, S) in [0, 1]; without `more_smooth` those of `decode(sample(...))`."""
        features = self._generate(labels, seed, index, settings)[1]
        return (self.tokenizer.decode_features(features).clamp(-1, 1) + 1) / 2

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        return (self.tokenizer.decode(tokens) + 1) / 2

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images * 2 - 1)

    @torch.no_grad()
    def log_probs(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """(B, L, V) over all scales, natural logarithm."""
        inputs = self.tokenizer.quantize.teacher_inputs(tokens)
        return self.transformer(labels, inputs).log_softmax(dim=-1)

    def targets(self, tokens: Tensor) -> Tensor:
        return tokens


GENERATOR = VARGenerator
