"""One cell of a table on a released model: sampled and judged by the project's own commands.

A twin's run holds its 10,000 small images in memory and measures them itself. 50,000 images of a
released model are sampled in shards by `experiments.sample`, with torchrun where a job has several
GPUs, and judged by `experiments.evaluate` with ADM's metrics against a reference batch. The result
has the form of any run's metrics.json; the images stay in the folder `images` of the run, whatever
judges them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from experiments.config.schema import RunConfig
from experiments.evaluate import command as evaluation
from experiments.evaluate.options import Options, parse
from experiments.identity.departures import add_versions
from experiments.identity.places import choose_place, write_identity
from experiments.identity.results import state_identity, stored_result
from experiments.identity.whole import whole_identity
from experiments.registry.tables import full_precision_overrides
from experiments.run import cell
from experiments.sample.options import is_of_method
from experiments.sample.scores import read_scores
from experiments.store import locks, provenance, results
from experiments.store.progress import SILENT, VARIABLE, ProgressDisplay
from experiments.store.results import METRICS, SCHEMA
from experiments.table.processes import run_child
from models.weights import digests
from models.weights.checkpoints import CheckpointError
from ptq.files import value_digest
from ptq.spec import ConfigError

FORM = ("format=shards", "measure=true")  # what `sample` is to leave


@dataclass(frozen=True)
class Judging:
    """How images are judged: options of `experiments.evaluate`.

    Attributes:
        gpus: processes that sample one cell's images.
    """

    reference: str | None = None
    weights: str | None = None
    extractor: str = "inception"
    prc_dtype: str = "float32"
    gpus: int = 1

    def check(self) -> None:
        """Refuse what would only fail after hours of sampling.

        Raises:
            ConfigError, CheckpointError: the reference or the extractor's weights are missing or
                wrong.
        """
        options = self.options(Path("."), None)  # no samples are there yet: any folder does
        try:
            path = evaluation.reference_path(options)
            if path is not None and not path.is_file():
                raise ConfigError(
                    f"reference: {path} is no file, expected VIRTUAL_imagenet256_labeled.npz or "
                    "another"
                )
            evaluation.load_extractor(options)
        except (CheckpointError, ConfigError) as error:
            raise type(error)(as_table_option(str(error))) from error

    def files(self) -> dict[str, Path]:
        """The files that decide the figures, by the name of their option, where they are given."""
        files = {}
        for name in ("reference", "weights"):
            path = getattr(self, name)
            if path is not None:
                files[name] = Path(path)
        return files

    def options(self, samples: Path, fp: Path | None) -> Options:
        """The options that judge a folder of samples; `fp`: samples of the full-precision model."""
        arguments = [
            f"samples={samples}",
            f"extractor={self.extractor}",
            f"prc_dtype={self.prc_dtype}",
        ]
        optional = {"reference": self.reference, "weights": self.weights, "fp": fp}
        for name, value in optional.items():
            if value:
                arguments.append(f"{name}={value}")
        return parse(arguments)


def as_table_option(message: str) -> str:
    """What `experiments.evaluate` says, with the options that a table has: `inception=` stands for
    `weights=`, and none for `fp=`."""
    message = message.removesuffix(" (or fp=SAMPLES alone)")
    return message.replace("weights:", "inception:", 1).replace("weights=", "inception=")


cached_digest = cache(digests.file_digest)  # a reference batch is large, and of every cell


@dataclass(frozen=True)
class Place:
    """Where a cell's result and images belong, and what identifies the result.

    The identity is that of a run, and how it is judged.
    """

    folder: Path
    images: Path
    departures: Mapping[str, Any]
    whole: Mapping[str, Any]

    @classmethod
    def of(cls, config: RunConfig, judging: Judging) -> Place:
        """The place of a cell."""
        # for its identity alone: no model is loaded, and the GPU stays free
        plain = cell.prepare_run(config)
        # images are of no held-out tokens
        images = cell.prepare_run(replace(config, heldout=None)).folder / "images"
        judged = {"extractor": judging.extractor, "prc_dtype": judging.prc_dtype}
        for name, path in judging.files().items():
            judged[name] = cached_digest(path, name)[:16]  # contents: the file may move
        departures = add_versions(plain.values | {"judged": judged})
        whole = whole_identity(departures, plain.device.type)
        name = f"{plain.stem}-{value_digest(departures)}"
        folder = choose_place(Path(config.runs) / name, whole)
        # images are shared, however judged
        return cls(folder, images, departures, whole)


def run_cell(
    config: RunConfig,
    overrides: Sequence[str],
    judging: Judging,
    wait: bool = True,
    display: ProgressDisplay = SILENT,
) -> Mapping[str, Any]:
    """The result of a cell, and before it of the full-precision one; read if it is there.

    Raises:
        ConfigError: sampling or evaluating failed; one line.
        Busy: another process computes the cell and we are not to `wait`.
    """
    place = Place.of(config, judging)
    stored = stored_result(place.folder, place.whole)
    if stored is not None:
        return stored
    fp_images = None
    if config.method.quantized:
        fp_config = cell.full_precision_config(config)
        run_cell(fp_config, full_precision_overrides(overrides), judging, wait, display)
        fp_images = Place.of(fp_config, judging).images
    # the lock of the plain run: cells that are judged otherwise sample the same images
    with locks.hold_lock(place.images.parent, wait):
        stored = stored_result(place.folder, place.whole)  # finished while we waited
        if stored is not None:
            return stored
        return measure_cell(config, overrides, judging, place, fp_images, display)


def measure_cell(
    config: RunConfig,
    overrides: Sequence[str],
    judging: Judging,
    place: Place,
    fp_images: Path | None,
    display: ProgressDisplay,
) -> Mapping[str, Any]:
    """Sample, judge, and write metrics.json.

    The seconds of sampling are those of the command, without calibration.
    """
    write_identity(place.folder, place.whole)
    # the clock then shows a part of the sampling
    resumed = any((place.images / "shards").glob("*.npz"))
    started = time.perf_counter()
    if not any(is_of_method(override) for override in overrides):
        # `sample` takes full precision then, a cell the default
        overrides = [f"method={config.method.name}", *overrides]
    sample_images(overrides, place.images, judging.gpus, display)
    seconds = time.perf_counter() - started
    scores = read_scores(place.images)
    sampling_s = round(seconds - (scores["cost"]["calibration_s"] or 0.0), 3)
    judged = evaluation.evaluate_samples(judging.options(place.images, fp_images), display)
    result = {
        "schema": SCHEMA,
        "cell": cell.describe_cell(config),
        "seed": config.seed,
        # what was not measured is null
        "metrics": {**dict.fromkeys(METRICS), **judged["metrics"], **scores["metrics"]},
        "cost": {
            **scores["cost"],
            "sampling_s": None if resumed else sampling_s,  # of all images, or not known
            **provenance.elapsed_cost(started),
        },
        "provenance": {
            **judged["provenance"],
            "hash": value_digest(place.departures),
            "identity": place.departures,
            **state_identity(place.whole),
            "sequences": config.eval.sequences if scores["metrics"] else 0,
        },
    }
    results.write_result(place.folder / "metrics.json", result)
    return result


def sample_images(
    overrides: Sequence[str], folder: Path, gpus: int, display: ProgressDisplay = SILENT
) -> None:
    """Run `experiments.sample`, on several GPUs by torchrun; what is finished already is kept.

    Raises:
        ConfigError: it failed; its last line says why.
    """
    launcher: list[str] = []
    if gpus > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    # resolved: the child runs in the project's folder
    sampling = ["-m", "experiments.sample", *overrides, *FORM, f"out={folder.resolve()}"]
    command = [sys.executable, *launcher, *sampling]
    with display.follow() as (file, look):
        process = run_child(command, {VARIABLE: str(file)}, look)
    if process.returncode != 0:
        raise ConfigError(f"sample: {failure_reason(process.stderr)}")


def failure_reason(stderr: str) -> str:
    """The last error that a command names on stderr, or else its last line."""
    lines = stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")] or lines
    return errors[-1].removeprefix("error: ") if errors else "it was killed"
