"""Evaluate sampled images as OpenAI's ADM evaluator does.

    python -m experiments.evaluate samples=SAMPLES reference=VIRTUAL_imagenet256_labeled.npz
    weights=WEIGHTS python -m experiments.evaluate samples=SAMPLES extractor=fashion

SAMPLES is a folder of PNG files, an npz with `arr_0`, or a folder of `experiments.sample`: see
`experiments/images/image_sets.py`.

    extractor=inception   inception, fashion (the shipped classifier, 32 pixels) or lite0 (requirements-extra.txt)
    weights=FILE          of Inception, as torch-fidelity publishes them; default: where torch-fidelity keeps them
    reference=FILE        see `experiments/evaluate/references.py`; default for fashion: its training set's statistics
    fp=SAMPLES            the full-precision model's images of the same seeds: fid2fp, psnr, token_agreement, ...
    n=N                   refuse samples of another number
    prc_dtype=float32     float16 compares distances for precision and recall as ADM does; float64
    batch=50 device=auto  images per forward pass; auto, cpu or cuda
    cache=FOLDER          where features are kept, default runs/cache/features
    out=FILE              the result, in the format of a run's metrics.json; default: beside the samples

Figures of Lite0 are called `lite0_*`. A metric that cannot be had is null, and `provenance.lacking`
says why.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config.compose import explain_refusal
from experiments.evaluate import adm, paired, references
from experiments.evaluate.extractors import fashion
from experiments.evaluate.features import CHUNK, Extractor, Stream
from experiments.evaluate.precision_recall import DTYPES
from experiments.evaluate.small_images import frechet_distance
from experiments.images.image_sets import Images, ShardImages, open_images
from experiments.store import files, provenance
from experiments.store.results import RESULT_VERSION
from models.registry import ZOO
from models.weights.checkpoints import CheckpointError
from ptq.types import ConfigError, require

EXTRACTORS = ("inception", "fashion", "lite0")
SCHEMA = 1
METRICS = (
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


@dataclass
class Options:
    samples: str = MISSING
    reference: str | None = None
    extractor: str = "inception"
    weights: str | None = None
    fp: str | None = None
    n: int | None = None
    prc_dtype: str = "float32"
    batch: int = 50
    device: str = "auto"
    cache: str = "runs/cache/features"
    out: str | None = None


def parse(arguments: list[str]) -> Options:
    """The options of a command line.

    Raises:
        ConfigError: an unknown option, a value of the wrong type or one that is not allowed.
    """
    bare = [a for a in arguments if "=" not in a]
    if bare:
        raise ConfigError(f"{bare[0]}: expected options such as samples=FOLDER")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Options), OmegaConf.from_dotlist(arguments))
        if OmegaConf.is_missing(merged, "samples"):
            raise ConfigError("samples: missing, give the path of images")
        options = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_refusal(error)) from error
    require("extractor", options.extractor, EXTRACTORS)
    require("prc_dtype", options.prc_dtype, tuple(DTYPES))
    require("device", options.device, ("auto", "cpu", "cuda"))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is not available here, allowed are auto and cpu")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def load_extractor(options: Options) -> tuple[Extractor, dict[str, int]]:
    """The network that the options name, and the length of each of its layers.

    Raises:
        CheckpointError: its weights are missing, damaged or of another network.
    """
    if options.extractor == "fashion":
        weights = (
            ZOO / "extractor.safetensors" if options.weights is None else Path(options.weights)
        )
        return fashion.load_classifier(weights, options.device), fashion.LAYERS
    if options.extractor == "lite0":
        from experiments.evaluate.extractors import lite0 as network
    else:
        from experiments.evaluate.extractors import inception as network
    return network.load_inception(options.weights, options.device), network.LAYERS


def evaluate_samples(options: Options, progress: bool = False) -> dict[str, object]:
    """The result of an evaluation, in the format of metrics.json; `progress` shows bars.

    Raises:
        ConfigError, CheckpointError: one line that says what is wrong with samples, reference or
            weights.
    """
    started = time.perf_counter()
    samples = open_images("samples", Path(options.samples))
    if options.n is not None and samples.n != options.n:
        raise ConfigError(f"n: {samples.path} holds {samples.n} images, expected {options.n}")
    net, layers = load_extractor(options)

    def stream(images: Images) -> Stream:
        return Stream(
            images,
            net,
            options.extractor,
            Path(options.cache),
            options.batch,
            options.device,
            progress,
        )

    target = None
    if reference_path(options) is not None:
        target = references.load_target(
            reference_path(options), options.extractor, net.digest, layers, samples.size, stream
        )
    source = stream(samples)
    summary = adm.summarize_stream(
        source, samples.n, None if options.extractor == "fashion" else adm.SPLIT
    )
    found: dict[str, float | None] = {**dict.fromkeys(METRICS), **summary.scores}
    lacking = {} if target is None else dict(target.lacking)
    if target is not None:
        found |= adm.score_summary(summary, target, DTYPES[options.prc_dtype], options.device)
    manifest = samples.manifest if isinstance(samples, ShardImages) else {}
    if manifest and options.extractor == "fashion":
        labels = torch.arange(samples.n) % manifest["classes"]
        found["agreement"] = (summary.predicted == labels).double().mean().item()
    if options.fp is not None:
        found |= compare_with_fp(
            samples, summary, open_images("fp", Path(options.fp)), stream, options, net
        )
    return {
        "schema": SCHEMA,
        "cell": manifest.get("cell"),
        "seed": manifest.get("seed"),
        "metrics": name_metrics(found, options.extractor),
        "cost": {"evaluation_s": round(time.perf_counter() - started, 1)},
        "provenance": {
            "hash": manifest.get("run"),
            **manifest.get("provenance", {}),
            "images": samples.n,
            "samples": source.digest,
            "rounding": manifest.get("rounding"),
            "evaluator": {
                "extractor": options.extractor,
                "weights": net.digest,
                "prc_dtype": options.prc_dtype,
                "reference": None if target is None else dict(target.origin),
                "version": RESULT_VERSION,
            },
            "lacking": lacking,
            "sampled_on": manifest.get("provenance", {}).get("versions"),
            "versions": provenance.package_versions(torch.device(options.device)),
            "revision": provenance.code_revision(),
        },
    }


def reference_path(options: Options) -> Path | None:
    """The path of the reference; None if samples are compared with the full-precision model's only.

    Raises:
        ConfigError: there is nothing to compare with.
    """
    if options.reference is not None:
        return Path(options.reference)
    if options.extractor == "fashion":
        return ZOO / "reference.safetensors"
    if options.fp is None:
        raise ConfigError(
            "reference: missing, give VIRTUAL_imagenet256_labeled.npz or another (or fp=SAMPLES alone)"
        )
    return None


def compare_with_fp(
    samples: Images,
    summary: adm.Summary,
    fp: Images,
    stream: references.Streamer,
    options: Options,
    net: Extractor,
) -> dict[str, float | None]:
    """fid2fp and the paired figures against the full-precision model's images of the same seeds.

    Raises:
        ConfigError: they are not as many images of the same size and seeds.
    """
    if (samples.n, samples.size) != (fp.n, fp.size):
        raise ConfigError(
            f"fp: {fp.path} holds {fp.n} images of {fp.size} pixels, the samples are {samples.n} of {samples.size}"
        )
    found: dict[str, float | None] = {}
    if isinstance(samples, ShardImages) and isinstance(fp, ShardImages):
        for name in ("seed", "classes"):
            if samples.manifest[name] != fp.manifest[name]:
                raise ConfigError(
                    f"fp: {name} is {fp.manifest[name]}, of the samples {samples.manifest[name]}"
                )
        found["token_agreement"] = paired.token_agreement(samples.tokens(), fp.tokens())
    moments = adm.Moments()
    for chunk in stream(fp):
        moments.update(chunk["pool"])
    known = net if options.extractor == "fashion" else None
    found |= paired.compare_images(samples.chunks(CHUNK), fp.chunks(CHUNK), known, options.device)
    return found | {"fid2fp": frechet_distance(summary.pool, moments.value(), "fid2fp")}


def name_metrics(found: Mapping[str, float | None], kind: str) -> dict[str, float | None]:
    """The metrics under their names in tables: those of Lite0's features are `lite0_*`."""
    prefix = "lite0_" if kind == "lite0" else ""
    return {name if name in OF_IMAGES else prefix + name: value for name, value in found.items()}


def result_path(options: Options) -> Path:
    """Where the result is written: inside a folder of `experiments.sample`, else beside the
    samples."""
    if options.out is not None:
        return Path(options.out)
    samples = Path(options.samples)
    name = f"evaluation-{options.extractor}.json"
    return (
        samples / name
        if (samples / "manifest.json").is_file()
        else samples.with_name(f"{samples.name}-{name}")
    )


def main() -> None:
    try:
        options = parse(sys.argv[1:])
        result = evaluate_samples(options, progress=True)
        files.write_json(result_path(options), result)
    except (ConfigError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: out: {result_path(options)} cannot be written ({error.strerror})")
    origin = result["provenance"]
    print(f"{origin['images']} images, {options.extractor} {origin['evaluator']['weights']}")
    for name, value in result["metrics"].items():
        if value is not None:
            print(f"  {name:20} {value:.6g}")
    for name, reason in origin["lacking"].items():
        print(f"  {name:20} not computed: {reason}")
    print(f"result: {result_path(options)}")


if __name__ == "__main__":
    main()
