"""A forward pass of all transformer blocks on rows (batch, L, C): the paper's Figure 7, Table 12.

    python -m experiments.speed what=blocks model=rar_l
    python -m experiments.speed what=blocks model=var_d20 lengths=[256] variants=[fp32] rounds=50

    batch     rows (100, as in the paper)
    lengths   tokens L of a row ([64,128,256], as in the paper)
    variants  which to compare, all by default (`variants.py`)
    rounds    timings of each, in alternation
    profile   list the kernels that take the most time, variant by variant, at the longest L
    baseline  folder of a checkout of a former revision, whose BF16 takes turns with the variants
              (`baseline.py`)

Every variant but `bf16_eager` is compiled block by block, and all are replayed as one CUDA graph,
so neither Python nor launches decide; on a CPU nothing is compiled. Attention of RAR and PAR is
causal, without a mask tensor. INT8 and FP8 keep all that is no linear layer in BF16. Blocks of VAR,
RAR and MAR in INT8 whose scales are static are run by a few kernels each, which leave the compiler
nothing to do, and each adds what the one before it has left (`ptq/int8/blocks`).
Without a `scope` the linear layers of the blocks are quantized (qkv, proj, fc1, fc2).
`int8_stwq_all` adds the AdaLN projections, and `int8_stwq_paper` (`scope=paper`) also both
attention products, keys and values as codes (`ptq/int8/attention.py`): one kernel that passes the
keys twice. A weight is rounded after the softmax of its whole row, which no online softmax (the
fused attention of the other variants) has in time. `int8_staq` and `int8_staq_paper` are the same
for STAQ (`ptq/int8/numerators.py`).

Weights are random, of true shape: speed does not depend on their values, and quality is not claimed
from them. Activation scales come from `calib.n` random rows.

`peak_mb` is what one pass takes on top of what was there: weights of the model (embeddings and head
included), activations. `model_mb` are the bytes of the blocks alone.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.config.schema import RunConfig
from experiments.speed.baseline import Baseline, compare_with_baseline, start_baseline
from experiments.speed.options import BlockOptions
from experiments.speed.timing import (
    Captured,
    alternate_replays,
    capture_work,
    occupied_bytes,
    ratio_interval,
    summarize_times,
)
from experiments.speed.variants import (
    VARIANTS,
    Setup,
    Variant,
    convert_model,
    matmul_precision,
    module_bytes,
    parameter_like,
    prepare_variants,
)
from experiments.store.files import require_writable, write_json
from models.layers import CAUSAL
from models.par.transformer import rotary_table
from ptq import calibration as calib
from ptq.int8.blocks.layers import chain_blocks
from ptq.types import Adapter, ConfigError

COMPARED = (
    ("int8_stwq", "int8"),
    ("int8_stwq", "fp32"),
    ("int8_stwq", "bf16"),
    ("int8_stwq_all", "bf16"),
    ("int8_stwq_paper", "bf16"),
    ("int8_stwq_paper", "int8_stwq_all"),
    ("int8_staq", "int8_stwq"),
    ("int8_staq_paper", "int8_stwq_paper"),
    ("int8_stwq", "int8_stwq_symmetric"),
    ("int8_stwq", "fp8"),
    ("simulated", "fp32"),
)
GRAPHS = 128  # torch.compile makes one graph per length and variant
SLOWEST = 12  # kernels of a profile
CARD_STATE = "clocks.sm,clocks.mem,temperature.gpu,power.draw"


@dataclass(frozen=True)
class Stack:
    """The blocks of a transformer.

    Attributes:
        longest: tokens of a sequence.
        width: channels C.
    """

    blocks: nn.ModuleList
    longest: int
    width: int


def block_stack(model: nn.Module, family: str) -> Stack:
    """The blocks of a model, of MAR those of its decoder."""
    if family == "rar":
        return Stack(
            blocks=model.blocks,
            longest=model.image_seq_len + 1,  # cls, condition, all tokens but the last
            width=model.cls_token.shape[-1],
        )
    if family == "var":
        return Stack(blocks=model.blocks, longest=model.length, width=model.pos_1LC.shape[-1])
    if family in ("par", "llamagen"):
        return Stack(
            blocks=model.layers,
            longest=model.layout.tokens + model.layout.spe,  # with the special tokens
            width=model.tok_embeddings.embedding_dim,
        )
    return Stack(
        blocks=model.decoder_blocks,
        longest=model.buffer_size + model.seq_len,  # class tokens in front
        width=model.mask_token.shape[-1],
    )


def check_length(stack: Stack, length: int) -> None:
    """Refuse rows that are longer than a sequence.

    Raises:
        ConfigError: these are.
    """
    if length > stack.longest:
        raise ConfigError(
            f"lengths: {length} is more than the {stack.longest} tokens of a sequence"
        )


def random_inputs(
    model: nn.Module, family: str, batch: int, length: int, example: Tensor
) -> tuple[Tensor, list[Tensor | str | None]]:
    """What the first block gets, of the example's type and device.

    Returns:
        x (batch, length, C), and what goes to every block beside x.
    """
    width = block_stack(model, family).width
    source = torch.Generator(example.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=source, device=example.device)
        return values.to(example.dtype)

    positions = torch.arange(length, device=example.device)  # (L,)
    beside: list[Tensor | str | None]
    if family == "rar":
        condition = random(batch, length, width)  # (B, L, C)
        beside = [condition, positions, CAUSAL]
    elif family == "var":
        condition = random(batch, 1, width)  # (B, 1, C)
        if model.shared_ada_lin is not None:
            condition = model.shared_ada_lin(condition, positions)  # (B, 1, 6 C)
        beside = [condition, positions, None]
    elif family in ("par", "llamagen"):
        # cosine and sine (L, D / 2, 2)
        angles = rotary_table(model.layout, positions, model.head_dim, model.rope_base)
        beside = [angles, positions, CAUSAL]
    else:
        beside = [positions]
    return random(batch, length, width), beside


def build_variant(
    base: Adapter, variant: Variant, rows: calib.CalibrationSet, config: RunConfig
) -> nn.Module:
    """A copy of the model in the variant's arithmetic."""
    adapter = copy.deepcopy(base)
    convert_model(adapter, variant, rows, config)
    if variant.kind == "int8" and variant.compiled:
        chain_blocks(adapter)
    return adapter.model


