"""A micro-batch of images as runs make it, tokens and pixels, in full precision and simulated.

    python -m experiments.speed what=sample model=rar_b
    python -m experiments.speed what=sample model=mar_b variants=[fp32] batch=[16,128]

    batch     images of a micro-batch (128, as `sampler.microbatch`)
    variants  full precision; simulated at W6A6 with static ranges of tokens; with dynamic ranges
    ways      kernels are started one by one (eager), as for few images; or replayed from CUDA
              graphs, as runs of eight micro-batches or more do

Nothing is compiled, as in a run without `sampler.compiled`. `tokens_s` and `pixels_s` are seconds
of the transformer and of the tokenizer; `first_s` those of the micro-batch that records the graphs.
`peak_mb` is all memory that was allocated on the GPU, or the process's on a CPU, a quantized model
with the full-precision one beside it, as in a run.

What `dry_run=true` of `experiments.table` estimates on this machine stands on such reports, where
there are some (`experiments/estimate/costs.py`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from experiments.images.microbatches import WORTH_CAPTURING, replayed_steps
from experiments.run.peak_memory import PeakMemory
from experiments.run.preparation import sampler_settings
from experiments.speed.options import SampleOptions
from experiments.speed.timing import wait_for_device
from experiments.speed.variants import Setup, Variant, convert_copy, prepare_variants
from experiments.store.files import require_writable, write_json
from models.registry import Generator, TokenGenerator

VARIANTS = {
    "fp32": Variant(dtype=torch.float32),
    "static": Variant("simulate", dtype=torch.float32, recipe=("method=sq_stwq",)),
    "dynamic": Variant("simulate", dtype=torch.float32, recipe=("method=rtn_dynamic",)),
}


@torch.no_grad()
def measure_variant(setup: Setup, name: str, options: SampleOptions) -> Iterator[dict[str, Any]]:
    """A line for every way and number of images."""
    generator = setup.generator  # full precision has no copy of it beside it
    if VARIANTS[name].kind != "float":
        generator = convert_copy(setup, VARIANTS[name], setup.configs[name])
    warm_up(setup, generator)
    for way in options.ways:
        if way == "replayed" and not may_replay(setup, generator):
            continue
        for batch in options.batch:
            yield {"variant": name, "way": way, **time_batch(setup, generator, way, batch)}


def may_replay(setup: Setup, generator: Generator) -> bool:
    """Whether decoding steps can be replayed from CUDA graphs."""
    return setup.device.type == "cuda" and isinstance(generator, TokenGenerator)


def warm_up(setup: Setup, generator: Generator) -> None:
    """One pass and one picture, which load what the device needs."""
    generator.adapter.forward(setup.rows.batches(2)[0])
    generator.decode(draw_tokens(setup, generator, 1))
    wait_for_device(setup.device)


def draw_tokens(setup: Setup, generator: Generator, batch: int) -> torch.Tensor:
    """Tokens (B, T), or (B, T, D) of MAR, of the first classes."""
    labels = torch.arange(batch, device=setup.device) % generator.preset.classes  # (B,)
    settings = sampler_settings(setup.config, generator.preset)
    return generator.sample(labels, 0, torch.arange(batch), settings)


def time_batch(setup: Setup, generator: Generator, way: str, batch: int) -> dict[str, Any]:
    """Seconds and memory of a micro-batch."""
    device = setup.device
    size = generator.preset.eval_size
    first_s = None
    replayed = way == "replayed"
    graphs = replayed_steps(generator, device, WORTH_CAPTURING) if replayed else nullcontext()
    with PeakMemory(device) as peak, graphs:
        started = time.perf_counter()
        if replayed:
            draw_tokens(setup, generator, batch)
            wait_for_device(device)
            first_s = round(time.perf_counter() - started, 3)
            started = time.perf_counter()
        tokens = draw_tokens(setup, generator, batch)
        wait_for_device(device)
        tokens_s = time.perf_counter() - started
        started = time.perf_counter()
        generator.decode(tokens, **({} if size is None else {"size": size}))
        wait_for_device(device)
        pixels_s = time.perf_counter() - started
    return {
        "batch": batch,
        "tokens_s": round(tokens_s, 4),
        "pixels_s": round(pixels_s, 4),
        "first_s": first_s,
        "images_per_s": round(batch / (tokens_s + pixels_s), 3),
        "peak_mb": round(peak.megabytes, 1),
    }


def print_line(line: dict[str, Any]) -> None:
    """A line on the terminal."""
    first = "-" if line["first_s"] is None else f"{line['first_s']:.1f}"
    seconds = f"{line['tokens_s']:12.3f}{line['pixels_s']:12.3f}{first:>12}"
    name = f"{line['variant']:10}{line['way']:10}"
    memory = f"{line['images_per_s']:12.2f}{line['peak_mb']:12.0f}"
    print(f"{name}{line['batch']:7}{seconds}{memory}", flush=True)


def measure_sampling(options: SampleOptions, overrides: list[str]) -> tuple[dict[str, Any], Path]:
    """Measure all variants; the report, and where it is written.

    Raises:
        ConfigError, CheckpointError: nothing can be measured.
    """
    setup = prepare_variants({name: VARIANTS[name] for name in options.variants}, overrides)
    generator = setup.generator
    generator.tokenizer.requires_grad_(False)
    weights = sum(parameter.nbytes for parameter in generator.transformer.parameters())
    report = setup.report("sample", rows=max(options.batch))
    report |= {
        "lines": [],
        "sampler_settings": sampler_settings(setup.config, generator.preset),
        "model_mb": round(weights / 2**20, 1),
    }
    name = f"sample-{setup.config.model.name}-{setup.device.type}.json"
    path = Path(setup.config.runs) / "speed" / name
    require_writable(path, "runs")
    seconds = f"{'tokens [s]':>12}{'pixels [s]':>12}{'first [s]':>12}"
    print(f"{'variant':10}{'way':10}{'images':>7}{seconds}{'images/s':>12}{'peak [MiB]':>12}")
    for name in options.variants:
        for line in measure_variant(setup, name, options):
            report["lines"].append(line)
            print_line(line)
            write_json(path, report)
        gc.collect()  # frees the variant's model before the next is built
    return report, path
