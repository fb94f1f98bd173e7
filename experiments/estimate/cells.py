"""What a cell of a table will take: seconds of its parts, memory, disk, each with how good it is.

Every part is the nearest measurement times a ratio of shapes (`model.py`):

    calibration   rows x operations of a teacher-forced pass, of the same method
    sampling      micro-batches, padding included, tokens and pixels
    pool          the images that calibration rows are selected from, drawn once for all methods
    rest          of a twin's run: held-out tokens and metrics; of a released model's cell: start,
                  reading weights, held-out tokens, Inception, Frechet distances

How good an estimate is, from best to worst: `done`, `measured here`, `measured elsewhere`, `scaled`
from another model, method or device. Its range is the product of these factors, up and down:

    1.25  whatever is measured once varies so much with what else a machine does
    1.3   another method of the same kind of ranges; tokens that were timed without pixels
    1.6   another model, times the 0.15th power of how many times larger it is
    2     another family, number of rows, GPU or CPU; eager steps for replayed ones
    sqrt(w)  a device that w processes shared: alone between t / w and t, so t / sqrt(w) is taken
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from experiments.config.ranges import check_sampler
from experiments.config.schema import RunConfig
from experiments.estimate import costs as measured_costs
from experiments.estimate import model
from experiments.estimate.costs import FULL_PRECISION, Costs, Measured
from experiments.estimate.model import Rates
from experiments.estimate.shapes import Shape, is_released, measure_shape
from models import registry

Rank = tuple[float, ...]  # the lowest is the nearest

DONE = "done"
HERE = "measured here"
ELSEWHERE = "measured elsewhere"
SCALED = "scaled"
GRADES = (DONE, HERE, ELSEWHERE, SCALED)  # from best to worst

NOISE = 1.25
OTHER_METHOD = 1.3
OTHER_MODEL = 1.6
OTHER_FAMILY = 2.0
OTHER_DEVICE = 2.0
OTHER_ROWS = 2.0
SIZE_POWER = 0.15  # of how many times larger another model is
# of calibration with 128 rows, what no row takes: 1 % of RTN and PTQ4ARVG, 20 % of OS+, on a twin
WITHOUT_ROWS = 0.05
# multiplications and additions of Inception for an image (Szegedy et al., 2015: 5 billion of both)
INCEPTION_OPERATIONS = 1.0e10
INCEPTION_DIMENSIONS = 2048  # of its features
# of a Frechet distance, at the rate of square products: 3 s where these run at 150 billion a second
EIGENVALUE_OPERATIONS = 55 * INCEPTION_DIMENSIONS**3
FEATURE_BYTES = 4 * (2048 + 1008 + 2023)  # of an image, kept beside (`extractors/inception.py`)
START_S = time.process_time()  # what this process took until here is what another one takes
# so often: the table, `sample`, and as long each time for Inception, which is checked and then used
STARTS = 4
PROBE_BYTES = 2**25  # hashed once, to know how quickly weights are
PROBE_SIDE = 1024  # of a square product, timed to know how quickly eigenvalues are found
# of weights in fp32, as if hashed: table and `sample` hash a file in half precision, its conversion
# and the values; `sample` loads them
READS = 6


@dataclass(frozen=True)
class Target:
    """Where cells are to run.

    Attributes:
        device: class of the device. name: of the device, in words.
        gpus: that sample one cell together. workers: cells that run at a time.
        sharing: cells that run at a time on one device.
    """

    device: str
    name: str
    gpus: int = 1
    workers: int = 1
    sharing: int = 1


@dataclass(frozen=True)
class Quantity:
    """An estimated number, the least and the most it may be, how good it is, and where from."""

    value: float
    low: float
    high: float
    grade: str
    source: str

    @classmethod
    def within(cls, value: float, factor: float, grade: str, source: str) -> Quantity:
        """A value that may be off by a factor."""
        return cls(value, value / factor, value * factor, grade, source)

    @classmethod
    def exactly(cls, value: float, grade: str = DONE, source: str = "") -> Quantity:
        """A value that is known."""
        return cls(value, value, value, grade, source)

    def scaled(self, factor: float) -> Quantity:
        """So many times as much."""
        return Quantity(
            self.value * factor, self.low * factor, self.high * factor, self.grade, self.source
        )


def add_up(parts: Sequence[Quantity]) -> Quantity:
    """The sum of quantities, as good as the worst of those that matter (5 % or more of it)."""
    total = sum(part.value for part in parts)
    counting = [part for part in parts if part.value >= 0.05 * total] or list(parts)
    worst = max(counting, key=lambda part: GRADES.index(part.grade), default=None)
    return Quantity(
        total,
        sum(part.low for part in parts),
        sum(part.high for part in parts),
        DONE if worst is None else worst.grade,
        "" if worst is None else worst.source,
    )


@dataclass(frozen=True)
class CellCost:
    """What a cell takes: seconds by part, peak bytes of device memory, bytes on disk."""

    seconds: dict[str, Quantity]
    memory: Quantity | None
    disk: Quantity

    @property
    def total(self) -> Quantity:
        """Seconds of all parts."""
        return add_up(list(self.seconds.values()))


@dataclass
class Estimator:
    """Estimates cells for a target out of measured costs.

    Attributes:
        reference_images: that Inception sees before a released model's first cell is judged,
            after which their features are kept.
        pools: what has been drawn already by cells that were estimated before.
    """

    costs: Costs
    target: Target
    reference_images: int = 0
    pools: set[tuple[object, ...]] = field(default_factory=set)

    def estimate(self, config: RunConfig, held_out: bool = True) -> CellCost:
        """The cost of a cell.

        Args:
            held_out: whether it has held-out tokens to be judged by.

        Raises:
            CheckpointError, ConfigError: there is no such model or sampler.
        """
        preset = registry.find_preset(config.model.name)
        check_sampler(config.sampler.name, config.sampler.settings, preset)
        settings = {**preset.samplers[config.sampler.name], **config.sampler.settings}
        shape = measure_shape(preset.name, settings)
        released = is_released(preset)
        quantized = config.method.quantized
        seconds: dict[str, Quantity] = {}
        if quantized:
            pool = self.pool_seconds(config, shape)
            if pool is not None:
                seconds["pool"] = pool
            seconds["calibration"] = self.calibration_seconds(config, shape)
        variant = variant_of_config(config)
        sampling = self.sampling_seconds(config, shape, variant, config.eval.n)
        seconds["sampling"] = sampling.scaled(1 / self.target.gpus)
        if released:
            seconds |= self.released_seconds(config, shape, held_out)
        else:
            seconds["rest"] = self.rest_seconds(config, shape)
        return CellCost(
            seconds,
            self.memory_bytes(config, shape, variant),
            self.disk_bytes(config, shape, released),
        )

    # --- sampling

    def pool_seconds(self, config: RunConfig, shape: Shape) -> Quantity | None:
        """Seconds of drawing the pool; None if another cell draws it before."""
        calib = config.calib
        key = (config.model.name, calib.selector, calib.n, calib.seed, config.sampler.microbatch)
        if key in self.pools:
            return None
        self.pools.add(key)
        return self.sampling_seconds(config, shape, FULL_PRECISION, calib.n)

    def sampling_seconds(
        self, config: RunConfig, shape: Shape, variant: str, images: int
    ) -> Quantity:
        """Seconds of so many images on one device."""
        microbatch = config.sampler.microbatch
        is_ids = shape.has_ids
        way = measured_costs.way_of(self.target.device, is_ids, images, microbatch)
        if config.sampler.compiled:
            way = model.REPLAYED
        batches = math.ceil(images / microbatch)
        rates = self.rates(variant)
        wanted = batch_seconds(rates, shape, microbatch, way) * batches
        candidates: list[tuple[Rank, Quantity]] = []
        for run in self.costs.runs:
            if run.sampling_s is None or run.variant != variant:
                continue
            run_shape = run.shape
            run_way = measured_costs.way_of(
                self.target.device, run_shape.has_ids, run.images, run.microbatch
            )
            run_batches = math.ceil(run.images / run.microbatch)
            modelled = batch_seconds(rates, run_shape, run.microbatch, run_way) * run_batches
            same_method = run.method == config.method.name
            doubt = self.doubt(run.measured, shape, run_shape, same_method)
            doubt *= way_doubt(way, run_way)
            seconds = run.sampling_s * wanted / modelled
            if run.judged:
                seconds *= self.target.gpus  # it was sampled by as many, in all likelihood
            quantity = self.from_measured(seconds, doubt, run.measured, shape, run_shape)
            rank = nearness(shape, run_shape, doubt, run.measured, -run.images)
            candidates.append((rank, quantity))
        for batch in self.costs.batches:
            if batch.variant not in (variant, FULL_PRECISION):
                continue
            sampled = batch.sampled
            their_rates = self.rates(batch.variant)
            modelled = batch_seconds(their_rates, sampled.shape, sampled.images, sampled.way)
            same_kind = batch.variant == variant
            doubt = self.doubt(batch.measured, shape, sampled.shape, same_kind)
            if not same_kind:
                doubt *= OTHER_FAMILY
            doubt *= way_doubt(way, sampled.way)
            pixel_s = sampled.pixel_s
            if pixel_s is None:
                pixel_s = their_rates.pixel_seconds(sampled.shape, sampled.images)
                doubt *= OTHER_METHOD
            seconds = (sampled.token_s + pixel_s) * wanted / modelled
            quantity = self.from_measured(seconds, doubt, batch.measured, shape, sampled.shape)
            rank = nearness(shape, sampled.shape, doubt, batch.measured, -sampled.images)
            candidates.append((rank, quantity))
        return best(candidates, wanted)

    def rates(self, variant: str) -> Rates:
        """What the target's kind of device does in this arithmetic, as far as it was measured."""
        batches = self.costs.batches
        if not batches:
            return Rates(1.0e12, 1.0e12)
        plain = [batch.sampled for batch in batches if batch.variant == FULL_PRECISION]
        rates = model.solve_rates(plain or [batch.sampled for batch in batches])
        if variant == FULL_PRECISION:
            return rates
        # static ranges stand for dynamic ones that were not measured
        for name in (variant, measured_costs.STATIC):
            lines = [batch.sampled for batch in batches if batch.variant == name]
            if lines:
                return model.solve_rates(lines, rates)
        return rates

    # --- calibration

    def calibration_seconds(self, config: RunConfig, shape: Shape) -> Quantity:
        """Seconds of selecting rows and quantizing with them."""
        wanted = config.calib.n * shape.sequence_operations
        candidates = []
        for entry in self.costs.calibrations:
            other = measure_shape(entry.model)
            same_method = entry.method == config.method.name
            doubt = self.doubt(entry.measured, shape, other, same_method)
            if not same_method:
                doubt *= OTHER_FAMILY  # methods differ in calibration more than in sampling
            ratio = wanted / (entry.rows * other.sequence_operations)
            if config.calib.n != entry.rows:
                doubt *= OTHER_ROWS
                share = config.calib.n / entry.rows
                ratio *= (WITHOUT_ROWS + (1 - WITHOUT_ROWS) * share) / share
            quantity = self.from_measured(
                entry.seconds * ratio, doubt, entry.measured, shape, other
            )
            rank = nearness(shape, other, doubt, entry.measured, abs(math.log(ratio)))
            candidates.append((rank, quantity))
        return best(candidates, wanted / 1.0e12)

    # --- the rest

    def rest_seconds(self, config: RunConfig, shape: Shape) -> Quantity:
        """Seconds of all else of a twin's run."""
        wanted = judged_operations(shape, config.eval.n, config.eval.sequences)
        candidates = []
        for run in self.costs.runs:
            if run.rest_s is None or run.judged:
                continue
            other = run.shape
            same_method = run.method == config.method.name
            doubt = self.doubt(run.measured, shape, other, same_method)
            ratio = wanted / judged_operations(other, run.images, run.sequences)
            quantity = self.from_measured(run.rest_s * ratio, doubt, run.measured, shape, other)
            rank = nearness(shape, other, doubt, run.measured, abs(math.log(ratio)))
            candidates.append((rank, quantity))
        rates = self.rates(FULL_PRECISION)
        passes = 2 if config.method.quantized else 1
        scoring = passes * config.eval.sequences * shape.sequence_operations / rates.operations
        return best(candidates, scoring + config.eval.n * shape.pixel_operations / rates.pixels)

    def released_seconds(
        self, config: RunConfig, shape: Shape, held_out: bool
    ) -> dict[str, Quantity]:
        """Seconds of all else of a released model's cell."""
        rates = self.rates(FULL_PRECISION)
        weights = shape.weight_bytes + shape.tokenizer_bytes
        start = STARTS * START_S + READS * weights / hash_rate()
        parts = {
            "start": Quantity.within(start, 2.0, SCALED, "the start of this process"),
        }
        judged = config.eval.n + self.new_reference_images()
        source = "operations of Inception, at the rate of tokenizers"
        judging = judged * INCEPTION_OPERATIONS / rates.pixels
        parts["judging"] = Quantity.within(judging, 2.0, SCALED, source)
        distances = count_eigenvalues(config) * EIGENVALUE_OPERATIONS / product_rate()
        source = "operations of eigenvalues, at the rate of products"
        parts["distances"] = Quantity.within(distances, 2.0, SCALED, source)
        if held_out:
            passes = 2 if config.method.quantized else 1
            operations = passes * config.eval.sequences * shape.sequence_operations
            source = "operations of teacher-forced passes, at the rate of sampling"
            seconds = operations / rates.operations
            parts["held out"] = Quantity.within(seconds, 2.0, SCALED, source)
        return parts

    def new_reference_images(self) -> int:
        """Images of the reference whose features no cell has found before."""
        images = self.reference_images
        self.reference_images = 0
        return images

    # --- memory and disk

    def memory_bytes(self, config: RunConfig, shape: Shape, variant: str) -> Quantity | None:
        """Peak of device memory; None on a CPU, where it is the whole process's."""
        if self.target.device == "cpu":
            return None
        peaks = []
        resident = model.resident_bytes(shape, config.method.quantized)
        for batch in self.costs.batches:
            if batch.peak_bytes is None:
                continue
            other = batch.sampled.shape
            same_kind = batch.variant == variant
            doubt = self.doubt(batch.measured, shape, other, same_kind)
            theirs = batch.peak_bytes - model.resident_bytes(other, batch.variant != FULL_PRECISION)
            rows = config.sampler.microbatch / batch.sampled.images
            ratio = rows * model.memory_ratio(shape, other)
            value = resident + max(0.0, theirs) * ratio
            quantity = self.from_measured(value, doubt, batch.measured, shape, other, shared=False)
            rank = nearness(shape, other, doubt, batch.measured, abs(math.log(ratio)))
            peaks.append((rank, quantity))
        sampling = best(peaks, resident)
        if not config.method.quantized:
            return sampling
        calibration = self.calibration_memory(config, shape)
        return max(sampling, calibration, key=lambda quantity: quantity.value)

    def calibration_memory(self, config: RunConfig, shape: Shape) -> Quantity:
        """Peak of device memory while a model is calibrated."""
        candidates = []
        resident = model.resident_bytes(shape, quantized=True)
        for entry in self.costs.calibrations:
            if entry.peak_bytes is None:
                continue
            other = measure_shape(entry.model)
            same_method = entry.method == config.method.name
            doubt = self.doubt(entry.measured, shape, other, same_method)
            theirs = max(0.0, entry.peak_bytes - model.resident_bytes(other, quantized=True))
            ratio = model.memory_ratio(shape, other)
            quantity = self.from_measured(
                resident + theirs * ratio, doubt, entry.measured, shape, other, shared=False
            )
            rank = nearness(shape, other, doubt, entry.measured, abs(math.log(ratio)))
            candidates.append((rank, quantity))
        return best(candidates, resident)

    def disk_bytes(self, config: RunConfig, shape: Shape, released: bool) -> Quantity:
        """Bytes that stay on disk: images with their tokens, and their features."""
        images = config.eval.n
        if released:
            kept = model.shard_bytes(shape, images, config.sampler.microbatch)
            kept += images * FEATURE_BYTES
        else:
            kept = model.shard_bytes(shape, images, images)
        return Quantity.within(kept, 1.2, SCALED, "size of images, tokens and features")

    # --- how near a measurement is

    def doubt(self, measured: Measured, shape: Shape, other: Shape, same_method: bool) -> float:
        """By what factor a measurement may mislead about a shape."""
        factor = NOISE
        if shape.family != other.family:
            factor *= OTHER_FAMILY
        if shape.name != other.name:
            times = shape.token_operations / other.token_operations
            factor *= OTHER_MODEL * max(times, 1 / times) ** SIZE_POWER
        if not same_method:
            factor *= OTHER_METHOD
        if not measured.here and measured.name != self.target.name:
            factor *= OTHER_DEVICE
        return factor * sharing_doubt(measured, self.target)

    def from_measured(
        self,
        seconds: float,
        doubt: float,
        measured: Measured,
        shape: Shape,
        other: Shape,
        shared: bool = True,
    ) -> Quantity:
        """An estimate out of a measurement, for as many processes a device as the target has."""
        if shared:
            seconds *= math.sqrt(self.target.sharing / measured.workers)
        source = f"{measured.source}: {other.name} on {measured.name}"
        if shape.name != other.name or doubt >= NOISE * OTHER_METHOD:
            grade = SCALED
        else:
            grade = HERE if measured.here else ELSEWHERE
        return Quantity.within(seconds, doubt, grade, source)


