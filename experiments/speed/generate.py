"""Whole generation of images with KV cache and guidance, from FP32 to INT8: tokens only.

    python -m experiments.speed what=generate model=rar_b
    python -m experiments.speed what=generate model=var_d16 batch=[1,16,100] variants=[fp32,bf16]

    batch     images at a time (100); several numbers are measured one after the other
    variants  which to compare, all by default
    repeats   timed generations of each (3), after one that compiles and captures
    baseline  folder of a checkout of a former revision: every generation is timed in turn with one
              of its BF16 (`baseline.py`)

On a GPU the blocks of models with token ids (all but MAR) are compiled and every decoding step is
replayed from a CUDA graph (`models/decoding/decoder.py`), whatever the arithmetic. RAR and VAR in
INT8 are not compiled: their blocks run by kernels of their own (`ptq/int8/blocks`), and so do RAR's
steps of one token (`ptq/int8/steps`). MAR, whose sequences change their length, runs as it is.
The sampler is the authors' (`sampler=official`) with its guidance. `simulated`
rounds in FP32 as runs do, at W6A6 with both attention products (`scope=paper`). The INT8 variants
are those of `what=blocks`, of which `int8_stwq_paper` and `int8_staq_paper` keep keys and values as
codes of one byte. Weights are random, of true shape.

`peak_mb` is what generating takes at most: weights, activations, keys and values. `first_s` are the
seconds of the generation ahead, most of them of the compiler: they count once a process.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.images.microbatches import compile_steps
from experiments.run.preparation import sampler_settings
from experiments.speed import variants
from experiments.speed.baseline import Baseline, compare_with_baseline, start_baseline
from experiments.speed.options import GENERATE_VARIANTS, GenerateOptions
from experiments.speed.timing import occupied_bytes, wait_for_device
from experiments.speed.variants import (
    Setup,
    Variant,
    convert_copy,
    matmul_precision,
    module_bytes,
    prepare_variants,
)
from experiments.store.files import require_writable, write_json
from models.registry import Generator, TokenGenerator

AS_RUNS_DO = ("method=ptq4arvg", "quant=w6a6", "scope=paper")
VARIANTS = {name: variants.VARIANTS[name] for name in GENERATE_VARIANTS}
VARIANTS["simulated"] = Variant("simulate", dtype=torch.float32, recipe=AS_RUNS_DO)


@torch.no_grad()
def measure_variant(
    setup: Setup, name: str, options: GenerateOptions, baseline: Baseline | None
) -> Iterator[dict[str, Any]]:
    """A line for every number of images: seconds of all generations but the first, and memory."""
    device = setup.device
    bytes_before = occupied_bytes(device)  # of the model that copies are made of
    generator = convert_generator(setup, name)
    for batch in options.batch:
        if isinstance(generator, TokenGenerator) and device.type == "cuda":  # MAR runs as it is
            # anew for each number of images: the compiler would make kernels for any number
            compile_steps(generator)
        with matmul_precision(VARIANTS[name].tf32):
            times = time_generations(generator, setup, batch, options.repeats, baseline)
        peak = None
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) - bytes_before
        median = statistics.median(times.ours)
        line = {
            "variant": name,
            "batch": batch,
            "seconds": round(median, 4),
            "all_seconds": [round(value, 4) for value in times.ours],
            "first_s": round(times.first, 2),
            "images_per_s": round(batch / median, 2),
            "peak_mb": None if peak is None else round(peak / 2**20, 1),
            "model_mb": round(module_bytes([generator.transformer]) / 2**20, 1),
            **compare_with_baseline(times.ours, times.baseline),
        }
        if baseline is not None:
            line["baseline_peak_mb"] = baseline.ask(peak=True)["peak_mb"]
        yield line


def convert_generator(setup: Setup, name: str) -> Generator:
    """A copy of the generator with a transformer in the variant's arithmetic."""
    return convert_copy(setup, VARIANTS[name], setup.configs[name])


@dataclass(frozen=True)
class Times:
    """Seconds of generations.

    Attributes:
        first: of the one that compiles and captures.
        ours: of those that count. baseline: of those of a baseline, in turn with them.
    """

    first: float
    ours: list[float]
    baseline: list[float]


def time_generations(
    generator: Generator, setup: Setup, batch: int, repeats: int, baseline: Baseline | None
) -> Times:
    """Seconds of each of the timed generations; one that is not timed goes ahead."""
    device = setup.device
    labels = torch.arange(batch, device=device) % generator.preset.classes  # (B,)
    sampler = sampler_settings(setup.config, generator.preset)
    index = torch.arange(batch)  # (B,): which random numbers an image gets

    def generate_once(seed: int) -> float:
        wait_for_device(device)
        started = time.perf_counter()
        generator.sample(labels, seed, index, sampler)
        wait_for_device(device)
        return time.perf_counter() - started

    if baseline is not None:
        baseline.prepare(batch=batch)
    first = generate_once(0)  # compiles and captures
    if baseline is not None:
        baseline.wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # compiling may take more than sampling
    ours: list[float] = []
    theirs: list[float] = []
    for seed in range(1, repeats + 1):
        ours.append(generate_once(seed))
        if baseline is not None:
            theirs.append(baseline.time_once(seed))
    return Times(first, ours, theirs)


def print_line(line: dict[str, Any]) -> None:
    """A variant's line on the terminal."""
    peak = "-" if line["peak_mb"] is None else f"{line['peak_mb']:.0f}"
    speed = f"{line['batch']:7}{line['seconds']:12.4f}{line['images_per_s']:10.1f}"
    gain = f"{line['speedup']:11.3f}" if "speedup" in line else ""
    print(f"{line['variant']:20}{speed}{peak:>12}{line['model_mb']:13.1f}{gain}", flush=True)


def measure_generation(
    options: GenerateOptions, overrides: list[str]
) -> tuple[dict[str, Any], Path]:
    """Measure all variants; the report, and where it is written.

    Raises:
        ConfigError, CheckpointError: nothing can be measured.
    """
    with start_baseline(options.baseline, "generate", overrides) as baseline:
        return measure_beside(baseline, options, overrides)


def measure_beside(
    baseline: Baseline | None, options: GenerateOptions, overrides: list[str]
) -> tuple[dict[str, Any], Path]:
    """`measure_generation`, timed in turn with a baseline if there is one."""
    setup = prepare_variants({name: VARIANTS[name] for name in options.variants}, overrides)
    generator = setup.generator
    generator.tokenizer.requires_grad_(False)
    report = setup.report("generate", rows=max(options.batch), repeats=options.repeats)
    report |= {
        "lines": [],
        "sampler_settings": sampler_settings(setup.config, generator.preset),
        "model_mb": round(module_bytes([generator.transformer]) / 2**20, 1),
    }
    model = setup.config.model.name
    path = Path(setup.config.runs) / "speed" / f"generate-{model}-{setup.device.type}.json"
    require_writable(path, "runs")
    sizes = f"{'peak [MiB]':>12}{'model [MiB]':>13}"
    print(f"{'variant':20}{'images':>7}{'median [s]':>12}{'images/s':>10}{sizes}")
    for name in options.variants:
        for line in measure_variant(setup, name, options, baseline):
            report["lines"].append(line)
            if baseline is not None:
                report["baseline"] = baseline.describe()
            print_line(line)
            write_json(path, report)
        gc.collect()  # frees the variant's model before the next is built
    return report, path
