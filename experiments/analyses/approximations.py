"""What the derivation of GPS approximates, for one layer: Table 8, Figures 3, 8 and 10.

Symbols as in `ptq/gps.py`. x (N, C): inputs without sink tokens, W (O, C): the weights that read
them, dx and dW their rounding errors under the quantizers that the layer would have (activations
static per tensor, weights per row), s the GPS scale, k the widest channel. Everything in float64;
sums over outputs, means over tokens. The steps of the paper, exact and approximate:

    error_w     mean |x dW^T|^2             sum_i mean x_i^2 sum_o dW_oi^2       no cross terms
    error_x     mean |dx W^T|^2             sum_i mean dx_i^2 sum_o W_oi^2       no cross terms
    error_x_rounded
                sum_i mean dx_i^2 sum W_i^2 the same with rounded W              released code
    total       mean |x W^T - x^ W^^T|^2    error_w + error_x                    errors apart
    delta_x     mean |Q(x / s) - x / s|     mean |dx| / s_k                      Eq. 10
    delta_w     mean |Q(W s) - W s|         s_k mean |dW|                        Eq. 10
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.analyses.data import GPS_KINDS, Analysis, Measured, calibration_set
from experiments.config.recipe import build_recipe
from experiments.run.preparation import Run
from ptq.gps import Energies, error_energies, optimal_ratio, transform_from_energies, widest_channel
from ptq.inputs import capture_inputs
from ptq.methods.smoothquant import smoothquant_step
from ptq.numbers.numerics import fake_quantize
from ptq.numbers.quantizers import choose_qparams, fake_quantize_weight
from ptq.pipeline import Track
from ptq.types import QuantSpec, Site

FORM = "squares"
CLOSE = 0.05  # of Figure 8
SOLVER_STEPS = 50


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
        qparams = choose_qparams(x, self.activations.at("tensor"))
        return fake_quantize(x, qparams, self.activations.levels)

    def rounded_w(self, scale: Tensor | float = 1.0) -> Tensor:
        """Q(W s)."""
        return fake_quantize_weight(self.weight * scale, self.weights)[0]

    def energies(self) -> Energies:
        """The error energies that GPS balances."""
        channel, *_ = widest_channel(self.x)
        anchor = choose_qparams(self.x[:, channel], self.activations.at("tensor"))
        return error_energies(
            self.x, self.weight, self.rounded_w(), anchor, self.activations.levels, FORM
        )

    def gps_scale(self) -> Tensor:
        """The GPS scale (C,)."""
        return transform_from_energies(self.energies(), FORM, self.x.dtype).scale

    def output_error(self, scale: Tensor | float = 1.0) -> float:
        """Mean |x W^T - Q(x / s) Q(W s)^T|."""
        exact = self.x @ self.weight.t()  # (N, O)
        rounded = self.rounded_x(scale) @ self.rounded_w(scale).t()
        return mean_size(exact - rounded)


def mean_size(errors: Tensor) -> float:
    """Mean |error|."""
    return errors.abs().mean().item()


def compare_figures(real: float, approx: float) -> dict[str, float]:
    """An exact figure, its approximation, and their relative difference."""
    bias = abs(approx - real) / abs(real) if real else 0.0
    return {"real": real, "approx": approx, "bias": bias}


def error_power(errors: Tensor, weights: Tensor) -> float:
    """Mean over tokens of the squared length of errors (N, C) seen through weights (O, C)."""
    return mean_power(errors @ weights.t())


def mean_power(outputs: Tensor) -> float:
    """Mean over tokens of the squared length of outputs (N, O)."""
    return outputs.square().sum(dim=1).mean().item()


def diagonal_power(errors: Tensor, weights: Tensor) -> float:
    """`error_power` without the terms between different channels."""
    return (errors.square().mean(dim=0) * weights.square().sum(dim=0)).sum().item()


def step_biases(layer: Layer) -> dict[str, dict[str, float]]:
    """Every step's exact value, approximation, and relative difference (Table 8)."""
    x = layer.x
    w = layer.weight
    x_rounded = layer.rounded_x()
    w_rounded = layer.rounded_w()
    dx = x_rounded - x  # (N, C)
    dw = w_rounded - w  # (O, C)
    energies = layer.energies()
    scale = transform_from_energies(energies, FORM, x.dtype).scale
    anchor_scale = energies.anchor_scale  # s_k
    error_w = error_power(x, dw)
    error_x = error_power(dx, w)
    total = mean_power(x @ w.t() - x_rounded @ w_rounded.t())
    delta_x = mean_size(layer.rounded_x(scale) - x / scale)
    delta_w = mean_size(layer.rounded_w(scale) - w * scale)
    return {
        "error_w": compare_figures(error_w, diagonal_power(x, dw)),
        "error_x": compare_figures(error_x, diagonal_power(dx, w)),
        "error_x_rounded": compare_figures(diagonal_power(dx, w), diagonal_power(dx, w_rounded)),
        "total": compare_figures(total, error_w + error_x),
        "delta_x": compare_figures(delta_x, mean_size(dx) / anchor_scale),
        "delta_w": compare_figures(delta_w, mean_size(dw) * anchor_scale),
    }