@cache
def hash_rate() -> float:
    """Bytes of weights that this machine hashes in a second."""
    data = bytes(PROBE_BYTES)
    started = time.perf_counter()
    hashlib.sha256(data)
    return PROBE_BYTES / (time.perf_counter() - started)


@cache
def product_rate() -> float:
    """Multiplications and additions of a square product that this machine does in a second."""
    side = torch.ones(PROBE_SIDE, PROBE_SIDE)
    side @ side  # the first starts threads
    started = time.perf_counter()
    side @ side
    return 2 * PROBE_SIDE**3 / (time.perf_counter() - started)


def count_eigenvalues(config: RunConfig) -> int:
    """Frechet distances that take eigenvalues of full size: fid, sfid, and fid2fp of a quantized
    cell, unless images are few (`evaluate/frechet.py`)."""
    if config.eval.n <= INCEPTION_DIMENSIONS / 2:
        return 0
    return 3 if config.method.quantized else 2


def sharing_doubt(measured: Measured, target: Target) -> float:
    """Between a shared device and one that is shared otherwise: the root of the ratio."""
    ratio = target.sharing / measured.workers
    return math.sqrt(max(ratio, 1 / ratio))


def way_doubt(way: str, other: str) -> float:
    """Between steps that are started one by one and steps that are replayed."""
    return 1.0 if way == other else OTHER_FAMILY


