"""A forward pass of all transformer blocks on rows (batch, L, C), from FP32 to INT8: the paper's
Figure 7 and Table 12.

    python -m experiments.speed what=blocks model=rar_l python -m experiments.speed what=blocks
    model=var_d20 lengths=[256] variants=[fp32,bf16,int8_stwq] rounds=50

    batch     rows (100, as in the paper)          lengths   tokens L of a row ([64,128,256], as in the paper)
    variants  which to compare, all by default      rounds    timings of each, in alternation
    profile   list the kernels that take the most time, variant by variant, at the longest L

Every variant but `bf16_eager` is compiled block by block, and all are replayed as one CUDA graph,
so neither Python nor launches decide; on a CPU nothing is compiled. INT8 and FP8 keep all that is
no linear layer in BF16. Without a `scope` the linear layers of the blocks are quantized (qkv, proj,
fc1, fc2); `int8_stwq_all` adds the AdaLN projections, and `int8_stwq_paper` (`scope=paper`) also
both attention products, keys and values as codes (`ptq/int8/attention.py`): one kernel that passes
the keys twice, since a weight is rounded after the softmax of its whole row, which no online
softmax (the fused attention of the other variants) has in time.
Weights are random, of true shape: speed does not depend on their values, and quality is not claimed
from them. Activation scales come from `calib.n` random rows.

`peak_mb` is what one pass takes on top of what was there: weights of the model (embeddings and head
included), activations; `model_mb` are the bytes of the blocks alone.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.config.compose import configure
from experiments.config.recipe import build_recipe
from experiments.config.schema import RunConfig
from experiments.run.preparation import choose_device
from experiments.speed import random_models
from experiments.speed.options import BlockOptions
from experiments.speed.timing import Captured, alternate, capture, occupied, ratio, summary
from experiments.store.files import write_json
from experiments.store.provenance import code_revision, package_versions
from models.layers import causal_mask
from models.par.transformer import rotary_table
from ptq import calibration as calib
from ptq.int8.fp8 import Fp8Linear
from ptq.int8.modules import all_codes, in_integers
from ptq.modules import QuantLinear, swap_module
from ptq.pipeline import quantize
from ptq.types import Adapter, ConfigError

SCHEMA = 1
FP8 = [
    f"quant.{operand}.{setting}"
    for operand in ("weights", "activations")
    for setting in ("format=fp8_e4m3", "granularity=tensor", "range=minmax")
]


@dataclass(frozen=True)
class Variant:
    """One way to compute.

    Attributes:
        kind: `float`, `simulate`, `int8` or `fp8`. recipe: overrides of the quantized ones' config.
        tf32: let FP32 products run on the matrix units. compiled: by block.
    """

    kind: str = "float"
    dtype: torch.dtype = torch.bfloat16
    recipe: tuple[str, ...] = ()
    tf32: bool = False
    compiled: bool = True


VARIANTS = {
    "fp32": Variant(dtype=torch.float32),
    "tf32": Variant(dtype=torch.float32, tf32=True),
    "bf16_eager": Variant(compiled=False),
    "bf16": Variant(),
    "int8": Variant("int8", recipe=("method=smoothquant",)),
    "int8_stwq": Variant("int8", recipe=("method=sq_stwq",)),
    "int8_stwq_symmetric": Variant(
        "int8", recipe=("method=sq_stwq", "quant.weights.symmetric=true")
    ),
    "int8_stwq_all": Variant(
        "int8", recipe=("method=sq_stwq", "scope=paper", "scope.matmuls=false")
    ),
    "int8_stwq_paper": Variant("int8", recipe=("method=sq_stwq", "scope=paper")),
    "int8_dynamic": Variant("int8", recipe=("method=rtn_dynamic",)),
    "int8_quarot": Variant("int8", recipe=("method=quarot",)),
    "fp8": Variant("fp8", recipe=("method=rtn", *FP8)),
    "simulated": Variant("simulate", torch.float32, ("method=sq_stwq",)),
}


def inputs(
    model: nn.Module, family: str, batch: int, length: int, example: Tensor
) -> tuple[list[nn.Module], list[Tensor]]:
    """The blocks, and what the first of them gets: x (batch, length, C) first; all but x go to
    every block.

    Raises:
        ConfigError: the model's sequences are shorter.
    """
    source = torch.Generator(example.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, device=example.device).to(example.dtype)

    positions = torch.arange(length, device=example.device)
    mask = causal_mask(length, example.device).to(example.dtype)
    if family == "rar":
        blocks = model.blocks
        longest = model.image_seq_len + 1
        dim = model.cls_token.shape[-1]
        rest = [random(batch, length, dim), positions, mask]
    elif family == "var":
        blocks = model.blocks
        longest = model.length
        dim = model.pos_1LC.shape[-1]
        c = random(batch, 1, dim)
        rest = [
            c if model.shared_ada_lin is None else model.shared_ada_lin(c, positions),
            positions,
            None,
        ]
    elif family == "par":
        blocks = model.layers
        longest = model.layout.tokens + model.layout.spe
        dim = model.tok_embeddings.embedding_dim
        rest = [
            rotary_table(model.layout, positions, model.head_dim, model.rope_base),
            positions,
            mask,
        ]
    else:
        blocks = model.decoder_blocks
        longest = model.buffer_size + model.seq_len
        dim = model.mask_token.shape[-1]
        rest = [positions]
    if length > longest:
        raise ConfigError(f"lengths: {length} is more than the {longest} tokens of a sequence")
    return list(blocks), [random(batch, length, dim), *rest]


@contextmanager
def matmul_precision(tf32: bool) -> Iterator[None]:
    """Whether FP32 products may use TF32, inside."""
    former = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = former


@torch.no_grad()
def convert(
    adapter: Adapter, variant: Variant, rows: calib.CalibrationSet, config: RunConfig
) -> None:
    """Put the adapter's model into the variant's arithmetic."""
    model = adapter.model
    if variant.kind != "float":
        quantize(adapter, rows, build_recipe(config), config.calib.batch)
    new: dict[str, nn.Module] = {}
    if variant.kind == "int8":
        new = in_integers(model, all_codes(model, config.quant.weights.bits))
    elif variant.kind == "fp8":
        new = {
            name: Fp8Linear(m) for name, m in model.named_modules() if isinstance(m, QuantLinear)
        }
    model.to(variant.dtype)  # before the new layers come in, whose tensors keep their formats
    for name, module in new.items():
        swap_module(model, name, module)


def build(
    base: Adapter, variant: Variant, rows: calib.CalibrationSet, config: RunConfig
) -> nn.Module:
    """A copy of the model in the variant's arithmetic."""
    adapter = copy.deepcopy(base)
    convert(adapter, variant, rows, config)
    return adapter.model


