"""Autoregressive image generators: transformer, tokenizer, sampler and adapter of each family, behind one `load`."""

from models.checkpoints import CheckpointError
from models.registry import PRESETS, Generator, LatentGenerator, TokenGenerator, build, load

__all__ = ["PRESETS", "CheckpointError", "Generator", "LatentGenerator", "TokenGenerator", "build", "load"]
