"""What a model's shape asks of any device: operations, bytes and block calls of its images.

Multiplications and additions are counted by PyTorch on an outline of the model, which has no
memory for weights, so all of it is exact but these:

- A decoding step with a KV cache does the products that the same position has in a teacher-forced
  pass. An image therefore takes the operations of one pass, times two for the branches of
  guidance, whatever the number of steps; a causal mask is not subtracted.
- Keys and values of all earlier positions are read at every step. Of S steps a position is read by
  half on average: S / 2 times 2 x blocks x width x 4 bytes a position and branch.
- MAR keeps no keys. In each iteration its encoder sees the tokens that are visible by then, its
  decoder all of them, and its diffusion head runs its chain on the tokens that appear. Products of
  attention are left out, of which a sequence of 256 has few beside the linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import registry
from models.mar.diffusion import spaced_timesteps
from models.mar.sampler import mask_lengths
from models.preset import Preset
from models.registry import Generator

FLOAT_BYTES = 4  # runs compute in FP32
BRANCHES = 2  # with a class and without one
WIDTHS = ("hidden_size", "embed_dim", "dim", "encoder_embed_dim")  # names of it in presets
HEADS = ("num_attention_heads", "num_heads", "n_head", "encoder_num_heads")


@dataclass(frozen=True)
class Shape:
    """What a model's images take.

    Attributes:
        weight_bytes: of the transformer. tokenizer_bytes: of the tokenizer.
        sequence_operations: of a teacher-forced pass of one image.
        token_operations: of all tokens of one image, both branches.
        pixel_operations: of decoding one image. encoding_operations: of its encoder.
        weight_reads: bytes of weights that all steps of a micro-batch read.
        cache_reads: bytes of keys and values that all steps of one image read.
        block_calls: of a micro-batch.
        tokens, width, heads: of a sequence. blocks: of the transformer.
        image_size: side of the decoded image. stored_size: side of the image that is kept.
        has_ids: whether tokens are ids, which are kept beside the image.
    """

    name: str
    family: str
    weight_bytes: int
    tokenizer_bytes: int
    sequence_operations: float
    token_operations: float
    pixel_operations: float
    weight_reads: float
    cache_reads: float
    block_calls: int
    tokens: int
    width: int
    heads: int
    blocks: int
    image_size: int
    stored_size: int
    has_ids: bool

    @property
    def row_bytes(self) -> float:
        """Bytes that one row (an image of one branch) occupies at once, up to a factor: activations
        and keys of every block's width, and the attention weights of one block."""
        activations = self.tokens * self.width * (2 * self.blocks + 8)
        attention = self.heads * self.tokens**2
        return FLOAT_BYTES * (activations + attention)


def measure_shape(name: str, settings: Mapping[str, Any] | None = None) -> Shape:
    """The shape of a preset's model.

    Args:
        settings: of the sampler; those of `official` if left out.

    Raises:
        CheckpointError: there is no such preset.
    """
    preset = registry.find_preset(name)
    chosen = dict(settings or preset.samplers["official"])
    # of all settings only those of MAR's iterations decide
    iterations = chosen.get("num_iter"), chosen.get("diffusion_steps")
    return _measure_shape(name, *iterations)


@cache
def _measure_shape(name: str, iterations: int | None, chain: str | None) -> Shape:
    """As `measure_shape`; once per process."""
    preset = registry.find_preset(name)
    generator = registry.build_outline(name)
    blocks = len(generator.adapter.blocks)
    width = named_size(preset.transformer, WIDTHS)
    weight_bytes = count_bytes(generator.transformer)
    if preset.family == "mar":
        sizes = _latent_sizes(generator, iterations, chain)
        token_shape = (1, preset.tokens, generator.transformer.token_embed_dim)
        tokens = torch.zeros(token_shape, device="meta")  # (1, L, D)
    else:
        tokens = torch.zeros(1, preset.tokens, dtype=torch.long, device="meta")  # (1, L)
        steps = count_steps(generator)
        sizes = _token_sizes(generator, tokens, steps, width)
    pixel_operations = count_operations(lambda: generator.decode(tokens))
    return Shape(
        name=name,
        family=preset.family,
        weight_bytes=weight_bytes,
        tokenizer_bytes=count_bytes(generator.tokenizer),
        pixel_operations=pixel_operations,
        tokens=preset.tokens,
        width=width,
        heads=named_size(preset.transformer, HEADS),
        blocks=blocks,
        image_size=preset.image_size,
        stored_size=preset.eval_size or preset.image_size,
        has_ids=preset.family != "mar",
        **sizes,
    )


