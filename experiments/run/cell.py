"""One cell of a table: quantize a model, sample from it, measure it, write its folder.

A cell is identified by the hash of what determines its numbers (`config.identity`). Its folder

    runs/<model>-<method>-<quant>-<calib>-s<seed>-<hash8>/
        config.yaml  metrics.json  quantization.safetensors  features.safetensors  samples.npz  grid.png
        int8/        under `mode=int8`: the export that its images and figures are made with

is complete when metrics.json is there, and then it is read, not run again. A killed cell continues:
images are kept per micro-batch and what a method trains per block, everything else is computed
anew. `preparation.py` is what comes before, `scoring.py` what is measured.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from experiments.config.recipe import build_recipe
from experiments.config.schema import RunConfig
from experiments.images.microbatches import (
    Plan,
    compile_steps,
    discard_shards,
    draw_pool,
    require_graphs,
    sample_images,
)
from experiments.run import int8_export
from experiments.run.diagnostics import diagnose_layers
from experiments.run.peak_memory import PeakMemory
from experiments.run.preparation import Run, full_precision_config, load_model, prepare_run
from experiments.run.scoring import model_bytes, score_held_out, score_images
from experiments.store import files, provenance, results
from experiments.store.locks import hold_lock
from experiments.store.results import METRICS, RESULT_VERSION, SCHEMA
from experiments.store.tracking import Tracker
from models.registry import Generator
from models.weights.digests import module_digest
from ptq import calibration as calib
from ptq.int8.encoding import check
from ptq.omniquant import omniquant
from ptq.pipeline import Report, Track, quantize

PAIRS = 16  # images that a tracked run shows beside full precision's
TRAINED = "trained.safetensors"  # blocks that a method has trained, while the cell is not complete


def run_cell(
    config: RunConfig, track: Track = lambda it, what: it, wait: bool = True
) -> Mapping[str, object]:
    """Run a cell, and before it the full-precision one it is compared with, unless they are done;
    returns metrics.json.

    Args:
        wait: for another process that runs one of the two, instead of raising `Busy`.

    Raises:
        ConfigError, CheckpointError, NonFiniteError: one line that says what is wrong; no
            metrics.json is written.
    """
    cell = prepare_run(config)
    found = results.stored_result(cell.folder)
    if found is not None:
        return found
    if config.method.quantized:
        full = full_precision_config(config)
        if "WANDB_RUN_ID" in os.environ:  # an agent's, which is that of the quantized run
            full = replace(full, tracker=replace(full.tracker, mode="none"))
        run_cell(full, track, wait)
    with hold_lock(cell.folder, wait):
        return results.stored_result(cell.folder) or complete_run(cell, track)


def complete_run(cell: Run, track: Track) -> Mapping[str, object]:
    """Do everything of a cell and write its folder, metrics.json last.

    Raises:
        ConfigError: decoding steps are to be compiled where they cannot be.
    """
    config = cell.config
    if config.sampler.compiled:
        require_graphs(cell.generator, cell.device)
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    files.write_text(cell.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    tags = (
        config.model.name,
        config.method.name,
        config.quant.name if config.method.quantized else "fp32",
    )
    group = config.tracker.group or config.model.name
    started = time.perf_counter() - omniquant.seconds(cell.folder / TRAINED)
    with Tracker(
        cell.folder, config.tracker.mode, plain, name=cell.folder.name, group=group, tags=tags
    ) as tracker:
        result = measure(cell, track)
        result["cost"] |= provenance.elapsed_cost(
            started
        )  # of a resumed cell without earlier images
        figures = {
            k: v for k, v in {**result["metrics"], **result["cost"]}.items() if v is not None
        }
        tracker.log(figures, step=0)
        tracker.summary({**result["metrics"], **result["cost"]})
        if config.tracker.mode != "none":
            show_in_tracker(cell, tracker)
        files.write_json(cell.folder / "metrics.json", result)
    discard_shards(cell.folder / "shards")
    (cell.folder / TRAINED).unlink(missing_ok=True)
    return result


def show_in_tracker(cell: Run, tracker: Tracker) -> None:
    """Show what the folder of a finished run holds besides figures: images, beside full
    precision's, and errors."""
    tracker.image("samples", cell.folder / "grid.png")
    if cell.config.method.quantized:
        pair = []
        for folder in (cell.reference, cell.folder):
            with np.load(folder / "samples.npz") as stored:
                pair.append(stored["arr_0"][:PAIRS])
        tracker.pairs("full precision | quantized", np.concatenate(pair, axis=2))
    if (cell.folder / "layers.json").is_file():
        tracker.diagnostics(json.loads((cell.folder / "layers.json").read_text()))


