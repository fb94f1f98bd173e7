"""One cell of a table: quantize a model, sample from it, measure it, write its folder.

A run is identified by all that decides its numbers (`identity.whole`), and named by the hash of its
departures from the defaults. Its folder

    runs/<model>-<method>-<quant>-<calib>-s<seed>-<hash8>/
        config.yaml  identity.json  metrics.json  samples.npz  grid.png
        quantization.safetensors  features.safetensors
        int8/        under `mode=int8`: the export that its images and figures are made with

is complete when metrics.json is there and the files that it names are whole (`store/folders.py`),
and then it is read, not run again. A killed run continues:
images are kept per micro-batch and what a method trains per block, everything else is computed
anew; images are continued only by the very model that made them. `preparation.py` is what comes
before, `calibration.py` how the model is quantized, `scoring.py` what is measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from experiments.config.recipe import build_recipe
from experiments.config.schema import RunConfig
from experiments.evaluate.judges import find_judge
from experiments.identity.places import read_identity, require_same_model, write_identity
from experiments.identity.results import state_identity, stored_result
from experiments.images.microbatches import (
    Plan,
    compile_steps,
    discard_shards,
    require_graphs,
    sample_images,
)
from experiments.run.calibration import TRAINED, Quantization, quantize_model
from experiments.run.diagnostics import diagnose_layers
from experiments.run.int8_export import int8_model, write_export
from experiments.run.preparation import (
    Run,
    duplicate_generator,
    full_precision_config,
    prepare_run,
)
from experiments.run.scoring import (
    model_bytes,
    named_tokens,
    score_held_out,
    score_images,
)
from experiments.store import files, folders, provenance, results
from experiments.store.locks import hold_lock
from experiments.store.results import METRICS, SCHEMA
from experiments.store.tracking import Tracker
from models.registry import Generator
from models.weights.digests import module_digest
from ptq.errors import say
from ptq.files import DamagedFile, read_sealed, write_tensors
from ptq.omniquant import block_files
from ptq.pipeline import Track

# what a run leaves in its folder, metrics.json apart; an export has digests of its own
KEPT = ("samples.npz", "features.safetensors", "quantization.safetensors", "grid.png")
PAIRS = 16  # images that a tracked run shows beside full precision's


def run_cell(
    config: RunConfig, track: Track = lambda it, what: it, wait: bool = True
) -> Mapping[str, object]:
    """The contents of a run's metrics.json; runs it, unless it is done.

    A quantized run is compared with the full-precision one, which is run before it.

    Args:
        wait: for another process that runs one of the two, instead of raising `Busy`.

    Raises:
        ConfigError, CheckpointError, NonFiniteError: one line that says what is wrong; no
            metrics.json is written.
    """
    run = prepare_run(config)
    result = stored_result(run.folder, run.whole)
    if result is not None:
        return result
    # before this run's lock is taken: its folder stays free while full precision runs
    if config.method.quantized:
        run_full_precision(run, track, wait)
    return finish_run(run, track, wait)


def run_full_precision(run: Run, track: Track, wait: bool) -> None:
    """Run what a quantized run is compared with, unless it is done; one model serves both."""
    config = full_precision_config(run.config)
    if "WANDB_RUN_ID" in os.environ:  # an agent's, which is that of the quantized run
        config = replace(config, tracker=replace(config.tracker, mode="none"))
    original = prepare_run(config)
    if stored_result(original.folder, original.whole, contents=True) is not None:
        return
    finish_run(original, track, wait)
    # a model whose steps are compiled holds CUDA graphs of its own weights
    if original.is_loaded and not config.sampler.compiled:
        run.generator = original.generator


def finish_run(run: Run, track: Track, wait: bool) -> Mapping[str, object]:
    """Run alone in the run's folder, unless another process has done it meanwhile."""
    # of full precision the images count, too: quantized runs are compared with them
    contents = not run.config.method.quantized
    with hold_lock(run.folder, wait):
        return stored_result(run.folder, run.whole, contents) or complete_run(run, track)


