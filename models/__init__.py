"""Autoregressive image generators: transformer, tokenizer, sampler and adapter of each family,
behind one `load`."""

from models.registry import PRESETS, Generator, LatentGenerator, TokenGenerator, build, load
from models.weights.checkpoints import CheckpointError

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Generator",
    "LatentGenerator",
    "TokenGenerator",
    "build",
    "load",
]
