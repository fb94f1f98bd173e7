"""What the derivation of GPS approximates, exact and approximate, for one layer: Table 8, Figures
3, 8 and 10.

Symbols as in `ptq/gps.py`. x (N, C): inputs without sink tokens, W (O, C): the weights that read
them, dx and dW their rounding errors under the quantizers that the layer would have (activations
static per tensor, weights per row), s the GPS scale, k the widest channel. Everything in float64;
sums over outputs, means over tokens. The steps of the paper:

    error_w         mean |x dW^T|^2              sum_i mean x_i^2 sum_o dW_oi^2       no cross terms
    error_x         mean |dx W^T|^2              sum_i mean dx_i^2 sum_o W_oi^2       no cross terms
    error_x_rounded sum_i mean dx_i^2 sum W_i^2  the same with rounded W              released code
    total           mean |x W^T - x^ W^^T|^2     error_w + error_x                    the two errors apart
    delta_x         mean |Q(x / s) - x / s|      mean |dx| / s_k                      Eq. 10
    delta_w         mean |Q(W s) - W s|          s_k mean |dW|                        Eq. 10
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.analyses.data import LAYERS, Found, Measure, calibration_set
from experiments.config.recipe import build_recipe
from experiments.run.cell import Run
from ptq.gps import Energies, error_energies, optimal_ratio, transform_from_energies, widest_channel
from ptq.inputs import capture_inputs
from ptq.methods.smoothquant import smoothquant_step
from ptq.numbers.numerics import fake_quantize
from ptq.numbers.quantizers import choose_qparams, fake_quantize_weight
from ptq.pipeline import Track
from ptq.types import QuantSpec

FORM = "squares"

CLOSE = 0.05  # of Figure 8


@dataclass(frozen=True)
class Layer:
    """x (N, C) and W (O, C) in float64, with the specs of both."""

    x: Tensor
    weight: Tensor
    activations: QuantSpec
    weights: QuantSpec

    def rounded_x(self, scale: Tensor | float = 1.0) -> Tensor:
        """Q(x / s)."""
        x = self.x / scale
        return fake_quantize(
            x, choose_qparams(x, self.activations.at("tensor")), self.activations.levels
        )

    def rounded_w(self, scale: Tensor | float = 1.0) -> Tensor:
        """Q(W s)."""
        return fake_quantize_weight(self.weight * scale, self.weights)[0]

    def energies(self) -> Energies:
        """The error energies that GPS balances."""
        anchor = choose_qparams(self.x[:, widest_channel(self.x)[0]], self.activations.at("tensor"))
        return error_energies(
            self.x, self.weight, self.rounded_w(), anchor, self.activations.levels, FORM
        )

    def gps(self) -> Tensor:
        """The GPS scale (C,)."""
        return transform_from_energies(self.energies(), FORM, self.x.dtype).scale

    def output_error(self, scale: Tensor | float = 1.0) -> float:
        """Mean |x W^T - Q(x / s) Q(W s)^T|."""
        return (
            (self.x @ self.weight.t() - self.rounded_x(scale) @ self.rounded_w(scale).t())
            .abs()
            .mean()
            .item()
        )


def compared(real: float, approx: float) -> dict[str, float]:
    return {"real": real, "approx": approx, "bias": abs(approx - real) / abs(real) if real else 0.0}


def power(errors: Tensor, of: Tensor) -> float:
    """Mean over tokens of the squared length of errors (N, C) seen through weights (O, C)."""
    return (errors @ of.t()).square().sum(dim=1).mean().item()


def diagonal(errors: Tensor, of: Tensor) -> float:
    """`power` without the terms between different channels."""
    return (errors.square().mean(dim=0) * of.square().sum(dim=0)).sum().item()


def biases(layer: Layer) -> dict[str, dict[str, float]]:
    """Every step's exact value, approximation, and relative difference."""
    x = layer.x
    w = layer.weight
    xq = layer.rounded_x()
    wq = layer.rounded_w()
    dx = xq - x
    dw = wq - w
    e = layer.energies()
    scale = transform_from_energies(e, FORM, x.dtype).scale
    s_k = e.anchor_scale
    error_w = power(x, dw)
    error_x = power(dx, w)
    return {
        "error_w": compared(error_w, diagonal(x, dw)),
        "error_x": compared(error_x, diagonal(dx, w)),
        "error_x_rounded": compared(diagonal(dx, w), diagonal(dx, wq)),
        "total": compared(
            (x @ w.t() - xq @ wq.t()).square().sum(dim=1).mean().item(), error_w + error_x
        ),
        "delta_x": compared(
            (layer.rounded_x(scale) - x / scale).abs().mean().item(), dx.abs().mean().item() / s_k
        ),
        "delta_w": compared(
            (layer.rounded_w(scale) - w * scale).abs().mean().item(), dw.abs().mean().item() * s_k
        ),
    }


