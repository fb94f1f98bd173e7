"""One cell of a table: load a model, quantize it, sample from it, measure it, write its folder.

A cell is identified by the hash of what determines its numbers (`config.identity`). Its folder

    runs/<model>-<method>-<quant>-<calib>-s<seed>-<hash8>/
        config.yaml  metrics.json  quantization.safetensors  features.safetensors  samples.npz  grid.png

and under `mode=int8` the folder `int8`, the export that its images and figures are made with,
is complete when metrics.json is there, and then it is read, not run again. A killed cell continues: images are kept per
micro-batch and what a method trains per block, everything else is computed anew.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from experiments import heldout, integers, provenance, results
from experiments.config import RESULT_VERSION, RunConfig, identity, recipe
from experiments.diagnostics import diagnose
from experiments.memory import PeakMemory
from experiments.sampling import Plan, discard_shards, draw_pool, sample_images, sampled_tokens
from experiments.tracking import Tracker
from models import registry
from models.checkpoints import CheckpointError, digest
from models.preset import Preset
from models.registry import Generator
from ptq import calibration as calib
from ptq.int8.encoding import check
from ptq.modules import QuantLinear
from ptq.pipeline import Report, Track, quantize
from ptq.types import ConfigError

SCHEMA = 1
PAIRS = 16  # images that a tracked run shows beside full precision's
TRAINED = "trained.safetensors"  # blocks that a method has trained, while the cell is not complete
METRICS = (
    "fid", "sfid", "is", "precision", "recall", "fid2fp", "paired_distance", "psnr", "token_agreement", "nll", "kl",
    "agreement",
)


@dataclasses.dataclass
class Cell:
    """A run about to happen (or done): its config, folder, loaded model and device."""

    config: RunConfig
    generator: Generator
    settings: dict[str, object]
    folder: Path
    hash: str
    device: torch.device
    weights: str  # digest of both modules as loaded

    @property
    def identity(self) -> dict[str, object]:
        return identity(self.config, self.weights, self.settings)


def load_model(config: RunConfig, device: torch.device) -> Generator:
    generator = models.load(config.model.name, config.model.weights, config.model.tokenizer_weights, str(device))
    for module in (generator.transformer, generator.tokenizer):
        for name, value in module.named_parameters():  # a buffer may hold -inf: an attention mask
            if not bool(value.isfinite().all()):
                raise CheckpointError(f"weights: {name} contains NaN or infinity, only finite numbers are allowed")
    if config.dtype == "float64":
        generator.transformer.double()
    return generator


def sampler_settings(config: RunConfig, preset: Preset) -> dict[str, object]:
    """The sampler's settings with the user's overrides, each of its default's type.

    Raises:
        ConfigError: the preset has no such sampler or setting, or a value is not allowed.
    """
    defaults = preset.samplers.get(config.sampler.name)
    if defaults is None:
        raise ConfigError(f"sampler: {config.sampler.name!r} is not one of {', '.join(preset.samplers)}")
    for name, value in config.sampler.settings.items():
        if name not in defaults:
            raise ConfigError(f"sampler.settings.{name}: no such setting, allowed are {', '.join(defaults)}")
        kind = type(defaults[name])
        numbers = (int, float) if kind is float else kind
        if not isinstance(value, numbers) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"sampler.settings.{name}: {value!r} is not of type {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"sampler.settings.{name}: {value} is not finite")
        if name == "more_smooth" and value:
            raise ConfigError("sampler.settings.more_smooth: true gives pictures without tokens, allowed is false")
        if name == "temperature" and value <= 0:
            raise ConfigError(f"sampler.settings.temperature: {value} is not positive")
    return {**defaults, **config.sampler.settings}


def device_of(config: RunConfig) -> torch.device:
    """Where a run computes; `auto` is a GPU if there is one.

    Raises:
        ConfigError: there is none but it is asked for.
    """
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(best if config.device == "auto" else config.device)
    if device.type == "cuda" and best == "cpu":
        raise ConfigError("device: cuda is not available here, allowed are auto and cpu")
    return device


def prepare(config: RunConfig) -> Cell:
    """Load the model and work out the identity of the run.

    Raises:
        CheckpointError: weights missing or wrong. ConfigError: the device, a sampler setting or the number of held-out
            sequences is not to be had.
    """
    device = device_of(config)
    generator = load_model(config, device)
    settings = sampler_settings(config, generator.preset)
    heldout.load(generator.preset, config.eval.sequences)
    weights = digest(generator.transformer) + digest(generator.tokenizer)
    key = provenance.digest(identity(config, weights, settings))
    parts = [config.model.name, config.method.name]
    if config.method.quantized:
        parts += [config.quant.name, config.calib.selector]
    folder = Path(config.runs) / f"{'-'.join(parts)}-s{config.seed}-{key}"
    return Cell(config, generator, settings, folder, key, device, weights)


def full_precision(config: RunConfig) -> RunConfig:
    """The config of the full-precision run that a quantized one is compared with."""
    method = dataclasses.replace(config.method, name="fp", quantized=False)
    return dataclasses.replace(config, method=method, mode="simulate")


def run(config: RunConfig, track: Track = lambda it, what: it, wait: bool = True) -> Mapping[str, object]:
    """Run a cell, and before it the full-precision one it is compared with, unless they are done; returns metrics.json.

    Args:
        wait: for another process that runs one of the two, instead of raising `Busy`.

    Raises:
        ConfigError, CheckpointError, NonFiniteError: one line that says what is wrong; no metrics.json is written.
    """
    cell = prepare(config)
    found = results.stored(cell.folder)
    if found is not None:
        return found
    if config.method.quantized:
        run(full_precision(config), track, wait)
    with alone(cell.folder, wait):
        return results.stored(cell.folder) or work(cell, track)


class Busy(RuntimeError):
    """Another process holds a folder's lock."""


