"""All presets by name, and the one door that turns a name into a model with weights."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from models import checkpoints
from models.preset import Preset, Source
from models.rar import presets as rar_presets
from models.rar.generator import RARGenerator
from ptq.types import Adapter

ZOO = Path(__file__).parent / "zoo"
PRESETS: dict[str, Preset] = {**rar_presets.PRESETS}


class Generator(Protocol):
    """A transformer with its tokenizer: what experiments need of a model, whatever its family."""

    preset: Preset
    transformer: nn.Module
    tokenizer: nn.Module
    adapter: Adapter

    def sample(self, labels: Tensor, seed: int, index: Tensor, settings: dict[str, object]) -> Tensor:
        """Image tokens for class labels (B,); image i draws from random numbers of (seed, index[i]) alone."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1]."""

    def encode(self, images: Tensor) -> Tensor:
        """Tokens of images (B, 3, S, S) in [0, 1]."""

    def log_probs(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced log-probabilities (B, T, V) of every token, conditional branch, no guidance."""

    def targets(self, tokens: Tensor) -> Tensor:
        """The token ids (B, T) that `log_probs` predicts."""


FAMILIES = {"rar": RARGenerator}


def preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        CheckpointError: there is none; names those there are.
    """
    if name not in PRESETS:
        raise checkpoints.CheckpointError(f"model: {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]


def build(name: str) -> Generator:
    """The model called `name` with uninitialised weights."""
    chosen = preset(name)
    return FAMILIES[chosen.family](chosen)


def locate(source: Source, explicit: str | Path | None) -> Path:
    """Where the weights of `source` lie: an explicit path, or the zoo."""
    if explicit is not None:
        return Path(explicit)
    if source.repo is None:
        return ZOO / source.file
    raise checkpoints.CheckpointError(
        f"weights: no path given for {source.file} of {source.repo}; pass model.weights=PATH"
    )


def load(
    name: str, weights: str | Path | None = None, tokenizer: str | Path | None = None, device: str = "cpu",
) -> Generator:
    """The model called `name` with weights from explicit paths or the zoo, in eval mode and fp32 on `device`.

    Raises:
        CheckpointError: unknown name; weights missing, damaged or of another model.
    """
    model = build(name)
    chosen = model.preset
    parts = (
        (model.transformer, chosen.weights, weights),
        (model.tokenizer, chosen.tokenizer_weights, tokenizer),
    )
    for module, source, explicit in parts:
        path = locate(source, explicit)
        state = {k: v.float() if v.is_floating_point() else v for k, v in checkpoints.read(path).items()}
        checkpoints.load_into(module, state, str(path))
        module.eval().requires_grad_(False).to(torch.device(device))
    return model