def orders(layer: Layer) -> dict[str, float]:
    """Figures 3 and 8 as shares.

    scale_order, range_order: of the pairs of channels with R_i > R_j (R: range of x), those with
    s_i > s_j, and those with R_i / s_i > R_j / s_j. rows_close: of the output rows, those whose
    range after scaling is within 5 % of s_k times the range before; rows_factor: the mean of that
    factor over s_k, rows_spread: its standard deviation over rows, relative.
    """
    e = layer.energies()
    scale = transform_from_energies(e, FORM, layer.x.dtype).scale
    ranges = layer.x.amax(dim=0) - layer.x.amin(dim=0)
    wider = ranges[:, None] > ranges[None]
    rows, scaled = (w.amax(dim=1) - w.amin(dim=1) for w in (layer.weight, layer.weight * scale))
    after = ranges / scale
    factor = scaled / rows / e.anchor_scale
    return {
        "scale_order": (scale[:, None] > scale[None])[wider].double().mean().item(),
        "range_order": (after[:, None] > after[None])[wider].double().mean().item(),
        "rows_close": ((factor - 1).abs() < CLOSE).double().mean().item(),
        "rows_factor": factor.mean().item(),
        "rows_spread": (factor.std() / factor.mean()).item(),
    }


def with_cross_terms(layer: Layer, steps: int = 50) -> Tensor:
    """The scale (C,) that minimises the modelled loss with its cross terms, from that of GPS on, by
    L-BFGS in log u.

        loss(u) = u^T (dx^T dx o W^^T W^) u + (1/u)^T (x^T x o dW^T dW) (1/u),   o: element by element
    """
    e = layer.energies()
    x = layer.x
    anchor = choose_qparams(x[:, e.anchor], layer.activations.at("tensor"))
    dx = fake_quantize(x, anchor, layer.activations.levels) - x
    wq = layer.rounded_w()
    dw = wq - layer.weight
    a = (dx.t() @ dx) * (wq.t() @ wq)
    b = (x.t() @ x) * (dw.t() @ dw)
    start = optimal_ratio(e, FORM)
    unit = start @ a @ start + (1 / start) @ b @ (1 / start)
    log_u = start.log().requires_grad_()
    solver = torch.optim.LBFGS([log_u], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        u = log_u.exp()
        value = (u @ a @ u + (1 / u) @ b @ (1 / u)) / unit
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return e.anchor_scale * log_u.detach().exp()


def output_errors(layer: Layer) -> dict[str, float]:
    """Mean |output error| without scaling, with SmoothQuant, with GPS, with GPS and its cross terms, and with GPS after
    SmoothQuant, as the released code has it."""
    smooth = smoothquant_step(layer.x, layer.weight).scale
    smoothed = replace(layer, x=layer.x / smooth, weight=layer.weight * smooth)
    return {
        "none": layer.output_error(),
        "smoothquant": layer.output_error(smooth),
        "gps": layer.output_error(layer.gps()),
        "gps_cross": layer.output_error(with_cross_terms(layer)),
        "smoothquant_gps": smoothed.output_error(smoothed.gps()),
    }


def layers(of: Run, track: Track) -> dict[str, Layer]:
    """The first qkv and fc1 of the model with their inputs, in float64."""
    adapter = of.generator.adapter
    plan = build_recipe(of.config)
    rows = calibration_set(of, track)
    adapter.prepare()
    sites = {kind: next(s for s in adapter.sites if s.kind == kind) for kind in LAYERS}
    seen = capture_inputs(
        adapter, rows.batches(of.config.calib.batch), list(sites.values()), exclude_sinks=True
    )
    weights = {
        s.name: torch.cat([adapter.model.get_submodule(c).weight for c in s.consumers])
        for s in sites.values()
    }
    return {
        kind: Layer(seen[s.name].double(), weights[s.name].double(), plan.activations, plan.weights)
        for kind, s in sites.items()
    }


def of_layers(measure: Callable[[Layer], dict[str, Any]]) -> Measure:
    """The measurement that applies `measure` to the first qkv and fc1; nested names are joined by
    dots."""

    @torch.no_grad()
    def found(of: Run, options: Mapping[str, Any], track: Track, folder: Path) -> Found:
        metrics: dict[str, float] = {}
        for kind, layer in layers(of, track).items():
            for name, value in measure(layer).items():
                nested = (
                    {f".{k}": v for k, v in value.items()}
                    if isinstance(value, dict)
                    else {"": value}
                )
                metrics |= {f"{kind}.{name}{tail}": v for tail, v in nested.items()}
        return metrics, {}

    return found