@contextmanager
def alone(folder: Path, wait: bool = True) -> Iterator[None]:
    """Make the folder and hold its lock, which the system frees when the process ends.

    Raises:
        Busy: another process holds it and we are not to wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise Busy(f"{folder}: another process is at it") from error
        yield


def work(cell: Cell, track: Track) -> Mapping[str, object]:
    """Do everything of a cell and write its folder, metrics.json last."""
    config = cell.config
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    write_text(cell.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    tags = (config.model.name, config.method.name, config.quant.name if config.method.quantized else "fp32")
    group, started = config.tracker.group or config.model.name, time.perf_counter()
    with Tracker(
        cell.folder, config.tracker.mode, plain, name=cell.folder.name, group=group, tags=tags
    ) as tracker:
        result = measure(cell, track)
        result["cost"]["cell_s"] = round(time.perf_counter() - started, 3)  # of a resumed cell its last part alone
        figures = {k: v for k, v in {**result["metrics"], **result["cost"]}.items() if v is not None}
        tracker.log(figures, step=0)
        tracker.summary({**result["metrics"], **result["cost"]})
        if config.tracker.mode != "none":
            mirror(cell, tracker)
        provenance.write_json(cell.folder / "metrics.json", result)
    discard_shards(cell.folder / "shards")
    (cell.folder / TRAINED).unlink(missing_ok=True)
    return result


def mirror(cell: Cell, tracker: Tracker) -> None:
    """Show what the folder of a finished run holds besides figures: images, beside full precision's, and errors."""
    tracker.image("samples", cell.folder / "grid.png")
    if cell.config.method.quantized:
        plain = prepare(full_precision(cell.config)).folder
        pair = [np.load(folder / "samples.npz")["arr_0"][:PAIRS] for folder in (plain, cell.folder)]
        tracker.pairs("full precision | quantized", np.concatenate(pair, axis=2))
    if (cell.folder / "layers.json").is_file():
        tracker.diagnostics(json.loads((cell.folder / "layers.json").read_text()))


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def measure(cell: Cell, track: Track) -> dict[str, object]:
    """Quantize, sample and evaluate; returns the contents of metrics.json."""
    config, generator = cell.config, cell.generator
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    cost: dict[str, float | None] = {"calibration_s": None, "calibration_peak_mb": None}
    meta: Mapping[str, object] = {}
    reference = load_model(config, cell.device) if config.method.quantized else generator
    exported: int | None = None
    if config.method.quantized:
        report, chosen, spent = calibrate(cell, track, cell.folder / TRAINED)
        cost |= spent
        meta = {**chosen.meta, "fingerprint": calib.fingerprint(chosen)}
        save_tensors(report.tensors, cell.folder / "quantization.safetensors")
        if config.mode == "int8":
            integers.write(cell, report, meta, cell.folder / "int8")
            generator, exported = in_integers(cell, cell.folder / "int8")
    metrics |= held_out(generator, reference, config, cell.device)
    if config.method.quantized and config.tracker.mode != "none":
        found = diagnose(generator, reference, recipe(config))  # last use of the reference, which it may rearrange
        if found is not None:
            provenance.write_json(cell.folder / "layers.json", found)
    resumed = any((cell.folder / "shards").glob("*.npz"))
    started = time.perf_counter()
    plan = Plan(
        config.eval.n, generator.preset.classes, config.seed, config.sampler.microbatch, cell.settings, run=cell.hash
    )
    images = sample_images(generator, plan, cell.folder / "shards", cell.device, track)
    cost["sampling_s"] = None if resumed else round(time.perf_counter() - started, 3)  # of all images or not known
    cost["model_bytes"] = exported or model_bytes(generator.transformer, config)
    metrics |= evaluate(cell, images, plan)
    return {
        "schema": SCHEMA,
        "cell": describe(config), "seed": config.seed, "metrics": metrics, "cost": cost,
        "provenance": {
            "hash": cell.hash, "identity": cell.identity,
            "config": OmegaConf.to_container(OmegaConf.structured(config)), "calibration": meta,
            "sampler_settings": cell.settings, "revision": provenance.revision(),
            "versions": provenance.versions(cell.device), "images": config.eval.n,
            "sequences": config.eval.sequences,
        },
    }


