"""Quantizing a generator in one call: a recipe by name, calibration rows drawn from the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq import pipeline, recipe
from ptq.calibration import Pool, digest_rows, draw_tokens, pool_labels, select_rows
from ptq.numbers.numerics import NonFiniteError
from ptq.pipeline import Report
from ptq.recipe import Recipe
from ptq.sites import CalibrationSet, Rows, Track
from ptq.spec import ConfigError, require
from ptq.use.generators import Generator

JUDGED_ROWS = 4  # calibration rows that the error of the outputs is measured on
MICROBATCH = 128  # images of the pool that are drawn together, at most


@dataclass(frozen=True)
class Quantization:
    """What became of a model.

    Attributes:
        recipe: how it was quantized.
        names: of method, bits and scope, as far as the recipe was asked for by name.
        calibration: what is known of the calibration rows.
        report: what quantization found.
        output_error: relative squared error of the outputs on a few calibration rows,
            |y - y_fp|^2 / |y_fp|^2.
        fp32_bytes: of the transformer before.
    """

    recipe: Recipe
    names: Mapping[str, str]
    calibration: Mapping[str, object]
    report: Report
    output_error: float
    fp32_bytes: int


@torch.no_grad()
def quantize(
    model: Generator,
    method: str | Recipe = "ptq4arvg",
    bits: str | None = None,
    scope: str | None = None,
    *,
    calibration: CalibrationSet | Pool | None = None,
    selector: str | None = None,
    num_samples: int = 128,
    seed: int = 0,
    batch: int = 64,
    sampler: str = "official",
    progress: Track = lambda it, what: it,
) -> Quantization:
    """Quantize a generator's transformer in place.

    With the defaults it is quantized as `python -m experiments.run` quantizes it.

    Args:
        method: a recipe, or the name of one, a file of `conf/method`.
        bits, scope: names of files in `conf/quant` and `conf/scope`, "w8a8" and "paper" if left
            out; a recipe has its own.
        calibration: the rows; or the pool to select them from; or None, then the model draws one.
        selector: of the rows, `dgc` if left out; the released code has its own.
        num_samples: calibration rows that are kept.
        seed: of the images of the pool and of random choices.
        batch: calibration rows per forward pass.
        sampler: settings that the pool is drawn with, a name of `preset.samplers`.
        progress: wraps an iterable, with the name of the work.

    Returns:
        What was done; `model.quantization` holds it, too, and `save` writes it down.

    Raises:
        ConfigError: a name or value is not allowed, or the model is quantized already.
        NonFiniteError: an activation or weight holds NaN or infinity.
    """
    if model.quantization is not None:
        raise ConfigError(f"model: {model.preset.name} is quantized already, load it again")
    chosen, names = _chosen_recipe(model, method, bits, scope)
    adapter = model.adapter
    adapter.layout = "released" if chosen.released else "inference"
    if not isinstance(calibration, CalibrationSet):
        choice = selector or ("dgc_released" if chosen.released else "dgc")
        pool = calibration or draw_pool(model, choice, num_samples, seed, sampler, progress)
        calibration = select_rows(choice, adapter, pool, num_samples, seed, batch)

    # both are of the model that is about to be changed in place
    fp32_bytes = full_precision_bytes(model.transformer)
    judged_rows = calibration.batches(JUDGED_ROWS)[0]
    expected = adapter.forward(judged_rows)  # (B, T, V) logits, or MAR's (B, T, C)

    report = pipeline.quantize(adapter, calibration, chosen, batch, progress)
    model.quantization = Quantization(
        recipe=chosen,
        names=names,
        calibration={**calibration.meta, "fingerprint": digest_rows(calibration)},
        report=report,
        output_error=_relative_error(adapter.forward(judged_rows), expected),
        fp32_bytes=fp32_bytes,
    )
    return model.quantization


def _chosen_recipe(
    model: Generator, method: str | Recipe, bits: str | None, scope: str | None
) -> tuple[Recipe, dict[str, str]]:
    """The recipe that is asked for, and the names that it was asked for by."""
    if isinstance(method, Recipe):
        if bits is not None or scope is not None:
            raise ConfigError("bits, scope: a recipe has its own, leave them out")
        return method, {}
    names = {"method": method, "quant": bits or "w8a8", "scope": scope or "paper"}
    family = model.adapter.family
    return recipe.named(method, names["quant"], names["scope"], family=family), names


def draw_pool(
    model: Generator,
    selector: str = "dgc",
    num_samples: int = 128,
    seed: int = 0,
    sampler: str = "official",
    progress: Track = lambda it, what: it,
) -> Pool:
    """The images that a selector keeps `num_samples` rows of, drawn by the model.

    Raises:
        ConfigError: a name or number is not allowed.
    """
    preset = model.preset
    require("sampler", sampler, tuple(preset.samplers))
    labels = pool_labels(selector, num_samples, preset.classes, seed)  # (N,), on the CPU
    device = next(model.transformer.parameters()).device
    settings = dict(preset.samplers[sampler])
    # 128 images are drawn as a run draws them; fewer are not padded to so many
    microbatch = min(MICROBATCH, len(labels))
    # (N, T) ids, or (N, T, D) latents
    tokens = draw_tokens(model, labels, seed, microbatch, settings, device, progress)
    return make_pool(model, tokens, labels)


def make_pool(model: Generator, tokens: Tensor, labels: Tensor) -> Pool:
    """The pool of given images: tokens (N, T) or (N, T, D), as `model.encode` has them, and class
    labels (N,)."""
    rows: tuple[Rows, Rows] = model.adapter.rows(tokens, labels.to(tokens.device))
    return Pool(*rows, labels)


def full_precision_bytes(transformer: nn.Module) -> int:
    """Bytes of a transformer's state in FP32; what is no floating-point number keeps its size."""
    total = 0
    for tensor in transformer.state_dict().values():
        total += tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())
    return total


def _relative_error(output: Tensor, expected: Tensor) -> float:
    """|y - y_fp|^2 / |y_fp|^2.

    Raises:
        NonFiniteError: it is no finite number.
    """
    difference = (output - expected).double().square().sum()
    error = float(difference / expected.double().square().sum())
    if not math.isfinite(error):
        raise NonFiniteError("model: its outputs contain NaN or infinity after quantization")
    return error
