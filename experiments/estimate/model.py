"""How long a device takes for what a shape asks of it, and how one measurement becomes another.

A micro-batch of B images does B x `token_operations` operations and moves
`weight_reads` + B x `cache_reads` bytes. On a GPU products wait for bytes (a decoding step reads
all weights for few rows), and no block takes less than its kernels need to start, one by one
(eager), or replayed from CUDA graphs:

    seconds = max(operations / rate + bytes / bandwidth, block calls x least seconds of a call)

The constants of a device are solved from its own measurements (`solve_rates`), each from those that
it decides: the rate from the fastest products there were; seconds of a call from the quickest calls
of which products explain little; the bandwidth from the replayed line that neither explains and
that moves most. They are
effective figures: whatever a kernel wastes is in them.

Nothing is estimated by them alone. An estimate is the nearest measurement times a ratio of this
model, its own shape over the measured one:

    estimate = measured x modelled(shape) / modelled(measured shape)

so a measurement estimates itself exactly, twice as many images twice as much, and of the constants
only their relations matter, and those only as far as the two shapes differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from experiments.estimate.shapes import FLOAT_BYTES, Shape

EAGER = "eager"  # kernels are started one by one
REPLAYED = "replayed"  # from CUDA graphs
WAYS = (EAGER, REPLAYED)
DECISIVE = 0.3  # of a measured time, what must be left for anything else to be seen in it


@dataclass(frozen=True)
class Sampled:
    """A measured micro-batch: its shape, images, seconds of tokens and pixels, and how.

    The seconds of pixels are None where tokens alone were made.
    """

    shape: Shape
    images: int
    way: str
    token_s: float
    pixel_s: float | None


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        operations: multiplications and additions of products. pixels: those of tokenizers.
        bytes: read by decoding steps. call_s: least seconds of a block's kernels, by the way in
            which they are started.
    """

    operations: float
    pixels: float
    bytes: float = math.inf
    call_s: Mapping[str, float] = field(default_factory=dict)

    def token_seconds(self, shape: Shape, images: int, way: str) -> float:
        """Seconds of the tokens of a micro-batch."""
        moved = shape.weight_reads + images * shape.cache_reads
        work = images * shape.token_operations / self.operations + moved / self.bytes
        return max(work, shape.block_calls * self.call_s.get(way, 0.0))

    def pixel_seconds(self, shape: Shape, images: int) -> float:
        """Seconds of decoding the images of a micro-batch."""
        return images * shape.pixel_operations / self.pixels


def solve_rates(lines: Sequence[Sampled], otherwise: Rates | None = None) -> Rates:
    """The constants of a device from its measurements, at least one.

    Args:
        otherwise: constants where no measurement decides one, those of another arithmetic.
    """
    rate = max(line.images * line.shape.token_operations / line.token_s for line in lines)
    decoded = [line for line in lines if line.pixel_s is not None]
    pixel_rates = [line.images * line.shape.pixel_operations / line.pixel_s for line in decoded]
    call_s = {} if otherwise is None else dict(otherwise.call_s)
    # lines of which products leave something to be explained
    telling = []
    for line in lines:
        left_s = line.token_s - line.images * line.shape.token_operations / rate
        if left_s >= DECISIVE * line.token_s:
            telling.append((line, left_s))
    for way in WAYS:
        calls = [line.token_s / line.shape.block_calls for line, _ in telling if line.way == way]
        if calls:
            call_s[way] = min(calls)
    if otherwise is not None:
        # memory is read as quickly whatever is computed
        return Rates(rate, max(pixel_rates, default=otherwise.pixels), otherwise.bytes, call_s)
    return Rates(
        rate,
        max(pixel_rates, default=rate),
        solve_bandwidth(telling, call_s),
        call_s,
    )


def solve_bandwidth(telling: Sequence[tuple[Sampled, float]], call_s: Mapping[str, float]) -> float:
    """Bytes a second, by the replayed line that moves most of those that calls do not explain.

    Args:
        telling: lines with the seconds that products leave of them.
    """
    bandwidth = math.inf
    most = 0.0
    for line, left_s in telling:
        moved = line.shape.weight_reads + line.images * line.shape.cache_reads
        starting = line.shape.block_calls * call_s[line.way]
        if line.way == REPLAYED and starting < (1 - DECISIVE) * line.token_s and moved > most:
            most = moved
            bandwidth = moved / left_s
    return bandwidth


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