def forward_pass(
    model: nn.Module, family: str, batch: int, length: int, variant: Variant
) -> Callable[[], Tensor]:
    """A function that runs random rows (batch, length, C) through all blocks."""
    blocks = block_stack(model, family).blocks
    is_chained = getattr(blocks[0], "hands_on", False)  # nothing is left to compile
    x, beside = random_inputs(model, family, batch, length, parameter_like(model, variant))

    def apply_block(block: nn.Module, x: Tensor, *beside: Tensor) -> Tensor:
        return block(x, *beside)

    step = apply_block
    if variant.compiled and x.is_cuda and not is_chained:
        step = torch.compile(apply_block, dynamic=False)  # static shapes: a graph per length

    @torch.no_grad()
    def forward() -> Tensor:
        hidden = x  # (B, L, C)
        for block in blocks:
            hidden = step(block, hidden, *beside)
        return hidden

    return forward


def capture_pass(
    model: nn.Module, family: str, batch: int, length: int, variant: Variant
) -> Captured:
    """A forward pass ready to be repeated; its peak is that of this model alone."""
    device = parameter_like(model, variant).device
    # the other variants stay in memory, and are none of its peak
    other_bytes = occupied_bytes(device) - module_bytes([model])
    with matmul_precision(variant.tf32):
        captured = capture_work(forward_pass(model, family, batch, length, variant), device)
    if captured.peak is None:
        return captured
    return replace(captured, peak=captured.peak - other_bytes)


