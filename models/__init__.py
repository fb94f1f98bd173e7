"""Autoregressive image generators: transformer, tokenizer, sampler and adapter of each family,
behind one `load`.

    model = models.load("rar_twin")
    images = model.generate(labels=[3, 7], seed=0)
"""

from models.registry import (
    PRESETS,
    Generator,
    LatentGenerator,
    TokenGenerator,
    build,
    load,
    outline,
)
from models.weights.checkpoints import CheckpointError

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Generator",
    "LatentGenerator",
    "TokenGenerator",
    "build",
    "load",
    "outline",
]
