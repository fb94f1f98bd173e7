"""Sampling in fixed, padded micro-batches: resumable, and the same however work is split.

Image i has the class i mod N and random numbers of (seed, i). Floating-point sums depend on the
shape of a batch, so every batch has exactly `microbatch` rows (the last one is padded with images
that are thrown away) and shards and resumption cut at its boundaries. Which process makes a
micro-batch, and when, changes nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.images import shards
from experiments.images.shards import Shard
from experiments.store.progress import CountedImages
from models.registry import Generator, TokenGenerator
from ptq.calibration import draw_tokens
from ptq.errors import say
from ptq.files import OWNER, DamagedFile, read_tensors, write_tensors
from ptq.numbers.numerics import NonFiniteError
from ptq.omniquant.graphs import record_graph
from ptq.pipeline import Track
from ptq.types import ConfigError

WORTH_CAPTURING = 8  # micro-batches: capturing takes the time of about four
ROUNDINGS = ("round", "truncate")


@dataclass(frozen=True)
class Plan:
    """What to sample: `images` images, image i of class i mod `classes`, and the settings.

    `rounding` is how pixels become uint8 (see `to_uint8`); `run` is the identity that shards carry.
    With `labels`, image i has the label i mod their number.
    """

    images: int
    classes: int
    seed: int
    microbatch: int
    settings: dict[str, object]
    rounding: str = "round"
    run: str = ""
    labels: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Number of micro-batches."""
        return -(-self.images // self.microbatch)  # rounded up

    def index(self, number: int) -> Tensor:
        """Image indices (microbatch,) of a micro-batch, running past the last image in the last
        one."""
        return torch.arange(number * self.microbatch, (number + 1) * self.microbatch)

    def classes_of(self, index: Tensor) -> Tensor:
        """Class labels (B,) of image indices (B,)."""
        if self.labels is None:
            return index % self.classes
        return torch.tensor(self.labels)[index % len(self.labels)]

    def batches(self) -> Iterator[Tensor]:
        """Image indices (microbatch,) of every micro-batch."""
        return map(self.index, range(len(self)))


def require_graphs(generator: Generator, device: torch.device) -> None:
    """Refuse `compile_steps` where it cannot be.

    Raises:
        ConfigError: the device has no CUDA graphs, or the model's steps change their shapes.
    """
    if device.type != "cuda":
        raise ConfigError(f"sampler.compiled: true needs a GPU, allowed on {device.type} is false")
    if not isinstance(generator, TokenGenerator):
        name = generator.preset.family.upper()
        raise ConfigError(
            f"sampler.compiled: true, but {name}'s sequences change their length, allowed is false"
        )


def compile_steps(generator: TokenGenerator) -> None:
    """From now on compile the blocks and replay every decoding step from a CUDA graph.

    A model in integers may have kernels for its steps (`ptq/int8/steps`) or whole blocks
    (`ptq/int8/blocks`), and is not compiled then.
    What was compiled before is forgotten: all models of a family share the compiler's few places,
    and those that other models had left would decide how this one is compiled.
    """
    from ptq.int8.blocks.layers import chain_blocks
    from ptq.int8.steps.blocks import install_steps  # Triton is there with CUDA only

    torch._dynamo.reset()
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 128)
    is_chained = chain_blocks(generator.adapter)
    has_kernels = install_steps(generator.adapter) or is_chained
    generator.decoder = generator.captured(compiled=not has_kernels, record=record_graph)


@contextmanager
def replayed_steps(generator: Generator, device: torch.device, batches: int) -> Iterator[None]:
    """Inside, decoding steps are replayed from CUDA graphs if so many micro-batches are worth it.

    Images are the same bytes as without (`Decoder` has `exact`), in a fraction of the time where
    starting kernels takes longer than running them: nothing to ask for, and no part of a run's
    identity. Capturing runs every step four times.
    """
    graphs = device.type == "cuda" and isinstance(generator, TokenGenerator)
    if not graphs or generator.decoder is not None or batches < WORTH_CAPTURING:
        yield
        return
    generator.decoder = generator.captured(compiled=False, record=record_graph, exact=True)
    try:
        yield
    finally:
        generator.decoder = None  # its graphs are of the weights that the model has now