def _token_sizes(
    generator: Generator, tokens: Tensor, steps: int, width: int
) -> dict[str, float | int]:
    """What a model of token ids takes, of a sequence (1, L)."""
    labels = torch.zeros(1, dtype=torch.long, device="meta")  # (1,)
    sequence_operations = count_operations(lambda: generator.log_probs(tokens, labels))
    blocks = len(generator.adapter.blocks)
    position_bytes = 2 * blocks * width * FLOAT_BYTES
    reads = BRANCHES * tokens.shape[1] * position_bytes * (steps / 2)
    return {
        "sequence_operations": sequence_operations,
        "token_operations": BRANCHES * sequence_operations,
        "weight_reads": float(steps * count_bytes(generator.transformer)),
        "cache_reads": reads,
        "block_calls": steps * blocks,
    }


def _latent_sizes(generator: Generator, iterations: int, chain: str) -> dict[str, float | int]:
    """What MAR takes with so many iterations and diffusion steps."""
    model = generator.transformer
    length = model.seq_len
    encoder = count_products(model.encoder_blocks)
    decoder = count_products(model.decoder_blocks)
    head = count_products(model.diffloss.net)
    chain_steps = len(spaced_timesteps(chain))
    hidden = [length, *mask_lengths(length, iterations)[:-1], 0]
    passes = 0.0
    working = 0  # iterations in which tokens appear
    for before, after in zip(hidden[:-1], hidden[1:]):
        if before == after:
            continue
        working += 1
        visible = length - before + model.buffer_size
        passes += visible * encoder + (length + model.buffer_size) * decoder
    denoising = length * chain_steps * head
    slots = length + model.buffer_size
    blocks = len(generator.adapter.blocks)
    head_bytes = count_bytes(model.diffloss)
    body_bytes = count_bytes(model) - head_bytes
    head_calls = len(model.diffloss.net.res_blocks) * chain_steps
    return {
        # a pass of everything, and the head once a token
        "sequence_operations": slots * (encoder + decoder) + length * head,
        "token_operations": BRANCHES * (passes + denoising),
        "weight_reads": float(working * (body_bytes + chain_steps * head_bytes)),
        "cache_reads": 0.0,
        "block_calls": working * (blocks + head_calls),
    }


def count_steps(generator: Generator) -> int:
    """Decoding steps of an image of token ids."""
    model = generator.transformer
    if generator.preset.family == "var":
        return len(model.spans)
    if generator.preset.family == "rar":
        return model.image_seq_len
    return len(model.layout.steps(model.layout.tokens))


def named_size(sizes: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """The size that a preset has under one of these names."""
    for name in names:
        if name in sizes:
            return int(sizes[name])
    raise KeyError(f"none of {', '.join(names)} is among {', '.join(sizes)}")


def count_operations(work: Callable[[], object]) -> float:
    """Multiplications and additions of the products in some work."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return float(counter.get_total_flops())


def count_products(module: nn.Module) -> float:
    """Multiplications and additions of one row in all linear layers of a module."""
    weights = 0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            weights += part.weight.numel()
    return 2.0 * weights


def count_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights."""
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def is_released(preset: Preset) -> bool:
    """Whether a preset is a released model, and no twin."""
    return not preset.weights.shipped