def slowest_kernels(work: Captured) -> list[dict[str, Any]]:
    """The CUDA kernels of one replay that take the most time: name, calls, milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work.replay()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)
    kernels = []
    for event in events[:SLOWEST]:
        milliseconds = round(event.device_time_total / 1000, 4)  # from microseconds
        kernels.append({"kernel": event.key[:120], "calls": event.count, "ms": milliseconds})
    return kernels


def card_state(device: torch.device) -> str | None:
    """Clocks, temperature and power of the card, as nvidia-smi says them."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    # by uuid: numbers of nvidia-smi know no CUDA_VISIBLE_DEVICES
    card = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", card, f"--query-gpu={CARD_STATE}", "--format=csv,noheader"]
    with suppress(subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return answer.stdout.strip()
    return None


def report_line(
    name: str, length: int, times: list[float], work: Captured, batch: int
) -> dict[str, Any]:
    """What one variant took at one length."""
    line = {"variant": name, "length": length, **summarize_times(times)}
    line["rows_per_s"] = round(1000 * batch / line["median_ms"], 1)
    line["peak_mb"] = None if work.peak is None else round(work.peak / 2**20, 1)
    return line


def print_header() -> None:
    """The head of the table on the terminal."""
    times = f"{'median [ms]':>13}{'quartiles':>19}{'rows/s':>10}"
    print(f"{'variant':20}{'L':>5}{times}{'peak [MB]':>12}{'size [MB]':>14}")


def print_line(line: dict[str, Any], blocks_mb: float) -> None:
    """A line on the terminal."""
    low, high = line["quartiles_ms"]
    peak = "-" if line["peak_mb"] is None else f"{line['peak_mb']:.0f}"
    times = f"{line['median_ms']:13.3f}{low:10.3f}-{high:8.3f}{line['rows_per_s']:10.0f}"
    print(
        f"{line['variant']:20}{line['length']:5}{times}{peak:>12}{blocks_mb:14.1f}",
        flush=True,
    )


def describe_models(models: dict[str, nn.Module], family: str) -> dict[str, dict[str, Any]]:
    """By variant its recipe, and the size of its blocks."""
    descriptions = {}
    for name, model in models.items():
        size = module_bytes(list(block_stack(model, family).blocks))
        recipe = list(VARIANTS[name].recipe)
        descriptions[name] = {"overrides": recipe, "blocks_mb": round(size / 2**20, 2)}
    return descriptions


def compare_variants(times: dict[str, list[float]], length: int) -> list[dict[str, Any]]:
    """The ratios of the pairs in `COMPARED` of which both were measured."""
    ratios = []
    for first, second in COMPARED:
        if first in times and second in times:
            interval = ratio_interval(times[first], times[second])
            ratios.append({"length": length, "of": first, "to": second, **interval})
    return ratios


def measure_length(
    models: dict[str, nn.Module],
    setup: Setup,
    options: BlockOptions,
    length: int,
    report: dict[str, Any],
    baseline: Baseline | None,
) -> None:
    """Time all variants on rows of one length, and add what they took to the report."""
    family = setup.generator.preset.family
    others = {}
    if baseline is not None:
        baseline.prepare(batch=options.batch, length=length)
        others["baseline"] = lambda: 1000 * baseline.time_once(0)
    works = {}
    for name, model in models.items():
        works[name] = capture_pass(model, family, options.batch, length, VARIANTS[name])
    if baseline is not None:
        baseline.wait()
    state_before = card_state(setup.device)  # tells a card that was slowed down by its heat
    times = alternate_replays(works, setup.device, options.rounds, others)
    baseline_times = times.pop("baseline", [])
    report["states"][length] = [state_before, card_state(setup.device)]
    for name, milliseconds in times.items():
        line = report_line(name, length, milliseconds, works[name], options.batch)
        line |= compare_with_baseline(milliseconds, baseline_times)
        report["lines"].append(line)
        print_line(line, report["models"][name]["blocks_mb"])
    report["ratios"] += compare_variants(times, length)
    if options.profile and setup.device.type == "cuda" and length == options.lengths[-1]:
        report["kernels"] = {name: slowest_kernels(work) for name, work in works.items()}


def measure_blocks(options: BlockOptions, overrides: list[str]) -> tuple[dict[str, Any], Path]:
    """Measure all variants at all lengths; the report, and where it is written.

    Raises:
        ConfigError, CheckpointError: nothing can be measured.
    """
    with start_baseline(options.baseline, "blocks", overrides) as baseline:
        return measure_beside(baseline, options, overrides)


def measure_beside(
    baseline: Baseline | None, options: BlockOptions, overrides: list[str]
) -> tuple[dict[str, Any], Path]:
    """`measure_blocks`, timed in turn with a baseline if there is one."""
    # past its limit torch.compile runs a new shape uncompiled, and only warns
    dynamo = torch._dynamo.config
    dynamo.cache_size_limit = max(dynamo.cache_size_limit, GRAPHS)
    setup = prepare_variants({name: VARIANTS[name] for name in options.variants}, overrides)
    family = setup.generator.preset.family
    base = setup.generator.adapter
    for length in options.lengths:
        # before variants are built, which takes long
        check_length(block_stack(setup.generator.transformer, family), length)
    models = {}  # all at once: they are timed in alternation
    for name, config in setup.configs.items():
        models[name] = build_variant(base, VARIANTS[name], setup.rows, config)
    report = setup.report("blocks", rows=options.batch, rounds=options.rounds)
    report |= {
        "lines": [],
        "ratios": [],
        "models": describe_models(models, family),
        "states": {},
        "model_mb": round(module_bytes([setup.generator.transformer]) / 2**20, 1),
    }
    config = setup.config
    path = Path(config.runs) / "speed" / f"blocks-{config.model.name}-{setup.device.type}.json"
    require_writable(path, "runs")
    print_header()
    for length in options.lengths:
        measure_length(models, setup, options, length, report, baseline)
        if baseline is not None:
            report["baseline"] = baseline.describe()
        write_json(path, report)  # a killed command leaves the lengths that it measured
    for line in report["ratios"]:
        pair = f"{line['of']} / {line['to']}"
        print(f"L={line['length']}: {pair} = {line['ratio']:.4f} {line['interval']}")
    return report, path