def to_uint8(images: Tensor, rounding: str = "round") -> Tensor:
    """Images in [0, 1] to uint8: `round` to nearest, or `truncate` as the released codes do."""
    scaled = images * 255  # a copy, on which the rest works in place
    return (scaled.round_() if rounding == "round" else scaled).clamp_(0, 255).byte()


def sample_batch(generator: Generator, plan: Plan, number: int, device: torch.device) -> Shard:
    """One micro-batch of images with their tokens, those beyond the last image included.

    Raises:
        NonFiniteError: an image holds NaN or infinity.
    """
    index = plan.index(number)  # (B,)
    size = generator.preset.eval_size
    # (B, T) ids, or (B, T, D) latents of MAR
    tokens = generator.sample(plan.classes_of(index).to(device), plan.seed, index, plan.settings)
    # PAR: 384 pixels, measured at 256
    images = generator.decode(tokens, **({} if size is None else {"size": size}))  # (B, 3, S, S)
    if not bool(images.isfinite().all()):
        raise NonFiniteError(
            f"images: micro-batch {number} contains NaN or infinity,"
            " only finite numbers are allowed"
        )
    ids = None if tokens.is_floating_point() else tokens.cpu().numpy()  # MAR's tokens are vectors
    return Shard(to_uint8(images, plan.rounding).cpu().numpy(), ids)


def sample_shards(
    generator: Generator,
    plan: Plan,
    folder: Path,
    device: torch.device,
    numbers: Sequence[int],
    track: Track,
) -> None:
    """Make those of the micro-batches `numbers` that are missing, each a file below `folder`.

    Raises:
        StorageError: a file cannot be written. ConfigError: a file is of another run.
        NonFiniteError: NaN images. What was finished before stays, and the same call continues from
        there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in numbers if not shards.is_finished(folder, number, plan.run)]
    with replayed_steps(generator, device, len(missing)):
        counted = CountedImages(numbers, plan.images, lambda: images_done(plan, folder))
        for number in track(counted, "sampling"):
            if shards.is_finished(folder, number, plan.run, contents=True):
                continue
            path = shards.shard_path(folder, number)
            if path.is_file():
                say(f"made anew: {path}: is damaged")
            shard = sample_batch(generator, plan, number, device)
            shards.write_shard(folder, number, shard, plan.run)


def images_done(plan: Plan, folder: Path) -> int:
    """Images of the micro-batches that are finished, by whichever process."""
    # shards beyond the plan are those of a larger n
    finished = sum(int(path.stem) < len(plan) for path in folder.glob("*.npz"))
    return min(plan.images, plan.microbatch * finished)


def read_shards(plan: Plan, folder: Path) -> Iterator[Shard]:
    """The micro-batches of a plan in order, the last one with its padding."""
    for number in range(len(plan)):
        yield shards.read_shard(folder, number, plan.run)


def sample_images(
    generator: Generator, plan: Plan, folder: Path, device: torch.device, track: Track
) -> np.ndarray:
    """uint8 images (N, 3, S, S), one file per micro-batch; files that are there are kept."""
    sample_shards(generator, plan, folder, device, range(len(plan)), track)
    parts = []
    for shard in read_shards(plan, folder):
        parts.append(shard.images)
    return np.concatenate(parts)[: plan.images]  # without the padding


def sampled_tokens(plan: Plan, folder: Path) -> np.ndarray | None:
    """Token ids (N, T) of sampled images, or None for models whose tokens are vectors."""
    parts = []
    for shard in read_shards(plan, folder):
        if shard.tokens is None:
            return None
        parts.append(shard.tokens)
    return np.concatenate(parts)[: plan.images]


def discard_shards(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def draw_pool(
    generator: Generator,
    labels: Tensor,
    seed: int,
    microbatch: int,
    settings: dict[str, object],
    device: torch.device,
    cache: Path,
    track: Track,
) -> Tensor:
    """Tokens of generated images with the given labels (N,), from the cache file if it is there.

    A file that is damaged or of another pool is named, and the tokens are drawn again.
    """
    if cache.is_file():
        try:
            stored, _ = read_tensors(cache, of=cache.stem)
            return stored["tokens"].to(device)
        except DamagedFile as error:
            say(f"made anew: {error}")
    # (N, T), or (N, T, D) of MAR
    tokens = draw_tokens(generator, labels, seed, microbatch, settings, device, track)
    write_tensors({"tokens": tokens}, cache, {OWNER: cache.stem})
    return tokens