def nearness(
    shape: Shape, other: Shape, doubt: float, measured: Measured, difference: float
) -> Rank:
    """How near a measurement is, the nearest first: of the same model, of little doubt, of this
    machine, of about the same size."""
    return (shape.name != other.name, doubt, not measured.here, difference)


def best(candidates: Sequence[tuple[Rank, Quantity]], otherwise: float) -> Quantity:
    """The quantity of the lowest rank; without any, a guess by the model alone."""
    if not candidates:
        return Quantity.within(otherwise, 10.0, SCALED, "nothing like it was measured")
    return min(candidates, key=lambda candidate: candidate[0])[1]


def batch_seconds(rates: Rates, shape: Shape, images: int, way: str) -> float:
    """Seconds of a micro-batch by the model alone."""
    return rates.token_seconds(shape, images, way) + rates.pixel_seconds(shape, images)


def judged_operations(shape: Shape, images: int, sequences: int) -> float:
    """Operations of judging a twin: a pass a sequence, and a picture's worth a picture."""
    return sequences * shape.sequence_operations + images * shape.pixel_operations


def variant_of_config(config: RunConfig) -> str:
    """Which arithmetic a config samples in."""
    if not config.method.quantized:
        return FULL_PRECISION
    return measured_costs.DYNAMIC if config.method.dynamic else measured_costs.STATIC