def passes(
    model: nn.Module,
    family: str,
    options: BlockOptions,
    variant: Variant,
    length: int,
    device: torch.device,
) -> Callable[[], Tensor]:
    """One forward pass through all blocks."""
    blocks, (x, *rest) = inputs(model, family, options.batch, length, like(model, variant))

    def one(block: nn.Module, x: Tensor, *rest: Tensor) -> Tensor:
        return block(x, *rest)

    step = torch.compile(one, dynamic=False) if variant.compiled and device.type == "cuda" else one

    @torch.no_grad()
    def forward() -> Tensor:
        h = x
        for block in blocks:
            h = step(block, h, *rest)
        return h

    return forward


def size(modules: list[nn.Module]) -> int:
    """Bytes of parameters and buffers."""
    found = {t.data_ptr(): t.nbytes for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(found.values())


def kernels(work: Captured, top: int = 12) -> list[dict[str, Any]]:
    """The CUDA kernels of one replay that take the most time: name, calls, milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work.replay()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.device_time_total)
    return [
        {"kernel": e.key[:120], "calls": e.count, "ms": round(e.device_time_total / 1000, 4)}
        for e in events[:top]
    ]


def state(device: torch.device) -> str | None:
    """Clocks, temperature and power of the card, as nvidia-smi says them."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    card = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    ask = [
        "nvidia-smi",
        card,
        "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw",
        "--format=csv,noheader",
    ]
    with suppress(subprocess.SubprocessError):
        return subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.strip()
    return None


def like(model: nn.Module, variant: Variant) -> Tensor:
    """A parameter of the type that the variant computes in."""
    return next(p for p in model.parameters() if p.dtype == variant.dtype)


def prepare(
    model: nn.Module,
    family: str,
    options: BlockOptions,
    variant: Variant,
    length: int,
    device: torch.device,
) -> Captured:
    """A forward pass ready to be repeated; its peak is that of this model alone."""
    others = occupied(device) - size([model])
    with matmul_precision(variant.tf32):
        found = capture(passes(model, family, options, variant, length, device), device)
    return replace(found, peak=None if found.peak is None else found.peak - others)


