"""What `experiments.evaluate` does: figures of a set of samples, as a result with provenance."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.evaluate import adm, paired, references
from experiments.evaluate.evaluator import Summary, Target, class_agreement, score_summary
from experiments.evaluate.extractors import fashion
from experiments.evaluate.extractors.base import Extractor
from experiments.evaluate.features import CHUNK, FeatureStream
from experiments.evaluate.frechet import Moments, frechet_distance
from experiments.evaluate.options import Options
from experiments.evaluate.precision_recall import DTYPES
from experiments.evaluate.references import Streamer
from experiments.identity.parts import version_of
from experiments.images.image_sets import Images, ShardImages, open_images, require_known_pairs
from experiments.store import provenance
from experiments.store.results import SCHEMA
from models.registry import shipped_file
from ptq.pipeline import Track
from ptq.types import ConfigError

FIGURES = (
    "fid",
    "sfid",
    "is",
    "is_file_order",
    "precision",
    "recall",
    "fid2fp",
    "paired_distance",
    "psnr",
    "token_agreement",
    "agreement",
)
OF_IMAGES = ("psnr", "token_agreement")  # need no extractor
OF_PAIRS = ("seed", "classes", "labels")  # what two runs have to share for their images to be pairs


def evaluate_samples(options: Options, track: Track = lambda items, what: items) -> dict[str, Any]:
    """The result of an evaluation, in the format of metrics.json; `track` shows how far it is.

    Raises:
        ConfigError, CheckpointError: one line that says what is wrong with samples, reference or
            weights.
    """
    started = time.perf_counter()
    samples = open_samples(options)
    extractor, layers = load_extractor(options)
    stream = partial(
        FeatureStream,
        extractor=extractor,
        kind=options.extractor,
        cache=Path(options.cache),
        batch=options.batch,
        device=options.device,
        track=track,
    )
    # before the samples are gone through: a wrong reference is refused at once
    target = open_target(options, extractor, layers, samples.size, stream)

    source = stream(samples)
    split = None if options.extractor == "fashion" else adm.SPLIT
    summary = adm.summarize_stream(source, samples.n, split)

    metrics = {**dict.fromkeys(FIGURES), **summary.scores}
    if target is not None:
        metrics |= score_summary(summary, target, DTYPES[options.prc_dtype], options.device)
    manifest = run_manifest(samples)
    if manifest and options.extractor == "fashion":
        classes = torch.tensor(manifest.get("labels") or range(manifest["classes"]))
        labels = classes[torch.arange(samples.n) % len(classes)]  # (N,)
        metrics["agreement"] = class_agreement(summary.predicted, labels)
    if options.fp is not None:
        classifier = extractor if options.extractor == "fashion" else None
        metrics |= compare_with_fp(samples, summary, options, stream, classifier)

    return {
        "schema": SCHEMA,
        "cell": manifest.get("cell"),
        "seed": manifest.get("seed"),
        "metrics": name_metrics(metrics, options.extractor),
        "cost": {"evaluation_s": round(time.perf_counter() - started, 1)},
        "provenance": {
            "hash": manifest.get("run"),
            **manifest.get("provenance", {}),
            "images": samples.n,
            "samples": source.digest,
            "rounding": manifest.get("rounding"),
            "evaluator": describe_evaluator(options, extractor, target),
            "lacking": {} if target is None else dict(target.lacking),
            "sampled_on": manifest.get("provenance", {}).get("versions"),
            "versions": provenance.package_versions(torch.device(options.device)),
            "revision": provenance.code_revision(),
        },
    }


def run_manifest(samples: Images) -> Mapping[str, Any]:
    """What is known of the run that made the images; empty if nothing is."""
    return samples.manifest if isinstance(samples, ShardImages) else {}


def describe_evaluator(
    options: Options, extractor: Extractor, target: Target | None
) -> dict[str, Any]:
    """What decides the figures beside the samples, for provenance."""
    return {
        "extractor": options.extractor,
        "weights": extractor.digest,
        "prc_dtype": options.prc_dtype,
        "reference": None if target is None else dict(target.origin),
        "version": version_of("evaluator.features"),
    }


def open_samples(options: Options) -> Images:
    """The images to evaluate.

    Raises:
        ConfigError: there are none, or another number than `n`.
    """
    samples = open_images("samples", Path(options.samples))
    if options.n is not None and samples.n != options.n:
        raise ConfigError(f"n: {samples.path} holds {samples.n} images, expected {options.n}")
    return samples


def load_extractor(options: Options) -> tuple[Extractor, dict[str, int]]:
    """The network that the options name, and the length of each of its layers.

    Raises:
        CheckpointError: its weights are missing, damaged or of another network.
    """
    if options.extractor == "fashion":
        weights = options.weights or shipped_file("extractor.safetensors")
        return fashion.load_classifier(weights, options.device), fashion.LAYERS
    if options.extractor == "lite0":
        from experiments.evaluate.extractors import lite0

        return lite0.load_lite0(options.weights, options.device), lite0.LAYERS
    from experiments.evaluate.extractors import inception

    return inception.load_inception(options.weights, options.device), inception.LAYERS


def reference_path(options: Options) -> Path | None:
    """The path of the reference; None if samples are compared with full precision's only.

    Raises:
        ConfigError: there is nothing to compare with.
    """
    if options.reference is not None:
        return Path(options.reference)
    if options.extractor == "fashion":
        return shipped_file("reference.safetensors")
    if options.fp is None:
        raise ConfigError(
            "reference: missing, give VIRTUAL_imagenet256_labeled.npz or another "
            "(or fp=SAMPLES alone)"
        )
    return None


def open_target(
    options: Options,
    extractor: Extractor,
    layers: dict[str, int],
    size: int,
    stream: Streamer,
) -> Target | None:
    """What samples of `size` pixels are compared with; None if with full precision's only.

    Raises:
        ConfigError, CheckpointError: there is nothing, or it is damaged or of another extractor.
    """
    path = reference_path(options)
    if path is None:
        return None
    kind = options.extractor
    return references.load_target(path, kind, extractor.digest, layers, size, stream)


def compare_with_fp(
    samples: Images,
    summary: Summary,
    options: Options,
    stream: Streamer,
    classifier: fashion.ClassifierExtractor | None,
) -> dict[str, float | None]:
    """fid2fp and the paired figures against the full-precision model's images of the same seeds.

    Raises:
        ConfigError: they are not as many images of the same size and seeds, or it is not known
            which belong together.
    """
    fp = open_images("fp", Path(options.fp))
    if (samples.n, samples.size) != (fp.n, fp.size):
        raise ConfigError(
            f"fp: {fp.path} holds {fp.n} images of {fp.size} pixels, "
            f"the samples are {samples.n} of {samples.size}"
        )
    require_known_pairs(samples, fp)
    metrics: dict[str, float | None] = {}
    if isinstance(samples, ShardImages) and isinstance(fp, ShardImages):
        require_pairs(samples, fp)
        metrics["token_agreement"] = paired.token_agreement(samples.tokens(), fp.tokens())
    moments = Moments()
    for chunk in stream(fp):
        moments.update(chunk["pool"])
    our_chunks = samples.chunks(CHUNK)
    fp_chunks = fp.chunks(CHUNK)
    metrics |= paired.compare_images(our_chunks, fp_chunks, classifier, options.device)
    metrics["fid2fp"] = frechet_distance(summary.pool, moments.value(), "fid2fp")
    return metrics


def require_pairs(samples: ShardImages, fp: ShardImages) -> None:
    """Refuse runs whose images are no pairs.

    Raises:
        ConfigError: their seeds or numbers of classes differ.
    """
    for name in OF_PAIRS:
        ours = samples.manifest.get(name)
        theirs = fp.manifest.get(name)
        if ours != theirs:
            raise ConfigError(f"fp: {name} is {theirs}, of the samples {ours}")


def name_metrics(metrics: Mapping[str, float | None], kind: str) -> dict[str, float | None]:
    """The metrics under their names in tables: those of Lite0's features are `lite0_*`."""
    if kind != "lite0":
        return dict(metrics)
    named = {}
    for name, value in metrics.items():
        named[name if name in OF_IMAGES else f"lite0_{name}"] = value
    return named


def result_path(options: Options) -> Path:
    """Where the result is written: in a folder of `experiments.sample`, else beside the samples."""
    if options.out is not None:
        return Path(options.out)
    samples = Path(options.samples)
    name = f"evaluation-{options.extractor}.json"
    if (samples / "manifest.json").is_file():
        return samples / name
    return samples.with_name(f"{samples.name}-{name}")
