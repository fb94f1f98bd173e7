"""`ptq4arvg_released`: PTQ4ARVG as the released code runs it on RAR, calibration by calibration.

The same pieces as the pipeline in another order. All calibrations see the whole calibration set in one batch, and a
quantizer fixes its parameters when the first activation reaches it, so everything upstream is quantized already.

    1 SmoothQuant on full-precision inputs of qkv, fc1 (sinks left out) and head; undone in the weights, not yet folded
    2 first calibration of everything; qkv, fc1 and head inputs per channel, their sinks neither counted nor quantized
    3 symmetric shift from the per-channel parameters; fold both
    4 recalibrate inputs and weights of qkv, fc1 and head, and the AdaLN weights
    5 GPS on full-precision inputs of qkv and fc1 with the parameters of 4; a second shift for the head; fold
    6 recalibrate the same, qkv and fc1 now token-wise and the head per tensor; proj, fc2, the attention products and
      the AdaLN inputs keep the parameters of 2

Ranges of weights, of per-channel and of per-tensor inputs include zero, token-wise ones do not. A GPS channel without
activation error gets the scale 1 (not s_k). The other families differ; only RAR's sequence is implemented here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ptq import folding
from ptq.gps import energies, optimal_ratio, widest_channel
from ptq.grouping import WHOLE, broadcast
from ptq.inputs import collect
from ptq.modules import OnlineTransform, QuantLinear, QuantMatMul, swap
from ptq.numerics import QParams, fake_quant
from ptq.quantizers import Passthrough, calibrated, with_params
from ptq.recipe import Recipe
from ptq.shift import centring_shift
from ptq.smoothquant import smoothquant
from ptq.types import Adapter, CalibrationSet, ConfigError, InputTransform, QuantSpec, Segments, Site

Track = Callable[[Iterable, str], Iterable]


class FirstUse(nn.Module):
    """A quantizer that takes its parameters from the first tensor it sees; leading `sinks` tokens pass untouched."""

    def __init__(self, spec: QuantSpec, segments: Segments = WHOLE, sinks: int = 0) -> None:
        super().__init__()
        self.spec, self.segments, self.sinks = spec, segments, sinks
        self.params: QParams | None = None

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        kept = x
        if self.sinks:
            kept, positions = x[:, self.sinks:], None
        if self.params is None:
            self.params = calibrated(kept, self.spec, positions, self.segments)
        quantized = self.quantizer()(kept, positions)
        return torch.cat((x[:, :self.sinks], quantized), dim=1) if self.sinks else quantized

    def quantizer(self) -> nn.Module:
        return with_params(self.spec, self.params, self.segments)


class ReleasedRun:
    """The state that the stages share: full-precision linears, weight parameters and input quantizers by site."""

    def __init__(self, adapter: Adapter, calibration: CalibrationSet, recipe: Recipe) -> None:
        self.adapter, self.model, self.rows, self.recipe = adapter, adapter.model, calibration.rows, recipe
        self.sites = recipe.scope.sites(adapter)
        self.smoothed = [s for s in self.sites if s.kind in ("qkv", "fc1", "head")]
        self.linears = {s.name: self.model.get_submodule(s.name) for s in self.sites}
        self.weights = replace(recipe.weights, include_zero=True)
        self.uniform = replace(recipe.activations, include_zero=True)
        self.weight_params: dict[str, QParams] = {}
        self.inputs: dict[str, FirstUse] = {}
        self.online: dict[str, InputTransform] = {}
        self.transforms: dict[str, InputTransform] = {}
        self.products = [p.name for p in recipe.scope.products(adapter)]
        for name in self.products:
            product = QuantMatMul()
            product.a, product.b = FirstUse(self.uniform), FirstUse(self.uniform)
            swap(self.model, name, product)

    def full_precision(self) -> None:
        """Put the unquantized linears back."""
        for name, linear in self.linears.items():
            swap(self.model, name, linear)

    def install(self) -> None:
        """Put quantized linears in, rounding weights (anew where their parameters are missing)."""
        for site in self.sites:
            linear = QuantLinear(self.linears[site.name])
            if site.name not in self.weight_params:
                self.weight_params[site.name] = calibrated(linear.weight, self.weights)
            linear.weight_params = self.weight_params[site.name]
            linear.weight = fake_quant(
                linear.weight, broadcast(linear.weight_params, self.weights), self.weights.levels
            )
            if site.name in self.online:
                linear.transform = OnlineTransform(self.online[site.name])
            linear.input = self.inputs[site.name]
            swap(self.model, site.name, linear)

    def calibrate(self) -> Tensor:
        """One quantized forward pass; every quantizer without parameters takes them from it."""
        self.install()
        return self.adapter.forward(self.rows)

    def site_inputs(self) -> dict[str, Tensor]:
        """Full-precision inputs (N, C) of the smoothed sites, sinks left out where the site has any."""
        self.full_precision()
        products = {name: self.model.get_submodule(name) for name in self.products}
        for name in products:
            swap(self.model, name, QuantMatMul())
        try:
            return collect(self.adapter, [self.rows], self.smoothed, exclude_sinks=True)
        finally:
            for name, product in products.items():
                swap(self.model, name, product)

    def forget(self, per_channel: bool) -> None:
        """Drop the parameters that a fold has invalidated; qkv, fc1 and head inputs get new quantizers."""
        for site in self.smoothed:
            if per_channel:
                self.inputs[site.name] = FirstUse(self.uniform.at("in_channel"), sinks=site.sinks)
            elif site.kind == "head":
                self.inputs[site.name] = FirstUse(self.uniform)
            else:
                self.inputs[site.name] = FirstUse(self.recipe.activations.at("token_static"), site.segments)
            del self.weight_params[site.name]
        for site in self.sites:
            if site.kind == "adaln":
                del self.weight_params[site.name]

    def fold(self, site: Site, transform: InputTransform) -> None:
        folding.apply(self.model, site, transform)
        self.transforms[site.name] = self.transforms[site.name].then(transform)

    # The stages ---------------------------------------------------------------------------------------------------

    def smooth(self) -> None:
        inputs = self.site_inputs()
        for site in self.smoothed:
            transform = smoothquant(inputs[site.name], self.linears[site.name].weight, self.recipe.alpha)
            folding.apply_to_consumers(self.model, site, transform)
            self.online[site.name] = self.transforms[site.name] = transform

    def first_calibration(self) -> Tensor:
        for site in self.sites:
            if site in self.smoothed:
                self.inputs[site.name] = FirstUse(self.uniform.at("in_channel"), sinks=site.sinks)
            else:
                self.inputs[site.name] = FirstUse(self.recipe.activations.at("token_static"), site.segments)
        return self.calibrate()

    def shift(self) -> Tensor:
        self.full_precision()
        for site in self.smoothed:
            shift = centring_shift(self.inputs[site.name].params, self.uniform.bits)
            centre = InputTransform(torch.ones_like(shift), shift)
            folding.apply_to_consumers(self.model, site, centre)
            self.transforms[site.name] = self.online.pop(site.name).then(centre)
            folding.apply_to_producer(self.model, site.fold, self.transforms[site.name])
        self.forget(per_channel=True)
        return self.calibrate()

    def scale(self) -> Tensor:
        inputs = self.site_inputs()
        for site in self.smoothed:
            params = self.inputs[site.name].params
            if site.kind == "head":
                shift = centring_shift(params, self.uniform.bits)
                self.fold(site, InputTransform(torch.ones_like(shift), shift))
                continue
            x, weight = inputs[site.name], self.linears[site.name].weight
            rounded = fake_quant(weight, broadcast(self.weight_params[site.name], self.weights), self.weights.levels)
            anchor, _ = widest_channel(x)
            e = energies(x, weight, rounded, params[anchor], self.uniform.levels, self.recipe.gps_form)
            scale = e.anchor_scale * optimal_ratio(e, self.recipe.gps_form)
            scale = torch.where(e.activation_error == 0, torch.ones_like(scale), scale).to(x.dtype)
            self.fold(site, InputTransform(scale, torch.zeros_like(scale)))
        self.forget(per_channel=False)
        return self.calibrate()

    def freeze(self) -> None:
        """Replace every first-use quantizer by the plain one with its parameters."""
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, FirstUse):
                    setattr(module, name, child.quantizer() if child.params is not None else Passthrough())


def quantize_released(
    adapter: Adapter, calibration: CalibrationSet, recipe: Recipe, track: Track
) -> dict[str, InputTransform]:
    """Run the released sequence on the adapter's model in place; returns the total transform per site.

    Raises:
        ConfigError: the model is not of the RAR family.
    """
    if any(s.fold is None for s in adapter.sites if s.kind in ("qkv", "fc1", "head")) or adapter.sinks != 2:
        raise ConfigError("method: ptq4arvg_released is implemented for the rar family only")
    run = ReleasedRun(adapter, calibration, recipe)
    for stage in track((run.smooth, run.first_calibration, run.shift, run.scale), "released calibration"):
        stage()
    run.freeze()
    return run.transforms
