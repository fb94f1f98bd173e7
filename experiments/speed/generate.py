"""Whole generation of images with KV cache and guidance, from FP32 to INT8: tokens only.

    python -m experiments.speed what=generate model=rar_b
    python -m experiments.speed what=generate model=var_d16 batch=50 variants=[fp32,bf16] repeats=5

    batch     images at a time (100)
    variants  which to compare, all by default
    repeats   timed generations of each (3), after one that compiles and captures

On a GPU the blocks of VAR, RAR and PAR are compiled and every decoding step is replayed from a CUDA
graph (`models/decoding/decoder.py`), whatever the arithmetic; MAR, whose sequences change their
length, runs as it is. The sampler is the authors' (`sampler=official`) with its guidance.
`simulated` rounds in FP32 as runs do, at W6A6 with both attention products (`scope=paper`). The
INT8 variants are those of `what=blocks`, of which `int8_stwq_paper` keeps keys and values as codes
of one byte. Weights are random, of true shape.

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

from experiments.images.microbatches import compile_steps
from experiments.run.preparation import sampler_settings
from experiments.speed import variants
from experiments.speed.options import GenerateOptions
from experiments.speed.timing import occupied_bytes, wait_for_device
from experiments.speed.variants import (
    Setup,
    Variant,
    convert_model,
    matmul_precision,
    module_bytes,
    prepare_variants,
)
from experiments.store.files import require_writable, write_json
from models.registry import Generator, TokenGenerator

OF_BLOCKS = (
    "fp32",
    "tf32",
    "bf16",
    "int8",
    "int8_stwq",
    "int8_stwq_all",
    "int8_stwq_paper",
    "int8_staq_paper",
)
AS_RUNS_DO = ("method=ptq4arvg", "quant=w6a6", "scope=paper")
VARIANTS = {name: variants.VARIANTS[name] for name in OF_BLOCKS}
VARIANTS["simulated"] = Variant("simulate", dtype=torch.float32, recipe=AS_RUNS_DO)


@torch.no_grad()
def measure_variant(setup: Setup, name: str, options: GenerateOptions) -> dict[str, Any]:
    """Seconds of every generation but the first, which compiles and captures, and peak memory."""
    device = setup.device
    variant = VARIANTS[name]
    bytes_before = occupied_bytes(device)  # of the model that copies are made of
    generator = convert_generator(setup, name)
    if isinstance(generator, TokenGenerator) and device.type == "cuda":  # MAR runs as it is
        compile_steps(generator)
    with matmul_precision(variant.tf32):
        seconds = time_generations(generator, setup, options)
    peak = None
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - bytes_before
    median = statistics.median(seconds)
    return {
        "variant": name,
        "seconds": round(median, 4),
        "all_seconds": [round(value, 4) for value in seconds],
        "images_per_s": round(options.batch / median, 2),
        "peak_mb": None if peak is None else round(peak / 2**20, 1),
        "model_mb": round(module_bytes([generator.transformer]) / 2**20, 1),
    }


def convert_generator(setup: Setup, name: str) -> Generator:
    """A copy of the generator with a transformer in the variant's arithmetic."""
    generator = copy.copy(setup.generator)  # shares the tokenizer
    generator.adapter = copy.deepcopy(setup.generator.adapter)
    generator.transformer = generator.adapter.model
    convert_model(generator.adapter, VARIANTS[name], setup.rows, setup.configs[name])
    return generator


def time_generations(generator: Generator, setup: Setup, options: GenerateOptions) -> list[float]:
    """Seconds of each of the timed generations; one that is not timed goes ahead."""
    device = setup.device
    labels = torch.arange(options.batch, device=device) % generator.preset.classes  # (B,)
    sampler = sampler_settings(setup.config, generator.preset)
    index = torch.arange(options.batch)  # (B,): which random numbers an image gets
    generator.sample(labels, 0, index, sampler)  # compiles and captures
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # compiling may take more than sampling
    seconds: list[float] = []
    for repeat in range(options.repeats):
        wait_for_device(device)
        started = time.perf_counter()
        generator.sample(labels, repeat + 1, index, sampler)
        wait_for_device(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def print_line(line: dict[str, Any]) -> None:
    """A variant's line on the terminal."""
    peak = "-" if line["peak_mb"] is None else f"{line['peak_mb']:.0f}"
    speed = f"{line['seconds']:12.3f}{line['images_per_s']:10.1f}"
    print(f"{line['variant']:20}{speed}{peak:>12}{line['model_mb']:13.1f}", flush=True)


def measure_generation(
    options: GenerateOptions, overrides: list[str]
) -> tuple[dict[str, Any], Path]:
    """Measure all variants; the report, and where it is written.

    Raises:
        ConfigError, CheckpointError: nothing can be measured.
    """
    setup = prepare_variants({name: VARIANTS[name] for name in options.variants}, overrides)
    generator = setup.generator
    generator.tokenizer.requires_grad_(False)
    report = setup.report("generate", rows=options.batch, repeats=options.repeats)
    report |= {
        "lines": [],
        "sampler_settings": sampler_settings(setup.config, generator.preset),
        "model_mb": round(module_bytes([generator.transformer]) / 2**20, 1),
    }
    model = setup.config.model.name
    path = Path(setup.config.runs) / "speed" / f"generate-{model}-{setup.device.type}.json"
    require_writable(path, "runs")
    print(f"{'variant':20}{'median [s]':>12}{'images/s':>10}{'peak [MiB]':>12}{'model [MiB]':>13}")
    for name in options.variants:
        line = measure_variant(setup, name, options)
        report["lines"].append(line)
        print_line(line)
        gc.collect()  # frees the variant's model before the next is built
        write_json(path, report)
    return report, path