def describe(config: RunConfig) -> dict[str, str | None]:
    """The names by which tables know a cell."""
    quantized = {"quant": config.quant.name, "calib": config.calib.selector, "scope": config.scope.name}
    return {
        "model": config.model.name, "method": config.method.name,
        **(quantized if config.method.quantized else dict.fromkeys(quantized)),
        "sampler": config.sampler.name, "eval": config.eval.name, "mode": config.mode,
    }


def calibrate(
    cell: Cell, track: Track, checkpoint: Path | None = None
) -> tuple[Report, calib.CalibrationSet, dict[str, float]]:
    """Draw the pool, select the calibration set, quantize in place; returns the report, the set and the cost.

    The cost is that of selecting and quantizing; drawing the pool is sampling, and done once for all methods.

    Args:
        checkpoint: file that keeps what is trained, block by block; its folder exists.
    """
    config, generator = cell.config, cell.generator
    if config.mode == "int8":
        check(generator.adapter, recipe(config))
    generator.adapter.layout = config.calib.layout
    pool = calibration_pool(cell, track)
    started = time.perf_counter()
    with PeakMemory(cell.device) as peak:
        chosen = calib.select(
            config.calib.selector, generator.adapter, pool, config.calib.n, config.calib.seed, config.calib.batch
        )
        report = quantize(generator.adapter, chosen, recipe(config), config.calib.batch, track, checkpoint)
    seconds = time.perf_counter() - started
    return report, chosen, {"calibration_s": round(seconds, 3), "calibration_peak_mb": round(peak.megabytes, 1)}


def in_integers(cell: Cell, folder: Path) -> tuple[Generator, int]:
    """Put a fresh model that is loaded from the export in `folder` in the place of the cell's, and return it, and the
    bytes of the export's tensors.

    Raises:
        ConfigError: the export is missing, damaged, or of other weights.
    """
    cell.generator = load_model(cell.config, cell.device)
    export = integers.load(integers.location(folder, cell.config.model.name), cell.generator, cell.weights)
    return cell.generator, export.plain["bytes"]


def calibration_pool(cell: Cell, track: Track) -> calib.Pool:
    """The images that calibration rows are selected from, drawn by the full-precision model once for all methods."""
    config, generator = cell.config, cell.generator
    labels = calib.pool_labels(config.calib.selector, config.calib.n, generator.preset.classes, config.calib.seed)
    key = provenance.digest({
        "weights": digest(generator.transformer), "labels": labels.tolist(), "seed": config.calib.seed,
        "settings": cell.settings, "microbatch": config.sampler.microbatch, "dtype": config.dtype,
        "version": RESULT_VERSION,
    }, 16)
    cache = Path(config.runs) / "cache" / f"pool-{key}.safetensors"
    tokens = draw_pool(
        generator, labels, config.calib.seed, config.sampler.microbatch, cell.settings, cell.device, cache, track
    )
    return calib.Pool(*generator.adapter.rows(tokens, labels.to(cell.device)), labels)