def order_shares(layer: Layer) -> dict[str, float]:
    """Figures 3 and 8 as shares.

    Returns:
        scale_order, range_order: of the pairs of channels with R_i > R_j (R: range of x), those
            with s_i > s_j, and those with R_i / s_i > R_j / s_j.
        rows_close: of the output rows, those whose range after scaling is within 5 % of s_k times
            the range before.
        rows_factor: the mean over rows of that factor over s_k.
        rows_spread: its standard deviation over rows, relative.
    """
    energies = layer.energies()
    scale = transform_from_energies(energies, FORM, layer.x.dtype).scale  # (C,)
    ranges = layer.x.amax(dim=0) - layer.x.amin(dim=0)  # (C,)
    scaled_ranges = ranges / scale
    is_wider = ranges[:, None] > ranges[None]  # (C, C)
    row_ranges = range_of_rows(layer.weight)  # (O,)
    factor = range_of_rows(layer.weight * scale) / row_ranges / energies.anchor_scale
    return {
        "scale_order": share_in_order(scale, is_wider),
        "range_order": share_in_order(scaled_ranges, is_wider),
        "rows_close": ((factor - 1).abs() < CLOSE).double().mean().item(),
        "rows_factor": factor.mean().item(),
        "rows_spread": (factor.std() / factor.mean()).item(),
    }


def range_of_rows(weight: Tensor) -> Tensor:
    """Largest minus smallest value of every row (O,) of a weight (O, C)."""
    return weight.amax(dim=1) - weight.amin(dim=1)


def share_in_order(values: Tensor, pairs: Tensor) -> float:
    """Of the pairs (C, C) of channels, the share in which the first has the greater value (C,)."""
    is_greater = values[:, None] > values[None]  # (C, C)
    return is_greater[pairs].double().mean().item()


def scale_with_cross_terms(layer: Layer) -> Tensor:
    """The scale (C,) that minimises the modelled loss with its cross terms.

    Found by L-BFGS in log u, from the scale of GPS on (o: element by element):

        loss(u) = u^T (dx^T dx o W^^T W^) u + (1/u)^T (x^T x o dW^T dW) (1/u)
    """
    energies = layer.energies()
    x = layer.x
    anchor = choose_qparams(x[:, energies.anchor], layer.activations.at("tensor"))
    dx = fake_quantize(x, anchor, layer.activations.levels) - x
    w_rounded = layer.rounded_w()
    dw = w_rounded - layer.weight
    x_products = (dx.t() @ dx) * (w_rounded.t() @ w_rounded)  # (C, C)
    w_products = (x.t() @ x) * (dw.t() @ dw)  # (C, C)

    def modelled_loss(u: Tensor) -> Tensor:
        return u @ x_products @ u + (1 / u) @ w_products @ (1 / u)

    start = optimal_ratio(energies, FORM)  # (C,)
    start_loss = modelled_loss(start)  # so that the solver's tolerances suit every layer
    log_u = start.log().requires_grad_()
    solver = torch.optim.LBFGS([log_u], max_iter=SOLVER_STEPS, line_search_fn="strong_wolfe")

    def relative_loss() -> Tensor:
        solver.zero_grad()
        loss = modelled_loss(log_u.exp()) / start_loss
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(relative_loss)
    return energies.anchor_scale * log_u.detach().exp()  # s = s_k u


def output_errors(layer: Layer) -> dict[str, float]:
    """Mean |output error| under five scales (Figure 10).

    None, SmoothQuant's, that of GPS, that of GPS with cross terms, and that of GPS after
    SmoothQuant, as the released code has it.
    """
    smooth_scale = smoothquant_step(layer.x, layer.weight).scale
    smoothed = replace(layer, x=layer.x / smooth_scale, weight=layer.weight * smooth_scale)
    return {
        "none": layer.output_error(),
        "smoothquant": layer.output_error(smooth_scale),
        "gps": layer.output_error(layer.gps_scale()),
        "gps_cross": layer.output_error(scale_with_cross_terms(layer)),
        "smoothquant_gps": smoothed.output_error(smoothed.gps_scale()),
    }


def capture_layers(run: Run, track: Track) -> dict[str, Layer]:
    """By kind the first qkv and fc1 of the model with their inputs, in float64."""
    adapter = run.generator.adapter
    recipe = build_recipe(run.config)
    rows = calibration_set(run, track)
    adapter.prepare()
    first_sites: dict[str, Site] = {}
    for site in adapter.sites:
        first_sites.setdefault(site.kind, site)
    sites = [first_sites[kind] for kind in GPS_KINDS]
    batches = rows.batches(run.config.calib.batch)
    inputs = capture_inputs(adapter, batches, sites, exclude_sinks=True)
    layers = {}
    for site in sites:
        weights = [adapter.model.get_submodule(name).weight for name in site.consumers]
        layers[site.kind] = Layer(
            x=inputs[site.name].double(),
            weight=torch.cat(weights).double(),  # (O, C), of all consumers
            activations=recipe.activations,
            weights=recipe.weights,
        )
    return layers


def measure_layers(measure: Callable[[Layer], Mapping[str, Any]]) -> Analysis:
    """The analysis that applies `measure` to the first qkv and fc1.

    Its metrics are called `<kind>.<name>`, or `<kind>.<name>.<figure>` where a name has several.
    """

    @torch.no_grad()
    def analyse(run: Run, options: Mapping[str, Any], track: Track, folder: Path) -> Measured:
        metrics: dict[str, float] = {}
        for kind, layer in capture_layers(run, track).items():
            for name, value in measure(layer).items():
                if isinstance(value, Mapping):
                    for figure, number in value.items():
                        metrics[f"{kind}.{name}.{figure}"] = number
                else:
                    metrics[f"{kind}.{name}"] = value
        return metrics, {}

    return analyse
