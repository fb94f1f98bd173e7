"""The end of a decoding step, in its graph: draw tokens and put them where the next step reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.decoding.decoder import Decoder
from models.decoding.drawing import draw_next


@dataclass(frozen=True)
class NextTokens:
    """The `finish` of a decoder whose step predicts n tokens.

    All that changes from step to step is looked up by position, so that one graph serves them.

    Attributes:
        guided: whether unconditional rows follow the conditional ones.
        temperature: divides the guided logits.
        offset: the output at position p is token p - offset.
    """

    guided: bool
    temperature: float
    offset: int

    def __call__(
        self,
        logits: Tensor,
        positions: Tensor,
        inputs: tuple[Tensor, ...],
        uniforms: Tensor,
        scales: Tensor,
    ) -> Tensor:
        """The drawn ids (B, n).

        Args:
            logits: (B, n, V), or with guidance (2 B, n, V), conditional rows first.
            positions: of the step, (T,); the last n predict.
            inputs: the model's; of these the first, the tokens so far (B or 2 B, L), is written.
            uniforms: the random number of every token, (B, L).
            scales: of guidance at every token, (L,), float64.
        """
        return draw_next(
            inputs[0],
            logits,
            positions,
            uniforms,
            scales,
            self.guided,
            self.temperature,
            self.offset,
        )


def run_steps(
    decoder: Decoder,
    steps: Iterable[tuple[int, int]],
    classes: Tensor,
    uniforms: Tensor,
    scales: list[float],
    finish: NextTokens,
) -> Tensor:
    """Image tokens (B, L) of a model whose inputs are tokens and classes: a replay a step.

    Args:
        steps: first and end position of every step.
        classes: (B,), or with guidance (2 B,), conditional rows first and those without a class
            behind. uniforms, scales: see `NextTokens`.
    """
    batch, length = uniforms.shape
    ids = torch.zeros(len(classes), length, dtype=torch.long, device=classes.device)
    ids, _ = decoder.begin(
        ids,
        classes,
        distinct=batch + 1 if finish.guided else None,  # all rows without a class are alike
        finish=finish,
        state=(uniforms, torch.tensor(scales, dtype=torch.float64, device=classes.device)),
    )
    for first, end in steps:
        decoder(first, end)
    return ids[:batch].clone()  # the decoder writes its next run into the same `ids`