def held_out(generator: Generator, reference: Generator, config: RunConfig, device: torch.device) -> dict[str, float]:
    """NLL, and KL to full precision unless the model is it, on held-out tokens; nothing but for twins.

    Raises:
        NonFiniteError: the model gives NaN or infinity.
    """
    stored = heldout.load(generator.preset, config.eval.sequences)
    if stored is None:
        return {}
    tokens, labels = (stored[k].to(device) for k in ("tokens", "labels"))
    return heldout.score(generator, tokens, labels, config.eval.batch, None if reference is generator else reference)


def evaluate(cell: Cell, images: np.ndarray, plan: Plan) -> dict[str, float]:
    """Image metrics against the training set and against the full-precision images; grid and features on disk."""
    from experiments import extractor, paired
    from experiments.figures import image_grid

    tokens = sampled_tokens(plan, cell.folder / "shards")
    save_images(images, cell.folder / "samples.npz", tokens)
    panels, found = {cell.config.method.name: images}, {}
    fp_folder = prepare(full_precision(cell.config)).folder if cell.config.method.quantized else None
    if fp_folder is not None:
        with np.load(fp_folder / "samples.npz") as stored:
            fp_images, fp_tokens = stored["arr_0"].transpose(0, 3, 1, 2), stored.get("tokens")
        panels = {"fp": fp_images, **panels}
        found["token_agreement"] = paired.token_agreement(tokens, fp_tokens)
    image_grid(panels, cell.folder / "grid.png")
    known = cell.generator.preset.image_size == extractor.SIZE  # to the shipped extractor
    net = extractor.load(registry.ZOO / "extractor.safetensors", cell.device) if known else None
    if fp_folder is not None:
        parts = range(cell.config.eval.batch, plan.images, cell.config.eval.batch)
        found |= paired.compare_images(np.split(images, parts), np.split(fp_images, parts), net, cell.device)
    if plan.images < 2 or net is None:
        return found
    from experiments.metrics import Features, Reference, extract, frechet, image_metrics

    features = extract(torch.from_numpy(images), net, 256, cell.device)
    save_tensors(dataclasses.asdict(features), cell.folder / "features.safetensors")
    found |= image_metrics(features, Reference.load(registry.ZOO / "reference.safetensors", net.digest))
    labels = torch.arange(plan.images) % plan.classes
    found["agreement"] = (features.logits.argmax(dim=1) == labels).double().mean().item()
    if fp_folder is not None:
        found["fid2fp"] = frechet(features, Features(**load_file(fp_folder / "features.safetensors")))
    return found


def save_images(images: np.ndarray, path: Path, tokens: np.ndarray | None) -> None:
    """uint8 images (N, 3, S, S) as `arr_0` (N, S, S, 3) of an npz, as the ADM evaluator reads them, and `tokens`."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with temporary.open("wb") as file:
        np.savez(file, arr_0=images.transpose(0, 2, 3, 1), **({} if tokens is None else {"tokens": tokens}))
    os.replace(temporary, path)


def model_bytes(transformer: torch.nn.Module, config: RunConfig) -> int:
    """Bytes of the transformer at rest.

    Codes at their bit width, 8 bytes per scale and zero point, 2 per number of a low-rank branch (whose `down` linears
    of one site share), the rest as it is, online transforms included.
    """
    total, counted = 0, set()
    for module in transformer.modules():
        if isinstance(module, QuantLinear):
            counted.add(module.weight.data_ptr())
            total += module.weight.numel() * config.quant.weights.bits // 8 + 8 * len(module.weight_params.scale)
            for part in (module.down, module.up):
                if part is not None and part.data_ptr() not in counted:
                    counted.add(part.data_ptr())
                    total += 2 * part.numel()
    rest = [p for p in (*transformer.parameters(), *transformer.buffers()) if p.data_ptr() not in counted]
    return total + sum(p.numel() * p.element_size() for p in rest)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary)
    os.replace(temporary, path)
