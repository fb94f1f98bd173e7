"""Calibration of a run: a pool of images, rows selected from it, the model quantized on them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from experiments.config.recipe import build_recipe
from experiments.identity.parts import sampling_parts, version_of
from experiments.images.microbatches import draw_pool
from experiments.run.peak_memory import PeakMemory
from experiments.run.preparation import Run
from ptq import calibration as calib
from ptq.files import value_digest
from ptq.int8.exports.encoding import check_integer_path
from ptq.omniquant import block_files
from ptq.pipeline import Report, Track, quantize
from ptq.types import CalibrationSet

TRAINED = "trained.safetensors"  # blocks that a method has trained, while the run is not complete


@dataclass(frozen=True)
class Quantization:
    """What became of a model: the pipeline's report, the rows that calibrated it, and the cost."""

    report: Report
    rows: CalibrationSet
    cost: dict[str, float | None]

    @property
    def origin(self) -> dict[str, object]:
        """What results and exports say of the calibration rows."""
        return {**self.rows.meta, "fingerprint": calib.digest_rows(self.rows)}


def quantize_model(run: Run, track: Track, checkpoint: Path | None = None) -> Quantization:
    """Draw the pool, select the calibration rows, and quantize the run's model in place.

    The cost is that of selecting and quantizing; drawing the pool is sampling, and done once for
    all methods. Of a run that was killed, blocks that were trained before count in the seconds, and
    the peak is not known (None).

    Args:
        checkpoint: file that keeps what is trained, block by block; its folder exists.

    Raises:
        ConfigError: `mode=int8`, and a layer has no integer path.
    """
    config = run.config
    adapter = run.generator.adapter
    recipe = build_recipe(config)
    # refused now, not after the calibration
    if config.mode == "int8":
        check_integer_path(adapter, recipe)
    adapter.layout = config.calib.layout
    pool = calibration_pool(run, track) if recipe.reads_rows else None
    seconds_before = block_files.training_seconds(checkpoint) if checkpoint else 0.0
    with PeakMemory(run.device) as peak:
        started = time.perf_counter()
        rows = calib.no_rows()
        if pool is not None:
            rows = calib.select_rows(
                config.calib.selector,
                adapter,
                pool,
                config.calib.n,
                config.calib.seed,
                config.calib.batch,
            )
        report = quantize(adapter, rows, recipe, config.calib.batch, track, checkpoint)
    seconds = seconds_before + time.perf_counter() - started
    cost = {
        "calibration_s": round(seconds, 3),
        "calibration_peak_mb": None if seconds_before else round(peak.megabytes, 1),
    }
    return Quantization(report, rows, cost)


def calibration_pool(run: Run, track: Track) -> calib.Pool:
    """The images that calibration rows are selected from.

    The full-precision model draws them once for all methods: the run's is not quantized yet.
    """
    config = run.config
    generator = run.generator
    # (N,), on the CPU
    labels = calib.pool_labels(
        config.calib.selector, config.calib.n, run.preset.classes, config.calib.seed
    )
    determining = {
        "weights": run.transformer_digest,
        "labels": labels.tolist(),
        "seed": config.calib.seed,
        "settings": run.settings,
        "microbatch": config.sampler.microbatch,
        "dtype": config.dtype,
        # code or a device that draws otherwise never meets a pool of another
        "versions": {part: version_of(part) for part in sampling_parts(run.preset.family)},
        "device": run.device.type,
    }
    key = value_digest(determining, 16)
    # ids (N, T), or latents (N, T, D) of MAR
    tokens = draw_pool(
        generator,
        labels,
        config.calib.seed,
        config.sampler.microbatch,
        run.settings,
        run.device,
        Path(config.runs) / "cache" / f"pool-{key}.safetensors",
        track,
    )
    rows = generator.adapter.rows(tokens, labels.to(run.device))  # conditional, unconditional
    return calib.Pool(*rows, labels)