def measure(cell: Run, track: Track) -> dict[str, object]:
    """Quantize, sample and evaluate; returns the contents of metrics.json."""
    config = cell.config
    generator = cell.generator
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    cost: dict[str, float | None] = {"calibration_s": None, "calibration_peak_mb": None}
    meta: Mapping[str, object] = {}
    reference = load_model(config, cell.device) if config.method.quantized else generator
    exported: int | None = None
    if config.method.quantized:
        report, chosen, spent = quantize_model(cell, track, cell.folder / TRAINED)
        cost |= spent
        meta = {**chosen.meta, "fingerprint": calib.digest_rows(chosen)}
        files.save_tensors(report.tensors, cell.folder / "quantization.safetensors")
        if config.mode == "int8":
            int8_export.write_export(cell, report, meta, cell.folder / "int8")
            generator, exported = int8_model(cell, cell.folder / "int8")
    metrics |= score_held_out(generator, reference, config, cell.device)
    if config.method.quantized and config.tracker.mode != "none":
        # last use of the reference, which it may rearrange
        found = diagnose_layers(generator, reference, build_recipe(config))
        if found is not None:
            files.write_json(cell.folder / "layers.json", found)
    resumed = any((cell.folder / "shards").glob("*.npz"))
    started = time.perf_counter()
    plan = Plan(
        config.eval.n,
        generator.preset.classes,
        config.seed,
        config.sampler.microbatch,
        cell.settings,
        run=cell.hash,
    )
    if config.sampler.compiled:
        compile_steps(generator)
    images = sample_images(generator, plan, cell.folder / "shards", cell.device, track)
    # of all images or not known
    cost["sampling_s"] = None if resumed else round(time.perf_counter() - started, 3)
    cost["model_bytes"] = exported or model_bytes(generator.transformer, config)
    metrics |= score_images(cell, images, plan)
    return {
        "schema": SCHEMA,
        "cell": describe_cell(config),
        "seed": config.seed,
        "metrics": metrics,
        "cost": cost,
        "provenance": {
            "hash": cell.hash,
            "identity": cell.identity,
            "config": OmegaConf.to_container(OmegaConf.structured(config)),
            "calibration": meta,
            "sampler_settings": cell.settings,
            "revision": provenance.code_revision(),
            "versions": provenance.package_versions(cell.device),
            "images": config.eval.n,
            "sequences": config.eval.sequences,
        },
    }


def describe_cell(config: RunConfig) -> dict[str, str | None]:
    """The names by which tables know a cell."""
    quantized = {
        "quant": config.quant.name,
        "calib": config.calib.selector,
        "scope": config.scope.name,
    }
    return {
        "model": config.model.name,
        "method": config.method.name,
        **(quantized if config.method.quantized else dict.fromkeys(quantized)),
        "sampler": config.sampler.name,
        "eval": config.eval.name,
        "mode": config.mode,
    }


def quantize_model(
    cell: Run, track: Track, checkpoint: Path | None = None
) -> tuple[Report, calib.CalibrationSet, dict[str, float | None]]:
    """Draw the pool, select the calibration set, quantize in place; returns the report, the set and
    the cost.

    The cost is that of selecting and quantizing; drawing the pool is sampling, and done once for
    all methods. Of a run that was killed, blocks that were trained before count in the seconds, and
    the peak is not known (None).

    Args:
        checkpoint: file that keeps what is trained, block by block; its folder exists.
    """
    config = cell.config
    generator = cell.generator
    if config.mode == "int8":
        check(generator.adapter, build_recipe(config))
    generator.adapter.layout = config.calib.layout
    pool = calibration_pool(cell, track)
    before = omniquant.seconds(checkpoint) if checkpoint else 0.0
    with PeakMemory(cell.device) as peak:
        started = time.perf_counter()
        chosen = calib.select_rows(
            config.calib.selector,
            generator.adapter,
            pool,
            config.calib.n,
            config.calib.seed,
            config.calib.batch,
        )
        report = quantize(
            generator.adapter, chosen, build_recipe(config), config.calib.batch, track, checkpoint
        )
    spent = before + time.perf_counter() - started
    megabytes = None if before else round(peak.megabytes, 1)
    return report, chosen, {"calibration_s": round(spent, 3), "calibration_peak_mb": megabytes}


def int8_model(cell: Run, folder: Path) -> tuple[Generator, int]:
    """Put a fresh model that is loaded from the export in `folder` in the place of the cell's;
    return it, and the bytes of the export's tensor file.

    Raises:
        ConfigError: the export is missing, damaged, or of other weights.
    """
    cell.generator = load_model(cell.config, cell.device)
    export = int8_export.load_export(
        int8_export.export_path(folder, cell.config.model.name), cell.generator, cell.weights
    )
    return cell.generator, export.plain["bytes"]


def calibration_pool(cell: Run, track: Track) -> calib.Pool:
    """The images that calibration rows are selected from, drawn by the full-precision model once
    for all methods."""
    config = cell.config
    generator = cell.generator
    labels = calib.pool_labels(
        config.calib.selector, config.calib.n, generator.preset.classes, config.calib.seed
    )
    key = files.value_digest(
        {
            "weights": module_digest(generator.transformer),
            "labels": labels.tolist(),
            "seed": config.calib.seed,
            "settings": cell.settings,
            "microbatch": config.sampler.microbatch,
            "dtype": config.dtype,
            "version": RESULT_VERSION,
        },
        16,
    )
    cache = Path(config.runs) / "cache" / f"pool-{key}.safetensors"
    tokens = draw_pool(
        generator,
        labels,
        config.calib.seed,
        config.sampler.microbatch,
        cell.settings,
        cell.device,
        cache,
        track,
    )
    return calib.Pool(*generator.adapter.rows(tokens, labels.to(cell.device)), labels)
