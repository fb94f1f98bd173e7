"""Sampling of a run's images by one process or by several that share a folder."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from experiments.config.compose import configure
from experiments.identity.departures import add_versions
from experiments.identity.places import migration_of
from experiments.identity.results import state_identity
from experiments.identity.whole import describe_differences, summarize_differences, whole_identity
from experiments.images import image_sets, shards
from experiments.images.microbatches import (
    Plan,
    compile_steps,
    require_graphs,
    sample_shards,
)
from experiments.images.shards import StorageError
from experiments.plotting.grids import save_grid
from experiments.run import calibration, int8_export
from experiments.run.cell import describe_cell
from experiments.run.preparation import Run, load_model, prepare_run
from experiments.sample.exported import ExportedRun, prepare_exported
from experiments.sample.options import Options
from experiments.sample.scores import read_scores, scores_key, write_scores
from experiments.store import files, locks, provenance
from experiments.store.progress import CountedImages, ProgressDisplay
from models.weights.digests import module_digest
from ptq.errors import say
from ptq.files import TEMPORARY, value_digest
from ptq.pipeline import Track
from ptq.types import ConfigError

CHUNK = 250  # images written at a time
SHOWN = 64  # images of the picture of all, at most


@dataclass(frozen=True)
class Workers:
    """The processes that share a run: this one's number and how many there are."""

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls) -> Workers:
        """Those of torchrun, if it started this process."""
        if "RANK" not in os.environ:
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # to wait for the others, nothing more
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        return cls(dist.get_rank(), dist.get_world_size())

    def agree(self, value: object) -> list:
        """Everyone's value; waits until all have come here."""
        values = [value]
        if self.world > 1:
            values = [None] * self.world
            dist.all_gather_object(values, value)
        return values


def manifest_of(run: Run, options: Options) -> dict[str, object]:
    """What identifies a run and describes its images; the number of images is no part of its
    identity."""
    config = run.config
    preset = run.preset
    values = run.values | {"rounding": options.rounding}
    # without labels of the user's own, manifests are what they were
    labels = {} if options.labels is None else {"labels": options.labels}
    values |= labels
    del values["eval"]  # a number of images, and what is measured of them
    values.pop("held_out", None)
    kept = add_versions(values)
    whole = whole_identity(kept, run.device.type)
    is_counted = options.n is not None or options.n_per_class is not None
    cell = run.describe_cell() if isinstance(run, ExportedRun) else describe_cell(config)
    return {
        "run": value_digest(kept),
        "images": count_images(run, options),
        "classes": preset.classes,
        "microbatch": config.sampler.microbatch,
        "rounding": options.rounding,
        "seed": config.seed,
        # with another number of images it is no evaluation that has a name
        "cell": cell | ({"eval": None} if is_counted else {}),
        **labels,
        "identity": kept,
        "whole": whole,
        **state_identity(whole),
        "quantization": None,  # a digest, once there is a quantized model
        "provenance": {
            "config": asdict(config),
            "sampler_settings": run.settings,
            "revision": provenance.code_revision(),
            "versions": [provenance.package_versions(run.device)],  # one for every kind of machine
        },
    }


def count_images(run: Run, options: Options) -> int:
    """How many images are asked for; `eval.n` if no number is."""
    if options.n_per_class is not None:
        return options.n_per_class * run.preset.classes
    return options.n or run.config.eval.n


def discard_stale(folder: Path) -> None:
    """Remove what killed processes left half-written; the folder is locked by this process."""
    for place in (folder, folder / "shards"):
        for stale in place.glob(f"*{TEMPORARY}*"):
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink()


def begin_run(folder: Path, manifest: dict[str, object]) -> dict[str, object]:
    """Write the manifest, or continue the run that is in the folder; returns what the folder says
    now.

    Raises:
        ConfigError: the folder holds another run. StorageError: the manifest cannot be written.
    """
    discard_stale(folder)
    if (folder / image_sets.MANIFEST).is_file():
        found = image_sets.read_manifest(folder)
        require_same_run(folder, found, manifest)
        known = found["provenance"]["versions"]
        versions = manifest["provenance"]["versions"][0]
        if versions not in known:
            print(
                f"warning: {folder} was begun elsewhere: "
                f"{'; '.join(describe_differences(known[-1], versions))}",
                file=sys.stderr,
            )
        # this machine's versions are the last ones, and those that the next call compares with
        provenances = {
            **found["provenance"],
            "versions": [*(v for v in known if v != versions), versions],
        }
        # the digest stays: a model quantized anew has to be the one that made the shards
        manifest = {**manifest, "quantization": found["quantization"], "provenance": provenances}
    write_manifest(folder, manifest)
    return manifest


