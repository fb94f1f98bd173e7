"""How long a device takes for what a shape asks of it, and how one measurement becomes another.

A micro-batch of B images does B x `token_operations` operations and moves
`weight_reads` + B x `cache_reads` bytes. On a GPU products wait for bytes (a decoding step reads
all weights for few rows), and both wait for their kernels to be started, unless these are
replayed from CUDA graphs:

    seconds = max(operations / rate + bytes / bandwidth, block calls x seconds a call)

The three constants of a device are solved from its own measurements (`solve_rates`), each from the
one that it decides most: the rate from the fastest products there were, the bandwidth from the
replayed line whose bytes explain what the products leave, the call from the quickest eager line.
They are effective figures: whatever a kernel wastes is in them.

Nothing is estimated by them alone. An estimate is the nearest measurement times a ratio of this
model, its own shape over the measured one:

    estimate = measured x modelled(shape) / modelled(measured shape)

so a measurement estimates itself exactly, twice as many images twice as much, and of the constants
only their relations matter, and those only as far as the two shapes differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.estimate.shapes import FLOAT_BYTES, Shape

EAGER = "eager"  # kernels are started one by one
REPLAYED = "replayed"  # from CUDA graphs
DECISIVE = 0.25  # of a measured time, what products must leave for anything else to be seen in it


@dataclass(frozen=True)
class Sampled:
    """A measured micro-batch: its shape, images, seconds of tokens and pixels, and how."""

    shape: Shape
    images: int
    way: str
    token_s: float
    pixel_s: float


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        operations: multiplications and additions of products. pixels: those of tokenizers.
        bytes: read by decoding steps. call_s: seconds to start the kernels of a block.
    """

    operations: float
    pixels: float
    bytes: float = math.inf
    call_s: float = 0.0

    def token_seconds(self, shape: Shape, images: int, way: str) -> float:
        """Seconds of the tokens of a micro-batch."""
        moved = shape.weight_reads + images * shape.cache_reads
        work = images * shape.token_operations / self.operations + moved / self.bytes
        starting = shape.block_calls * self.call_s if way == EAGER else 0.0
        return max(work, starting)

    def pixel_seconds(self, shape: Shape, images: int) -> float:
        """Seconds of decoding the images of a micro-batch."""
        return images * shape.pixel_operations / self.pixels


def solve_rates(lines: Sequence[Sampled], otherwise: Rates | None = None) -> Rates:
    """The constants of a device from its measurements, at least one.

    Args:
        otherwise: constants where no measurement decides one, those of another arithmetic.
    """
    operations = max(line.images * line.shape.token_operations / line.token_s for line in lines)
    pixels = max(line.images * line.shape.pixel_operations / line.pixel_s for line in lines)
    bandwidths = [] if otherwise is None else [otherwise.bytes]
    calls = []
    for line in lines:
        left = line.token_s - line.images * line.shape.token_operations / operations
        if left < DECISIVE * line.token_s:
            continue  # products take nearly all of it
        if line.way == REPLAYED:
            moved = line.shape.weight_reads + line.images * line.shape.cache_reads
            bandwidths.append(moved / left)
        else:
            calls.append(line.token_s / line.shape.block_calls)
    call_s = 0.0 if otherwise is None else otherwise.call_s
    return Rates(
        operations,
        pixels,
        min(bandwidths, default=math.inf),
        min(calls, default=call_s),
    )


def memory_ratio(shape: Shape, other: Shape) -> float:
    """What a row of one shape occupies by what one of another does, apart from weights."""
    return shape.row_bytes / other.row_bytes


def resident_bytes(shape: Shape, quantized: bool) -> float:
    """Bytes of the weights in memory: a quantized run keeps full precision beside its own."""
    copies = 2 if quantized else 1
    return copies * shape.weight_bytes + shape.tokenizer_bytes


def shard_bytes(shape: Shape, images: int, microbatch: int) -> int:
    """Bytes on disk of images and tokens, the padding of the last micro-batch included.

    Shards are not compressed: a pixel takes 3 bytes, an id 4.
    """
    padded = padded_images(images, microbatch)
    image_bytes = 3 * shape.stored_size**2
    if shape.has_ids:
        image_bytes += FLOAT_BYTES * shape.tokens
    return padded * image_bytes


def padded_images(images: int, microbatch: int) -> int:
    """Images that are made for so many: whole micro-batches."""
    return math.ceil(images / microbatch) * microbatch
