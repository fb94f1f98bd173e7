"""Models to measure costs on, of which no file is needed.

Shipped models have their weights and held-out tokens. Released ones, unless their weights are here
or `model.weights` is given, are built in their true shape and filled with random numbers, and their
tokens and labels are random: what they cost can be measured, what they give cannot.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import models
from experiments.config.schema import RunConfig
from experiments.evaluate import likelihood
from experiments.run.preparation import load_model
from models.registry import Generator, LatentGenerator, find_preset, has_weights
from ptq import calibration as calib
from ptq.types import ConfigError


@torch.no_grad()
def fill_randomly(module: nn.Module) -> nn.Module:
    """Random weights that keep the size of activations.

    Matrices have variance 1 / fan-in, gains are near 1.
    """
    generator = torch.Generator().manual_seed(0)  # of the CPU: the same numbers for every device
    for name, parameter in module.named_parameters():
        parameter.normal_(generator=generator)
        if parameter.ndim > 1:
            parameter.div_(parameter[0].numel() ** 0.5)  # numel of one output: fan-in
        elif name.endswith("weight"):
            parameter.mul_(0.1).add_(1)  # a gain
        else:
            parameter.mul_(0.05)  # a bias
    return module.eval().requires_grad_(False)


def load_or_fill(config: RunConfig, device: torch.device) -> tuple[Generator, bool]:
    """The model, and whether its weights are random: a released one's, unless they are given or
    here.

    Raises:
        CheckpointError: weights that are given or ship are missing or wrong.
    """
    name = config.model.name
    is_given = config.model.weights is not None
    if find_preset(name).weights.shipped or is_given or has_weights(name):
        return load_model(config, device), False
    generator = models.build(name)
    for module in (generator.transformer, generator.tokenizer):
        fill_randomly(module).to(device)
    if config.dtype == "float64":
        generator.transformer.double()
    return generator, True


def image_pool(generator: Generator, n: int, device: torch.device) -> calib.Pool:
    """n images to select rows from: held-out ones of a shipped model, else random ones.

    Raises:
        ConfigError: there are fewer held-out ones.
    """
    sizes = generator.preset
    try:
        stored = likelihood.load_held_out(sizes, n)
    except ConfigError as error:
        # the number is another option here
        raise ConfigError(str(error).replace("eval.sequences", "calib.n", 1)) from error
    if stored is None:
        stored = random_images(generator, n)
    tokens = stored["tokens"].to(device)  # ids (n, L) or latents (n, L, D)
    labels = stored["labels"].to(device)  # (n,)
    if tokens.is_floating_point():  # latents, in the model's precision
        tokens = tokens.to(next(generator.transformer.parameters()).dtype)
    return calib.Pool(*generator.adapter.rows(tokens, labels), labels.cpu())


def random_images(generator: Generator, n: int) -> dict[str, Tensor]:
    """Random ids (n, L) or latents (n, L, D), and labels (n,)."""
    sizes = generator.preset
    source = torch.Generator().manual_seed(0)
    shape = sizes.transformer
    if isinstance(generator, LatentGenerator):
        dim = shape["vae_embed_dim"] * shape["patch_size"] ** 2  # D, of a patch
        tokens = torch.randn(n, sizes.tokens, dim, generator=source)  # (n, L, D)
    else:
        codes = shape["vocab_size"] if "vocab_size" in shape else shape["codebook_size"]
        tokens = torch.randint(codes, (n, sizes.tokens), generator=source)  # (n, L)
    return {"tokens": tokens, "labels": torch.randint(sizes.classes, (n,), generator=source)}