def require_same_run(folder: Path, found: dict[str, object], manifest: dict[str, object]) -> None:
    """Refuse to continue the samples of another run.

    Args:
        found: the manifest in the folder.

    Raises:
        ConfigError: it is of another run, or does not say so.
    """
    if found["run"] != manifest["run"]:
        changes = summarize_differences(found.get("identity"), manifest["identity"])
        raise ConfigError(f"out: {folder} holds samples of another run ({changes})")
    if "identity_digest" not in found:
        raise ConfigError(
            f"out: {folder} does not state the whole identity of its run; "
            f"`{migration_of(folder)}` gives it one"
        )
    if found["identity_digest"] != manifest["identity_digest"]:
        changes = summarize_differences(found.get("whole"), manifest["whole"])
        raise ConfigError(f"out: {folder} holds samples of another run ({changes})")


def write_manifest(folder: Path, manifest: dict[str, object]) -> None:
    """Write the manifest.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        files.write_sealed(folder / image_sets.MANIFEST, manifest)
    except OSError as error:
        raise StorageError(
            f"samples: {folder / image_sets.MANIFEST} cannot be written ({error.strerror})"
        ) from error


def missing_batches(folder: Path, plan: Plan) -> list[int]:
    """Numbers of the micro-batches that are not there, or are damaged."""
    missing = []
    for number in range(len(plan)):
        if not shards.is_finished(folder / "shards", number, plan.run, contents=True):
            missing.append(number)
    return missing


@dataclass(frozen=True)
class Quantized:
    """A model that all processes have quantized: its digest, and what became of it.

    Attributes:
        exported_bytes: of its integers, if it runs in them.
    """

    digest: str
    quantization: calibration.Quantization
    exported_bytes: int | None


def quantize_together(
    run: Run, manifest: dict[str, object], folder: Path, workers: Workers, track: Track
) -> Quantized:
    """Quantize the run's model in place, to the same digest in all processes.

    What a method trains is trained by process 0 alone, and kept in the folder for the others and
    for later calls.

    Raises:
        ConfigError: processes, or this run and the shards there are, come to different quantized
            models.
    """
    checkpoint = folder / calibration.TRAINED
    trains = workers.rank == 0 and run.config.method.omniquant
    if workers.rank == 0:
        calibration.calibration_pool(run, track)  # the others find it in the cache
    if trains:
        quantization = calibration.quantize_model(run, track, checkpoint)
    workers.agree(None)  # now the pool is in the cache, and what is trained in the folder
    if not trains:
        quantization = calibration.quantize_model(run, track, checkpoint)
    exported_bytes = None
    if run.config.mode == "int8":
        export = folder / "int8"
        if workers.rank == 0:
            int8_export.write_export(run, quantization.report, quantization.origin, export)
        workers.agree(None)  # now the export is written
        # loaded again: a copy kept since before would fill memory while the model is calibrated
        original = load_model(run.config, run.device)
        exported_bytes = int8_export.int8_model(run, export, original)
    found = module_digest(run.generator.transformer)
    everyone = set(workers.agree(found))
    if len(everyone) > 1:
        raise ConfigError(
            f"calibration: {len(everyone)} different results on {workers.world} equal processes"
        )
    if manifest["quantization"] not in (None, found):
        raise ConfigError(
            "calibration: the quantized model differs from that of the shards in the "
            "folder (another device, other "
            "versions or threads?); give another out=FOLDER"
        )
    return Quantized(found, quantization, exported_bytes)


def keep_scores(
    run: Run, key: str, folder: Path, quantized: Quantized | None, track: Track
) -> None:
    """Measure the model before its images are made."""
    quantization = None if quantized is None else quantized.quantization
    exported_bytes = None if quantized is None else quantized.exported_bytes
    write_scores(run, key, folder, quantization, exported_bytes, track)


def until_all_are_done(track: Track, workers: Workers) -> Track:
    """A track over the images of all processes, which ends when all have come to their end."""

    def finish_together(numbers: Iterable[int]) -> Iterator[int]:
        yield from numbers
        workers.agree(None)

    def track_all(counted: CountedImages, what: str) -> Iterable[int]:
        return track(replace(counted, items=finish_together(counted.items)), what)

    return track_all


def write_images(folder: Path, kind: str) -> Path:
    """What the shards are made into, unless it is there already and whole; returns where it is."""
    found = image_sets.ShardImages.open("samples", folder)
    if kind == "shards":
        return folder / "shards"
    path = folder / ("samples.npz" if kind == "npz" else "png")
    if path.exists() and not image_sets.holds_images(path, found):
        say(f"made anew: {path}: does not hold the {found.n} images of its shards")
    elif path.exists():
        return path
    if kind == "npz":
        image_sets.write_npz(found.chunks(CHUNK), found.n, found.size, path)
    else:
        image_sets.write_pngs(found.chunks(CHUNK), path)
    return path


def write_picture(folder: Path) -> Path:
    """The first images in one picture; returns where it is."""
    images = image_sets.ShardImages.open("samples", folder)
    path = folder / "grid.png"
    save_grid(next(images.chunks(SHOWN)), path)
    return path


def sample_run(options: Options, overrides: list[str], workers: Workers) -> Path:
    """Sample what the options and overrides say; returns the run's folder.

    Raises:
        ConfigError, CheckpointError, NonFiniteError, StorageError: one line; what was finished
            stays usable.
    """
    run = prepare_sampling(options, overrides)
    manifest = manifest_of(run, options)
    name = f"{run.stem}-{manifest['run']}"
    folder = Path(options.out or Path(run.config.runs) / "samples" / name)
    # process 0 alone locks the folder and shows progress
    if workers.rank:
        return sample_share(run, options, manifest, folder, workers, lambda it, what: it)
    with locks.hold_lock(folder):
        manifest = begin_run(folder, manifest)
        display = ProgressDisplay.of_process()
        return sample_share(run, options, manifest, folder, workers, display)


def prepare_sampling(options: Options, overrides: list[str]) -> Run:
    """The run whose images are asked for.

    Images of an export, or of labels that are named, are few and looked at: a micro-batch then is
    no larger than their number, and no padding is drawn in vain. (Calibration has micro-batches of
    its own, which stay.)

    Raises:
        ConfigError, ExportError, CheckpointError: one line.
    """
    if options.quantized is not None:
        run = prepare_exported(options.quantized, overrides)
    else:
        run = prepare_run(configure(overrides))
    for label in options.labels or ():
        if label >= run.preset.classes:
            raise ConfigError(
                f"labels: {label} is not a class from 0 to {run.preset.classes - 1} of "
                f"{run.preset.name}"
            )
    is_looked_at = options.quantized is not None or options.labels is not None
    if is_looked_at and not run.config.method.quantized:
        sampler = run.config.sampler
        smaller = replace(sampler, microbatch=min(sampler.microbatch, count_images(run, options)))
        run.config = replace(run.config, sampler=smaller)
    return run


def sample_share(
    run: Run,
    options: Options,
    manifest: dict[str, object],
    folder: Path,
    workers: Workers,
    track: Track,
) -> Path:
    """One process's part of a run; process 0 holds the folder's lock and writes what is made of the
    shards."""
    if run.config.sampler.compiled:
        require_graphs(run.generator, run.device)
    manifest = workers.agree(manifest)[0]  # process 0's, which may continue an older one
    plan = Plan(
        manifest["images"],
        manifest["classes"],
        manifest["seed"],
        manifest["microbatch"],
        run.settings,
        options.rounding,
        manifest["run"],
        options.labels and tuple(options.labels),
    )
    key = scores_key(run, plan.run) if options.measure else None
    # what process 0 sees counts: if some went on without the others, they would wait for ever
    is_scored = workers.agree(key is None or read_scores(folder, key) is not None)[0]
    missing = missing_batches(folder, plan) if workers.rank == 0 else None
    if workers.agree(missing)[0] or not is_scored:
        quantized = None
        if run.config.method.quantized:
            quantized = quantize_together(run, manifest, folder, workers, track)
            if workers.rank == 0 and manifest["quantization"] is None:
                write_manifest(folder, manifest | {"quantization": quantized.digest})
        if workers.rank == 0 and not is_scored:
            keep_scores(run, key, folder, quantized, track)
        if run.config.sampler.compiled:
            compile_steps(run.generator)
        numbers = range(workers.rank, len(plan), workers.world)
        together = until_all_are_done(track, workers)
        sample_shards(run.generator, plan, folder / "shards", run.device, numbers, together)
    if workers.rank == 0:
        left = missing_batches(folder, plan)
        if left:
            raise ConfigError(
                f"samples: {folder} lacks {len(left)} micro-batches; do all nodes share "
                "this folder?"
            )
        print(f"{plan.images} images: {write_images(folder, options.format)}")
        if options.format != "shards":
            print(f"together: {write_picture(folder)}")
    return folder


def sample_together(options: Options, overrides: list[str]) -> None:
    """Join the other processes, if torchrun started this one, and sample.

    Raises:
        ConfigError, CheckpointError, NonFiniteError, StorageError: one line.
    """
    workers = Workers.join()
    try:
        sample_run(options, overrides, workers)
    except StorageError as error:
        raise StorageError(
            f"{error}; what is finished is kept, and the same command continues from there"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
