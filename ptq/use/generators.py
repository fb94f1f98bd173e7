"""What quantization asks of a model that makes images. The generators of `models` are such models;
this package does not know them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from ptq.sites import Adapter


class Preset(Protocol):
    """What is known of a model beside its weights.

    Attributes:
        classes: number of class labels.
        samplers: sampling settings by name.
    """

    name: str
    classes: int
    samplers: Mapping[str, Mapping[str, object]]
    licence: str


class Generator(Protocol):
    """A transformer that draws image tokens, and the adapter that describes it.

    Attributes:
        quantization: what `quantize` or `load` made of the transformer; None before.
    """

    preset: Preset
    transformer: nn.Module
    adapter: Adapter
    quantization: object | None

    def sample(
        self, labels: Tensor, seed: int, index: Tensor, settings: dict[str, object]
    ) -> Tensor:
        """Tokens (B, T) or (B, T, D) of class labels (B,); image i draws from random numbers of
        (seed, index[i]) alone."""
