"""Whole generation of a batch of images with KV cache and guidance, in FP32 to INT8: tokens only,
no tokenizer.

    python -m experiments.speed what=generate model=rar_b python -m experiments.speed what=generate
    model=var_d16 batch=50 variants=[fp32,bf16,int8_stwq] repeats=5

    batch     images at a time (100)                variants  which to compare, all by default
    repeats   timed generations of each (3), after one that compiles and captures

On a GPU the blocks of VAR, RAR and PAR are compiled and every decoding step is replayed from a CUDA
graph (`models/decoding/decoder.py`), whatever the arithmetic; MAR, whose sequences change their
length, runs as it is. The sampler is the authors' (`sampler=official`) with its guidance.
`simulated` rounds in FP32 as runs do, at W6A6 with both attention products (`scope=paper`); INT8
variants are those of `what=blocks`, of which `int8_stwq_paper` keeps keys and values as codes of
one byte. Weights are random, of true shape.

`peak_mb` is what generating takes at most: weights, activations, keys and values.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from experiments.config.compose import configure
from experiments.config.schema import RunConfig
from experiments.images.microbatches import compile_steps
from experiments.run.preparation import choose_device, sampler_settings
from experiments.speed import blocks, random_models
from experiments.speed.blocks import Variant
from experiments.speed.options import GenerateOptions
from experiments.speed.timing import occupied, synchronize
from experiments.store.files import write_json
from experiments.store.provenance import code_revision, package_versions
from models.registry import Generator, TokenGenerator
from ptq import calibration as calib

SCHEMA = 1
VARIANTS = {
    **{
        name: blocks.VARIANTS[name]
        for name in (
            "fp32",
            "tf32",
            "bf16",
            "int8",
            "int8_stwq",
            "int8_stwq_all",
            "int8_stwq_paper",
        )
    },
    "simulated": Variant(
        "simulate", torch.float32, ("method=ptq4arvg", "quant=w6a6", "scope=paper")
    ),
}


@torch.no_grad()
def measure(
    base: Generator,
    variant: Variant,
    rows: calib.CalibrationSet,
    config: RunConfig,
    options: GenerateOptions,
    device: torch.device,
) -> dict[str, Any]:
    """Seconds of every generation but the first, which compiles and captures, and the highest
    memory."""
    before = occupied(device)
    generator = copy.copy(base)
    adapter = copy.deepcopy(base.adapter)
    generator.adapter = adapter
    generator.transformer = adapter.model
    blocks.convert(adapter, variant, rows, config)
    if isinstance(generator, TokenGenerator) and device.type == "cuda":
        compile_steps(generator)
    labels = torch.arange(options.batch, device=device) % generator.preset.classes
    chosen = sampler_settings(config, generator.preset)
    index = torch.arange(options.batch)
    seconds: list[float] = []
    with blocks.matmul_precision(variant.tf32):
        generator.sample(labels, 0, index, chosen)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for repeat in range(options.repeats):
            synchronize(device)
            started = time.perf_counter()
            generator.sample(labels, repeat + 1, index, chosen)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    return {
        "seconds": round(statistics.median(seconds), 4),
        "all_seconds": [round(s, 4) for s in seconds],
        "images_per_s": round(options.batch / statistics.median(seconds), 2),
        "peak_mb": None if peak is None else round(peak / 2**20, 1),
        "model_mb": round(blocks.size([generator.transformer]) / 2**20, 1),
    }


def run(options: GenerateOptions, overrides: list[str]) -> tuple[dict[str, Any], Path]:
    """Measure all variants; the report, and where it is written.

    Raises:
        ConfigError, CheckpointError: nothing can be measured.
    """
    configs = {
        name: configure(blocks.own_overrides(VARIANTS[name], overrides))
        for name in options.variants
    }
    first = next(iter(configs.values()))
    device = choose_device(first)
    generator, made_up = random_models.load(first, device)
    generator.tokenizer.requires_grad_(False)
    rows = calib.select_rows(
        first.calib.selector,
        generator.adapter,
        random_models.pool(generator, first.calib.n, device),
        first.calib.n,
        first.calib.seed,
        first.calib.batch,
    )
    lines: list[dict[str, Any]] = []
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "what": "generate",
        "model": first.model.name,
        "weights": "random" if made_up else "loaded",
        "quant": first.quant.name,
        "rows": options.batch,
        "repeats": options.repeats,
        "versions": package_versions(device),
        "threads": torch.get_num_threads(),
        "revision": code_revision(),
        "lines": lines,
        "sampler_settings": sampler_settings(first, generator.preset),
        "model_mb": round(blocks.size([generator.transformer]) / 2**20, 1),
    }
    path = Path(first.runs) / "speed" / f"generate-{first.model.name}-{device.type}.json"
    print(f"{'variant':20}{'median [s]':>12}{'images/s':>10}{'peak [MiB]':>12}{'model [MiB]':>13}")
    for name, config in configs.items():
        lines.append(
            {"variant": name, **measure(generator, VARIANTS[name], rows, config, options, device)}
        )
        found = lines[-1]
        peak = "-" if found["peak_mb"] is None else f"{found['peak_mb']:.0f}"
        print(
            f"{name:20}{found['seconds']:12.3f}{found['images_per_s']:10.1f}{peak:>12}{found['model_mb']:13.1f}",
            flush=True,
        )
        gc.collect()
        write_json(path, report)
    return report, path
