"""The ways to compute that the benchmarks compare, from FP32 to INT8, on one model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.config.compose import configure
from experiments.config.recipe import build_recipe
from experiments.config.schema import RunConfig
from experiments.registry.tables import override_key
from experiments.run.preparation import choose_device
from experiments.speed import random_models
from experiments.store.provenance import code_revision, package_versions
from experiments.store.results import SCHEMA
from models.registry import Generator
from ptq import calibration as calib
from ptq.int8.blocks.layers import run_by_kernels
from ptq.int8.fp8 import Fp8Linear
from ptq.int8.modules import all_codes, make_int8_modules
from ptq.modules import QuantLinear, swap_module
from ptq.pipeline import quantize
from ptq.types import Adapter

FP8 = (
    "quant.weights.format=fp8_e4m3",
    "quant.weights.granularity=tensor",
    "quant.weights.range=minmax",
    "quant.activations.format=fp8_e4m3",
    "quant.activations.granularity=tensor",
    "quant.activations.range=minmax",
)


@dataclass(frozen=True)
class Variant:
    """One way to compute.

    Attributes:
        kind: `float`, `simulate`, `int8` or `fp8`.
        dtype: of all that is not quantized.
        recipe: overrides of the config of a quantized one.
        tf32: let FP32 products run on the matrix units.
        compiled: by block.
    """

    kind: str = "float"
    dtype: torch.dtype = torch.bfloat16
    recipe: tuple[str, ...] = ()
    tf32: bool = False
    compiled: bool = True


def integers(*recipe: str) -> Variant:
    """The INT8 variant of a recipe."""
    return Variant("int8", recipe=recipe)


VARIANTS = {
    "fp32": Variant(dtype=torch.float32),
    "tf32": Variant(dtype=torch.float32, tf32=True),
    "bf16_eager": Variant(compiled=False),
    "bf16": Variant(),
    "int8": integers("method=smoothquant"),
    "int8_stwq": integers("method=sq_stwq"),
    "int8_stwq_symmetric": integers("method=sq_stwq", "quant.weights.symmetric=true"),
    "int8_stwq_all": integers("method=sq_stwq", "scope=paper", "scope.matmuls=false"),  # and AdaLN
    "int8_stwq_paper": integers("method=sq_stwq", "scope=paper"),  # and attention products
    # the values of scales do not matter for speed: their search is cut short
    "int8_staq": integers("method=staq", "method.options.geometric.steps=2"),
    "int8_staq_paper": integers("method=staq", "method.options.geometric.steps=2", "scope=paper"),
    "int8_dynamic": integers("method=rtn_dynamic"),
    "int8_quarot": integers("method=quarot"),
    "fp8": Variant("fp8", recipe=("method=rtn", *FP8)),
    "simulated": Variant("simulate", dtype=torch.float32, recipe=("method=sq_stwq",)),
}


@dataclass(frozen=True)
class Setup:
    """A model to build variants of, with the rows that all are calibrated on.

    Attributes:
        configs: by variant.
        made_up: whether the weights are random.
    """

    configs: dict[str, RunConfig]
    generator: Generator
    made_up: bool
    rows: calib.CalibrationSet
    device: torch.device

    @property
    def config(self) -> RunConfig:
        """The first variant's config: model, calibration and folders are the same in all."""
        return next(iter(self.configs.values()))

    def report(self, what: str, rows: int, **settings: Any) -> dict[str, Any]:
        """The head of a benchmark's report, before anything is measured."""
        return {
            "schema": SCHEMA,
            "what": what,
            "model": self.config.model.name,
            "weights": "random" if self.made_up else "loaded",
            "quant": self.config.quant.name,
            "rows": rows,
            **settings,
            "versions": package_versions(self.device),
            "threads": torch.get_num_threads(),
            "revision": code_revision(),
        }


def variant_overrides(variant: Variant, overrides: Sequence[str]) -> list[str]:
    """All overrides of a variant's config: its recipe's, and the given ones for other keys."""
    recipe = variant.recipe or ("method=fp",)
    decided = set(map(override_key, recipe))
    others = [override for override in overrides if override_key(override) not in decided]
    return [*recipe, *others]


def prepare_variants(variants: dict[str, Variant], overrides: Sequence[str]) -> Setup:
    """Compose the variants' configs, load the model and select calibration rows.

    Raises:
        ConfigError, CheckpointError: a config or the weights are refused.
    """
    configs = {}
    for name, variant in variants.items():
        configs[name] = configure(variant_overrides(variant, overrides))
    config = next(iter(configs.values()))
    device = choose_device(config)
    generator, made_up = random_models.load_or_fill(config, device)
    settings = config.calib
    pool = random_models.image_pool(generator, settings.n, device)  # n images, twice as many rows
    rows = calib.select_rows(
        settings.selector, generator.adapter, pool, settings.n, settings.seed, settings.batch
    )
    return Setup(configs, generator, made_up, rows, device)


@torch.no_grad()
def convert_model(
    adapter: Adapter, variant: Variant, rows: calib.CalibrationSet, config: RunConfig
) -> None:
    """Put the adapter's model into the variant's arithmetic."""
    model = adapter.model
    # simulated first: layers of INT8 and FP8 are made of what this finds
    if variant.kind != "float":
        quantize(adapter, rows, build_recipe(config), config.calib.batch)
    replacements: dict[str, nn.Module] = {}  # by name of the module that they replace
    if variant.kind == "int8":
        replacements = make_int8_modules(model, all_codes(model, config.quant.weights.bits))
    elif variant.kind == "fp8":
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear):
                replacements[name] = Fp8Linear(module)
    model.to(variant.dtype)  # before the new layers come in, whose tensors keep their formats
    for name, module in replacements.items():
        swap_module(model, name, module)
    if variant.kind == "int8" and next(model.parameters()).is_cuda:
        run_by_kernels(adapter)


def convert_copy(setup: Setup, variant: Variant, config: RunConfig) -> Generator:
    """A copy of the generator with a transformer in the variant's arithmetic."""
    generator = copy.copy(setup.generator)  # shares the tokenizer
    generator.adapter = copy.deepcopy(setup.generator.adapter)
    generator.transformer = generator.adapter.model
    convert_model(generator.adapter, variant, setup.rows, config)
    return generator


@contextmanager
def matmul_precision(tf32: bool) -> Iterator[None]:
    """Whether FP32 products may use TF32, inside."""
    former = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = former


def parameter_like(model: nn.Module, variant: Variant) -> Tensor:
    """A parameter of the type that the variant computes in."""
    for parameter in model.parameters():
        if parameter.dtype == variant.dtype:
            return parameter
    raise LookupError(f"the model has no parameters of {variant.dtype}")


def module_bytes(modules: Sequence[nn.Module]) -> int:
    """Bytes of parameters and buffers; shared ones count once."""
    sizes: dict[int, int] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            sizes[tensor.data_ptr()] = tensor.nbytes
    return sum(sizes.values())
