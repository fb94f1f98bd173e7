"""One cell of a table on a released model: images by `experiments.sample`, figures by
`experiments.evaluate`.

A twin's run holds its 10,000 small images in memory and measures them itself. 50,000 images of a
released model are sampled in shards, by torchrun where a job has several GPUs, and judged by ADM's
metrics against a reference batch. The result has the form of any run's metrics.json; the images
stay in the folder `images` of the run, whatever judges them.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from experiments.config.overrides import CONF
from experiments.config.schema import RunConfig
from experiments.evaluate import command as evaluation
from experiments.evaluate.options import Options, parse
from experiments.run import cell
from experiments.store import files, locks, provenance, results
from experiments.store.results import METRICS, SCHEMA
from models.weights import digests
from ptq.spec import ConfigError


@dataclass(frozen=True)
class Judging:
    """How images are judged: options of `experiments.evaluate`. gpus: processes that sample one
    cell's images."""

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
        options = self.options(Path("."), None)
        path = evaluation.reference_path(options)
        if path is not None and not path.is_file():
            raise ConfigError(
                f"reference: {path} is no file, expected VIRTUAL_imagenet256_labeled.npz or another"
            )
        evaluation.load_extractor(options)

    def files(self) -> dict[str, Path]:
        """The files that decide the figures, as far as they are given, by the name of their
        option."""
        given = {"reference": self.reference, "weights": self.weights}
        return {name: Path(path) for name, path in given.items() if path is not None}

    def options(self, samples: Path, fp: Path | None) -> Options:
        return parse(
            [
                f"samples={samples}",
                f"extractor={self.extractor}",
                f"prc_dtype={self.prc_dtype}",
                *(
                    f"{k}={v}"
                    for k, v in (
                        ("reference", self.reference),
                        ("weights", self.weights),
                        ("fp", fp),
                    )
                    if v
                ),
            ]
        )


digest_of = cache(digests.file_digest)  # a reference batch is large, and of every cell


@dataclass(frozen=True)
class Place:
    """Where a cell's result and images belong, and what identifies the result: a run's, and how it
    is judged."""

    folder: Path
    images: Path
    identity: Mapping[str, Any]

    @classmethod
    def of(cls, config: RunConfig, judging: Judging) -> Place:
        # for its identity: the GPU stays free
        plain = cell.prepare_run(dataclasses.replace(config, device="cpu"))
        judged = {"extractor": judging.extractor, "prc_dtype": judging.prc_dtype}
        judged |= {name: digest_of(path, name)[:16] for name, path in judging.files().items()}
        kept = plain.identity | {"judged": judged}
        stem = plain.folder.name.rpartition("-")[0]
        folder = plain.folder.with_name(f"{stem}-{files.value_digest(kept)}")
        return cls(folder, plain.folder / "images", kept)


def run(
    config: RunConfig, overrides: Sequence[str], judging: Judging, wait: bool = True
) -> Mapping[str, Any]:
    """The result of a cell, and before it of the full-precision one; read if it is there.

    Raises:
        ConfigError: sampling or evaluating failed; one line. Busy: another process is at it and we
            are not to `wait`.
    """
    place = Place.of(config, judging)
    found = results.stored_result(place.folder)
    if found is not None:
        return found
    fp = None
    if config.method.quantized:
        plain = [o for o in overrides if not o.startswith("method")]
        full = cell.full_precision_config(config)
        run(full, [*plain, "method=fp"], judging, wait)
        fp = Place.of(full, judging).images
    with locks.hold_lock(place.images.parent, wait):
        return results.stored_result(place.folder) or work(config, overrides, judging, place, fp)


def work(
    config: RunConfig, overrides: Sequence[str], judging: Judging, place: Place, fp: Path | None
) -> Mapping[str, Any]:
    """Sample, judge, and write metrics.json; the seconds of sampling include quantizing."""
    resumed = any((place.images / "shards").glob("*.npz"))
    started = time.perf_counter()
    sample(overrides, place.images, judging.gpus)
    sampled = time.perf_counter()
    judged = evaluation.evaluate_samples(judging.options(place.images, fp))
    result = {
        "schema": SCHEMA,
        "cell": cell.describe_cell(config),
        "seed": config.seed,
        "metrics": {**dict.fromkeys(METRICS), **judged["metrics"]},
        "cost": {
            **dict.fromkeys(("calibration_s", "calibration_peak_mb", "model_bytes")),
            # of all images or not known
            "sampling_s": None if resumed else round(sampled - started, 3),
            **provenance.elapsed_cost(started),
        },
        "provenance": {
            **judged["provenance"],
            "hash": files.value_digest(place.identity),
            "identity": place.identity,
            "sequences": 0,
        },
    }
    files.write_json(place.folder / "metrics.json", result)
    return result


def sample(overrides: Sequence[str], folder: Path, gpus: int) -> None:
    """Run `experiments.sample`, on several GPUs by torchrun; what is finished already is kept.

    Raises:
        ConfigError: it failed; its last line says why.
    """
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
        if gpus > 1
        else []
    )
    own = ("-m", "experiments.sample", *overrides, "format=shards", f"out={folder.resolve()}")
    command = [sys.executable, *launcher, *own]
    done = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [
            line for line in done.stderr.splitlines() if line.startswith("error: ")
        ] or done.stderr.splitlines()
        raise ConfigError(
            f"sample: {lines[-1].removeprefix('error: ') if lines else 'it was killed'}"
        )
