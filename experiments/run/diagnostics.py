"""Where in a model quantization loses: errors per layer and block, histograms of activations.

Measured on a few held-out sequences of a twin when a run is tracked, and kept in the run's folder
as `layers.json`:

    layers      site, kind, input_error: |Q(x) - x| / |x| of its static or dynamic quantizer
    blocks      block, output_error: |y - y_fp| / |y_fp| of what leaves it, so errors of all blocks
                before are in it; left out where rotations change the stream itself
    histograms  of the full-precision inputs of the middle qkv and fc1: counts and edges
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from experiments.evaluate import likelihood
from models.registry import Generator
from ptq.inputs import capture_inputs
from ptq.modules import QuantLinear
from ptq.numbers.quantizers import Passthrough
from ptq.recipe import Recipe
from ptq.types import Adapter, Rows, Site

ROWS = 16  # held-out sequences
BINS = 64  # of a histogram


def relative_error(changed: Tensor, original: Tensor) -> float:
    """|changed - original| / |original|."""
    difference = (changed - original).double().norm()
    return (difference / original.double().norm().clamp(min=1e-30)).item()


@contextmanager
def hooked_outputs(
    modules: dict[str, nn.Module], take: Callable[[str, tuple, Any], None]
) -> Iterator[None]:
    """Inside, `take` gets name, arguments and output of every forward of the modules."""
    handles = []
    for name, module in modules.items():
        # the default binds the name of this turn: a closure would see that of the last one
        def hook(module: nn.Module, args: tuple, output: Any, name: str = name) -> None:
            take(name, args, output)

        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def quantized_sites(adapter: Adapter) -> dict[str, Site]:
    """By name, the sites whose input goes through a quantizer."""
    modules = dict(adapter.model.named_modules())
    sites = {}
    for site in adapter.sites:
        module = modules[site.name]
        if isinstance(module, QuantLinear) and not isinstance(module.input, Passthrough):
            sites[site.name] = site
    return sites


def input_errors(generator: Generator, rows: Rows) -> list[dict[str, Any]]:
    """Relative error of every site's input quantizer, in the order in which they are used."""
    adapter = generator.adapter
    sites = quantized_sites(adapter)
    error_sums: dict[str, float] = {}
    input_sums: dict[str, float] = {}

    def take(name: str, args: tuple, output: Tensor) -> None:
        # sums of squares, because a pass may call a quantizer several times
        error = (output - args[0]).double().square().sum().item()
        size = args[0].double().square().sum().item()
        error_sums[name] = error_sums.get(name, 0.0) + error
        input_sums[name] = input_sums.get(name, 0.0) + size

    quantizers = {name: adapter.model.get_submodule(name).input for name in sites}
    with hooked_outputs(quantizers, take):
        adapter.forward(rows)
    errors = []
    for name, error in error_sums.items():
        relative = (error / max(input_sums[name], 1e-30)) ** 0.5
        errors.append({"site": name, "kind": sites[name].kind, "input_error": relative})
    return errors


def block_outputs(generator: Generator, rows: Rows) -> dict[str, Tensor]:
    """What every block puts out, of the last call where a pass has several."""
    adapter = generator.adapter
    outputs: dict[str, Tensor] = {}

    def take(name: str, args: tuple, output: Any) -> None:
        outputs[name] = output[0] if isinstance(output, tuple) else output

    blocks = {name: adapter.model.get_submodule(name) for name in adapter.blocks}
    with hooked_outputs(blocks, take):
        adapter.forward(rows)
    return outputs


def block_errors(generator: Generator, reference: Generator, rows: Rows) -> list[dict[str, Any]]:
    """Relative error of what leaves every block."""
    ours = block_outputs(generator, rows)
    theirs = block_outputs(reference, rows)
    errors = []
    for name, original in theirs.items():
        errors.append({"block": name, "output_error": relative_error(ours[name], original)})
    return errors


def input_histograms(reference: Generator, rows: Rows) -> dict[str, dict[str, list[float]]]:
    """Counts and edges of full-precision inputs."""
    adapter = reference.adapter
    histograms = {}
    for kind in ("qkv", "fc1"):
        of_kind = [site for site in adapter.sites if site.kind == kind]
        middle = of_kind[len(of_kind) // 2]
        # (N, C), sink tokens included
        inputs = capture_inputs(adapter, [rows], [middle], exclude_sinks=False)[middle.name]
        # (BINS,) and (BINS + 1,); PyTorch counts on the CPU alone
        counts, edges = torch.histogram(inputs.float().cpu(), BINS)
        histograms[middle.name] = {
            "counts": counts.int().tolist(),
            "edges": [round(edge, 6) for edge in edges.tolist()],
        }
    return histograms


@torch.no_grad()
def diagnose_layers(
    generator: Generator, reference: Generator, recipe: Recipe
) -> dict[str, Any] | None:
    """What this module measures, of a quantized model and its full-precision original.

    None but for twins, which have held-out sequences.
    """
    held_out = likelihood.load_held_out(generator.preset, ROWS)
    if held_out is None:
        return None
    reference.adapter.prepare()
    device = next(reference.transformer.parameters()).device
    tokens = held_out["tokens"].to(device)  # (ROWS, L) ids or (ROWS, L, D) latents
    labels = held_out["labels"].to(device)  # (ROWS,)
    rows, _ = reference.adapter.rows(tokens, labels)
    # rotations change the stream between blocks itself
    blocks = [] if recipe.rotates else block_errors(generator, reference, rows)
    return {
        "layers": input_errors(generator, rows),
        "blocks": blocks,
        "histograms": input_histograms(reference, rows),
    }
