"""Where in a model quantization loses: errors per layer and block, and histograms of activations,
for W&B and for eyes.

Measured on a few held-out sequences of a twin when a run is tracked, and kept in the run's folder
as `layers.json`:

    layers      site, kind, input_error: |Q(x) - x| / |x| of its static or dynamic quantizer
    blocks      block, output_error: |y - y_fp| / |y_fp| of what leaves it, so errors of all blocks before included;
                left out where rotations change the stream itself
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
from ptq.types import Rows

ROWS = 16
BINS = 64


def relative_error(changed: Tensor, of: Tensor) -> float:
    return ((changed - of).double().norm() / of.double().norm().clamp(min=1e-30)).item()


@contextmanager
def hooked_outputs(
    modules: dict[str, nn.Module], take: Callable[[str, tuple, Any], None]
) -> Iterator[None]:
    """Inside, `take` gets name, arguments and output of every forward of the modules."""
    handles = [
        module.register_forward_hook(lambda m, args, output, name=name: take(name, args, output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_errors(generator: Generator, rows: Rows) -> list[dict[str, Any]]:
    """Relative error of every site's input quantizer."""
    adapter = generator.adapter
    found = []
    modules = dict(adapter.model.named_modules())
    sites = {
        s.name: s
        for s in adapter.sites
        if isinstance(modules[s.name], QuantLinear)
        and not isinstance(modules[s.name].input, Passthrough)
    }
    sums: dict[str, list[float]] = {}

    def take(name: str, args: tuple, output: Tensor) -> None:
        error = (output - args[0]).double().square().sum().item()
        size = args[0].double().square().sum().item()
        before = sums.setdefault(name, [0.0, 0.0])
        sums[name] = [before[0] + error, before[1] + size]

    with hooked_outputs({name: modules[name].input for name in sites}, take):
        adapter.forward(rows)
    for name, (error, size) in sums.items():
        found.append(
            {
                "site": name,
                "kind": sites[name].kind,
                "input_error": (error / max(size, 1e-30)) ** 0.5,
            }
        )
    return found


def block_outputs(generator: Generator, rows: Rows) -> dict[str, Tensor]:
    """What every block puts out, of the last call where a pass has several."""
    seen: dict[str, Tensor] = {}

    def take(name: str, args: tuple, output: Any) -> None:
        seen[name] = output[0] if isinstance(output, tuple) else output

    with hooked_outputs(
        {name: generator.adapter.model.get_submodule(name) for name in generator.adapter.blocks},
        take,
    ):
        generator.adapter.forward(rows)
    return seen


def input_histograms(reference: Generator, rows: Rows) -> dict[str, dict[str, list[float]]]:
    """Counts and edges of full-precision inputs."""
    found = {}
    for kind in ("qkv", "fc1"):
        of_kind = [s for s in reference.adapter.sites if s.kind == kind]
        site = of_kind[len(of_kind) // 2]
        x = (
            capture_inputs(reference.adapter, [rows], [site], exclude_sinks=False)[site.name]
            .float()
            .cpu()
        )
        counts, edges = torch.histogram(x, BINS)
        found[site.name] = {
            "counts": counts.int().tolist(),
            "edges": [round(v, 6) for v in edges.tolist()],
        }
    return found


@torch.no_grad()
def diagnose_layers(
    generator: Generator, reference: Generator, recipe: Recipe
) -> dict[str, Any] | None:
    """What this module measures, of a quantized model and its full-precision original; None but for
    twins."""
    stored = likelihood.load_held_out(generator.preset, ROWS)
    if stored is None:
        return None
    reference.adapter.prepare()
    device = next(reference.transformer.parameters()).device
    rows, _ = reference.adapter.rows(*(stored[k].to(device) for k in ("tokens", "labels")))
    blocks: list[dict[str, Any]] = []
    if not recipe.rotates:
        ours = block_outputs(generator, rows)
        theirs = block_outputs(reference, rows)
        blocks = [
            {"block": name, "output_error": relative_error(ours[name], theirs[name])}
            for name in theirs
        ]
    return {
        "layers": input_errors(generator, rows),
        "blocks": blocks,
        "histograms": input_histograms(reference, rows),
    }