def complete_run(run: Run, track: Track) -> Mapping[str, object]:
    """Do everything of a run and write its folder, metrics.json last.

    Raises:
        ConfigError: decoding steps are to be compiled where they cannot be.
        CheckpointError: what judges its images is missing.
    """
    config = run.config
    if config.sampler.compiled:
        require_graphs(run.generator, run.device)
    find_judge(run.preset, run.device)  # what it lacks is said before anything is computed
    plain = asdict(config)
    begin_run(run)
    files.write_text(run.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
    # of a resumed run without the images that it had before
    started = time.perf_counter() - block_files.training_seconds(run.folder / TRAINED)
    with Tracker(
        run.folder,
        config.tracker.mode,
        plain,
        name=run.folder.name,
        group=config.tracker.group or config.model.name,
        tags=run_tags(config),
        project=config.tracker.project,
        entity=config.tracker.entity,
        place=Path(config.runs),
    ) as tracker:
        result = measure(run, track)
        result["files"] = folders.describe_files(run.folder, KEPT)
        result["cost"] |= provenance.elapsed_cost(started)
        figures = {**result["metrics"], **result["cost"]}
        tracker.log(results.known_figures(figures), step=0)
        tracker.summary(figures)
        if config.tracker.mode != "none":
            tracker.summary(paper_summary(config))
            show_in_tracker(run, tracker)
        results.write_result(run.folder / "metrics.json", result)
    # needed until the result is there: a run killed before continues from them
    discard_shards(run.folder / "shards")
    (run.folder / TRAINED).unlink(missing_ok=True)
    return result


def begin_run(run: Run) -> None:
    """Keep what the run is of in its folder, or continue the run that was begun there.

    Raises:
        ConfigError: another run took the folder meanwhile.
    """
    kept = read_identity(run.folder)
    write_identity(run.folder, run.whole, kept and kept["quantization"])


def keep_model(run: Run) -> None:
    """Keep the digest of the quantized model, before any image of it is there.

    Raises:
        ConfigError: the images that are there are of another one.
    """
    digest = module_digest(run.generator.transformer)
    require_same_model(run.folder, digest)
    write_identity(run.folder, run.whole, digest)


def run_tags(config: RunConfig) -> tuple[str, ...]:
    """By what W&B finds a run."""
    bits = config.quant.name if config.method.quantized else "fp32"
    return config.model.name, config.method.name, bits


def paper_summary(config: RunConfig) -> dict[str, object]:
    """What the paper says of the row that a run is of, beside the run's own figures; empty where
    it is of no table, or the paper has no such row."""
    from experiments.registry.labels import PAPER_MODELS
    from experiments.registry.paper import paper_figures  # pandas, which runs do without
    from experiments.registry.tables import known_tables

    table = known_tables().get(config.tracker.group or "")
    row = config.tracker.row
    if table is None or row not in table.rows:
        return {}
    quant = config.quant.name if config.method.quantized else None
    figures = paper_figures(table, config.model.name, row, quant)
    shown: dict[str, object] = {f"paper/{name}": figure for name, figure in figures.items()}
    if shown:
        shown["paper/model"] = PAPER_MODELS[config.model.name]  # of a twin the one it stands for
    return shown


def show_in_tracker(run: Run, tracker: Tracker) -> None:
    """Show what the folder of a finished run holds besides figures.

    Images, of a quantized run beside full precision's, and errors of layers.
    """
    tracker.image("samples", run.folder / "grid.png")
    if run.config.method.quantized:
        pair = []
        for folder in (run.reference, run.folder):
            images = files.read_arrays(folder / "samples.npz", "arr_0")["arr_0"]
            pair.append(images[:PAIRS])  # (PAIRS, S, S, 3)
        # side by side, (PAIRS, S, 2 S, 3)
        tracker.pairs("full precision | quantized", np.concatenate(pair, axis=2))
    if (run.folder / "layers.json").is_file():
        show_layers(run.folder / "layers.json", tracker)


def show_layers(path: Path, tracker: Tracker) -> None:
    """Show errors of layers; a file that is damaged is named, and the run goes on."""
    try:
        tracker.diagnostics(read_sealed(path))
    except DamagedFile as error:
        say(f"ignored: {error}")


def measure(run: Run, track: Track) -> dict[str, object]:
    """Quantize, sample and evaluate; returns the contents of metrics.json."""
    config = run.config
    original = run.generator
    cost: dict[str, float | None] = {"calibration_s": None, "calibration_peak_mb": None}
    calibration: Mapping[str, object] = {}
    exported_bytes: int | None = None
    if config.method.quantized:
        original = duplicate_generator(run.generator)  # the run's own is changed in place
        quantization = quantize_model(run, track, run.folder / TRAINED)
        cost |= quantization.cost
        calibration = quantization.origin
        write_tensors(quantization.report.tensors, run.folder / "quantization.safetensors")
        if config.mode == "int8":
            exported_bytes = switch_to_int8(run, quantization, original)
        keep_model(run)
    named = named_tokens(run, track)
    scores = score_held_out(run.generator, original, config, run.device, named)
    if config.method.quantized and config.tracker.mode != "none":
        write_diagnostics(run, original)  # its last use: it may be rearranged there
    plan = image_plan(run)
    images, cost["sampling_s"] = timed_images(run, plan, track)
    cost["model_bytes"] = exported_bytes or model_bytes(run.generator.transformer, config)
    scores |= score_images(run, images, plan)
    return as_result(run, scores, cost, calibration)


def switch_to_int8(run: Run, quantization: Quantization, original: Generator) -> int:
    """Export the quantized model and put the export in its place; returns its tensors' bytes."""
    folder = run.folder / "int8"
    write_export(run, quantization.report, quantization.origin, folder)
    # a copy: the held-out scores still compare with full precision
    return int8_model(run, folder, duplicate_generator(original))


def write_diagnostics(run: Run, original: Generator) -> None:
    """Write errors of layers and blocks to layers.json, where there are held-out tokens."""
    errors = diagnose_layers(run.generator, original, build_recipe(run.config))
    if errors is not None:
        files.write_sealed(run.folder / "layers.json", errors)


def image_plan(run: Run) -> Plan:
    """The images of a run."""
    config = run.config
    return Plan(
        config.eval.n,
        run.preset.classes,
        config.seed,
        config.sampler.microbatch,
        run.settings,
        run=run.hash,
    )


def timed_images(run: Run, plan: Plan, track: Track) -> tuple[np.ndarray, float | None]:
    """Sampled images (N, 3, S, S), and the seconds; None if some were there already."""
    shards = run.folder / "shards"
    resumed = any(shards.glob("*.npz"))
    started = time.perf_counter()
    # the seconds include compiling
    if run.config.sampler.compiled:
        compile_steps(run.generator)
    images = sample_images(run.generator, plan, shards, run.device, track)
    return images, None if resumed else round(time.perf_counter() - started, 3)


def as_result(
    run: Run,
    scores: Mapping[str, float | None],
    cost: dict[str, float | None],
    calibration: Mapping[str, object],
) -> dict[str, object]:
    """The contents of metrics.json; metrics that cannot be computed are null."""
    config = run.config
    return {
        "schema": SCHEMA,
        "cell": describe_cell(config),
        "seed": config.seed,
        "metrics": {**dict.fromkeys(METRICS), **scores},
        "cost": cost,
        "provenance": {
            "hash": run.hash,
            "identity": run.departures,
            **state_identity(run.whole),
            "config": asdict(config),
            "calibration": calibration,
            "sampler_settings": run.settings,
            "revision": provenance.code_revision(),
            "versions": provenance.package_versions(run.device),
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