def line(
    name: str, length: int, times: list[float], work: Captured, options: BlockOptions
) -> dict[str, Any]:
    """What one variant took at one length."""
    found = {"variant": name, "length": length, **summary(times)}
    found["rows_per_s"] = round(1000 * options.batch / found["median_ms"], 1)
    found["peak_mb"] = None if work.peak is None else round(work.peak / 2**20, 1)
    return found


def shown(found: dict[str, Any], blocks_mb: float) -> str:
    """A line on the terminal."""
    low, high = found["quartiles_ms"]
    peak = "-" if found["peak_mb"] is None else f"{found['peak_mb']:.0f}"
    return (
        f"{found['variant']:20}{found['length']:5}{found['median_ms']:13.3f}{low:10.3f}-{high:8.3f}"
        f"{found['rows_per_s']:10.0f}{peak:>12}{blocks_mb:14.1f}"
    )


def own_overrides(variant: Variant, overrides: list[str]) -> list[str]:
    """All overrides of a variant's config: those of its recipe, and the command line's for other
    keys."""
    own = variant.recipe or ("method=fp",)
    keys = {setting.partition("=")[0] for setting in own}
    return [*own, *(o for o in overrides if o.partition("=")[0] not in keys)]


COMPARED = (
    ("int8_stwq", "int8"),
    ("int8_stwq", "fp32"),
    ("int8_stwq", "bf16"),
    ("int8_stwq_all", "bf16"),
    ("int8_stwq_paper", "bf16"),
    ("int8_stwq_paper", "int8_stwq_all"),
    ("int8_stwq", "int8_stwq_symmetric"),
    ("int8_stwq", "fp8"),
    ("simulated", "fp32"),
)


def run(options: BlockOptions, overrides: list[str]) -> tuple[dict[str, Any], Path]:
    """Measure all variants; the report, and where it is written.

    Raises:
        ConfigError, CheckpointError: nothing can be measured.
    """
    configs = {
        name: configure(own_overrides(VARIANTS[name], overrides)) for name in options.variants
    }
    first = next(iter(configs.values()))
    device = choose_device(first)
    # one graph per L, variant
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 128)
    generator, made_up = random_models.load(first, device)
    family = generator.preset.family
    base = generator.adapter
    for length in options.lengths:
        # refuses long ones
        inputs(generator.transformer, family, 1, length, next(generator.transformer.parameters()))
    pool = random_models.pool(generator, first.calib.n, device)
    rows = calib.select_rows(
        first.calib.selector, base, pool, first.calib.n, first.calib.seed, first.calib.batch
    )
    models = {name: build(base, VARIANTS[name], rows, configs[name]) for name in options.variants}
    lines: list[dict[str, Any]] = []
    sizes: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        blocks, _ = inputs(model, family, 1, 1, like(model, VARIANTS[name]))
        sizes[name] = {
            "overrides": list(VARIANTS[name].recipe),
            "blocks_mb": round(size(blocks) / 2**20, 2),
        }
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "what": "blocks",
        "model": first.model.name,
        "weights": "random" if made_up else "loaded",
        "quant": first.quant.name,
        "rows": options.batch,
        "rounds": options.rounds,
        "versions": package_versions(device),
        "threads": torch.get_num_threads(),
        "revision": code_revision(),
        "lines": lines,
        "ratios": [],
        "models": sizes,
        "states": {},
        "model_mb": round(size([generator.transformer]) / 2**20, 1),
    }
    path = Path(first.runs) / "speed" / f"blocks-{first.model.name}-{device.type}.json"
    print(
        f"{'variant':20}{'L':>5}{'median [ms]':>13}{'quartiles':>19}{'rows/s':>10}{'peak [MB]':>12}{'size [MB]':>14}"
    )
    for length in options.lengths:
        works = {
            n: prepare(m, family, options, VARIANTS[n], length, device) for n, m in models.items()
        }
        before = state(device)
        times = alternate(works, device, options.rounds)
        report["states"][length] = [before, state(device)]
        for name, found in times.items():
            lines.append(line(name, length, found, works[name], options))
            print(shown(lines[-1], sizes[name]["blocks_mb"]), flush=True)
        report["ratios"] += [
            {"length": length, "of": a, "to": b, **ratio(times[a], times[b])}
            for a, b in COMPARED
            if a in times and b in times
        ]
        if options.profile and device.type == "cuda" and length == options.lengths[-1]:
            report["kernels"] = {name: kernels(work) for name, work in works.items()}
        write_json(path, report)
    for found in report["ratios"]:
        print(
            f"L={found['length']}: {found['of']} / {found['to']} = {found['ratio']:.4f} {found['interval']}"
        )
    return report, path
