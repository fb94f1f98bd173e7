"""`ptq4arvg_released`: PTQ4ARVG as the released code runs it, calibration by calibration.

The same pieces as the pipeline in another order. A quantizer takes its parameters from the
activations that reach it, so everything upstream is quantized already, and keeps them when the
calibration ends.

    1  SmoothQuant on full-precision inputs of qkv, fc1 (sinks left out) and head;
       undone in the weights, not yet folded
    2  first calibration of everything; qkv, fc1 and head inputs per channel,
       their sinks neither counted nor quantized
    3  symmetric shift from the per-channel parameters; fold both
    4  recalibrate inputs of qkv, fc1 and head, and the weights
    5  GPS on full-precision inputs of qkv, fc1 and head with the parameters of 4; fold
    6  recalibrate the same, qkv and fc1 now token-wise and the head per tensor

Families differ in the details that `families.py` holds. A gated MLP's second linear (PAR's w3)
takes part in none of the statistics: until stage 3 it reads the activation as it is, then it gets
the scale and shift that were found for the first one. A GPS channel without activation error gets
the scale 1 (not s_k).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ptq import folding
from ptq.gps import error_energies, optimal_ratio, widest_channel
from ptq.inputs import capture_inputs
from ptq.methods.shift import from_params
from ptq.methods.smoothquant import smoothquant_step
from ptq.modules import OnlineTransform, QuantLinear, QuantMatMul, swap_module
from ptq.numbers.grouping import WHOLE, broadcast_params
from ptq.numbers.numerics import QParams, fake_quantize
from ptq.numbers.quantizers import Passthrough
from ptq.recipe import Recipe
from ptq.released.families import BLOCK, RELEASED
from ptq.released.running_quantizer import (
    RunningQuantizer,
    choose_released_qparams,
    running_average,
)
from ptq.sites import Adapter, CalibrationSet, Segments, Site, Track
from ptq.spec import ConfigError, QuantSpec, require
from ptq.transform import InputTransform

SMOOTHED = ("qkv", "fc1", "head")


class ReleasedRun:
    """The state that the stages share: full-precision linears, weight parameters and input
    quantizers by linear."""

    def __init__(
        self, adapter: Adapter, calibration: CalibrationSet, recipe: Recipe, batch: int
    ) -> None:
        """`batch`: rows of a minibatch, where the family has them; what is left over is dropped."""
        self.adapter = adapter
        self.model = adapter.model
        self.recipe = recipe
        self.behaviour = RELEASED[adapter.family]
        self.batches = [calibration.rows]
        if self.behaviour.averaging:
            batch = min(batch, len(calibration))
            self.batches = calibration.batches(batch)[: len(calibration) // batch]
        self.sites = [self.behaviour.of(s) for s in recipe.scope.sites(adapter)]
        self.smoothed = [s for s in self.sites if s.kind in SMOOTHED]
        self.linears = {
            name: self.model.get_submodule(name) for s in self.sites for name in s.consumers
        }
        self.weights = replace(recipe.weights, include_zero=self.behaviour.include_zero)
        self.uniform = replace(recipe.activations, include_zero=self.behaviour.include_zero)
        self.weight_params: dict[str, QParams] = {}
        self.inputs: dict[str, RunningQuantizer] = {}
        self.products: dict[str, QuantMatMul] = {}
        self.online: dict[str, InputTransform] = {}
        self.transforms: dict[str, InputTransform] = {}

    def running(
        self, spec: QuantSpec, segments: Segments = WHOLE, **settings: object
    ) -> RunningQuantizer:
        return RunningQuantizer(spec, segments, averaging=self.behaviour.averaging, **settings)

    def renew_inputs(self, sites: list[Site], per_channel: bool) -> None:
        """New input quantizers: for smoothed sites per channel or as in the end, for others as in
        the end."""
        for site in sites:
            for name in site.consumers:
                if per_channel and site.kind in SMOOTHED:
                    self.inputs[name] = self.running(
                        self.uniform.at("in_channel"), sinks=site.sinks
                    )
                elif len(site.segments) == 1:
                    self.inputs[name] = self.running(self.uniform)
                else:
                    spec = self.recipe.activations.at("token_static")
                    self.inputs[name] = self.running(
                        spec, site.segments, dtype=self.behaviour.token_dtype
                    )

    def renew_products(self) -> None:
        for site in self.recipe.scope.products(self.adapter):
            product = self.products[site.name] = QuantMatMul()
            weights = replace(self.uniform, format=self.behaviour.softmax)
            product.a = self.running(weights if site.kind == "pv" else self.uniform)
            product.b = self.running(self.uniform)

    def full_precision(self) -> None:
        """Put the unquantized linears and products back."""
        for name, linear in self.linears.items():
            swap_module(self.model, name, linear)
        for name in self.products:
            swap_module(self.model, name, QuantMatMul())

    def calibrate(self) -> None:
        """Put quantized modules in, with weights rounded anew, and run the rows; new quantizers
        find their parameters.
        """
        for name, linear in self.linears.items():
            quantized = QuantLinear(linear)
            params = self.weight_params[name] = quantized.weight_params = choose_released_qparams(
                linear.weight, self.weights
            )
            quantized.weight = fake_quantize(
                linear.weight, broadcast_params(params, self.weights), self.weights.levels
            )
            if name in self.online:
                quantized.transform = OnlineTransform(self.online[name])
            quantized.input = self.inputs[name]
            swap_module(self.model, name, quantized)
        for name, product in self.products.items():
            swap_module(self.model, name, product)
        for rows in self.batches:
            self.adapter.forward(rows)
        for module in self.model.modules():
            if isinstance(module, RunningQuantizer):
                module.frozen = True

    def solve(
        self, sites: list[Site], step: Callable[[Site, Tensor], Tensor]
    ) -> dict[str, InputTransform]:
        """The scale that `step` finds from the full-precision inputs (N, C) of each site, sinks
        left out."""
        self.full_precision()
        scales: dict[str, Tensor] = {}
        for rows in self.batches:
            inputs = capture_inputs(self.adapter, [rows], sites, exclude_sinks=True)
            for site in sites:
                scale = step(site, inputs[site.name])
                if self.behaviour.averaging:
                    scale = running_average(scale, scales.get(site.name))
                scales[site.name] = scale
        transforms: dict[str, InputTransform] = {}
        for name, scale in scales.items():
            transforms[name] = InputTransform(scale, torch.zeros_like(scale))
        return transforms

    def shift_of(self, site: Site) -> InputTransform:
        return from_params(self.inputs[site.name].params, self.uniform.bits)

    # The stages

    def smooth(self) -> None:
        def step(site: Site, x: Tensor) -> Tensor:
            return smoothquant_step(x, self.linears[site.name].weight, self.recipe.alpha).scale

        self.online = self.solve(self.smoothed, step)
        for site in self.smoothed:
            folding.apply_to_consumers(self.model, first_reader(site), self.online[site.name])
        self.transforms = dict(self.online)

    def first_calibration(self) -> None:
        self.renew_inputs(self.sites, per_channel=True)
        self.renew_products()
        self.calibrate()

    def shift(self) -> None:
        self.full_precision()
        for site in self.smoothed:
            shift = self.shift_of(site)
            total = self.transforms[site.name] = self.online.pop(site.name).then(shift)
            # stage 1 has undone the scale in the first linear; the others see both at once
            folding.apply_to_consumers(self.model, first_reader(site), shift)
            folding.apply_to_consumers(
                self.model, replace(site, consumers=site.consumers[1:]), total
            )
            folding.apply_to_producer(self.model, site.fold, total)
        self.renew_inputs(self.smoothed, per_channel=True)
        self.calibrate()

    def scale(self) -> None:
        scaled = [s for s in self.smoothed if s.kind != "head" or self.behaviour.gps_head]
        solved = self.solve(scaled, self.gps)
        for site in self.smoothed:
            transform = solved[site.name] if site.name in solved else self.shift_of(site)
            folding.apply_transform(self.model, site, transform)
            self.transforms[site.name] = self.transforms[site.name].then(transform)
        self.renew_inputs(self.sites if self.behaviour.renew else self.smoothed, per_channel=False)
        if self.behaviour.renew:
            self.renew_products()
        self.calibrate()

    def gps(self, site: Site, x: Tensor) -> Tensor:
        """The GPS scale (C,) from inputs x (N, C)."""
        weight = self.linears[site.name].weight
        form = self.recipe.gps_form
        # (O, C), with the parameters of stage 4 and not found anew
        rounded = fake_quantize(
            weight,
            broadcast_params(self.weight_params[site.name], self.weights),
            self.weights.levels,
        )
        anchor, _ = widest_channel(x)
        anchor_params = self.inputs[site.name].params[anchor]  # still per channel, so one pair
        energies = error_energies(x, weight, rounded, anchor_params, self.uniform.levels, form)
        scale = energies.anchor_scale * optimal_ratio(energies, form)  # (C,)
        without_error = energies.activation_error == 0
        return torch.where(without_error, torch.ones_like(scale), scale).to(x.dtype)

    def freeze(self) -> None:
        """Replace every running quantizer by the plain one with its parameters."""
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, RunningQuantizer):
                    setattr(
                        module,
                        name,
                        child.quantizer() if child.params is not None else Passthrough(),
                    )


def first_reader(site: Site) -> Site:
    """The site as its first linear alone reads it."""
    return replace(site, consumers=site.consumers[:1])


def in_blocks(calibration: CalibrationSet) -> CalibrationSet:
    """The rows in the released order for minibatches: every block has its share of both kinds,
    conditional ones first.
    """
    conditional = calibration.conditional
    kinds = torch.stack((conditional, ~conditional)).long()  # (2, n)
    rank = (kinds * kinds.cumsum(1)).sum(0) - 1  # (n,), number of a row among its kind
    total = (kinds * kinds.sum(1, keepdim=True)).sum(0)  # (n,), rows of its kind
    block = rank * max(1, len(calibration) // BLOCK) // total  # (n,)
    # by block, conditional rows first; stable keeps the order within a kind
    order = (2 * block + kinds[1]).argsort(stable=True)
    rows = {key: value[order.to(value.device)] for key, value in calibration.rows.items()}
    return CalibrationSet(rows, conditional[order], calibration.meta)


def quantize_released(
    adapter: Adapter, calibration: CalibrationSet, recipe: Recipe, batch: int, track: Track
) -> dict[str, InputTransform]:
    """Run the released sequence on the adapter's model in place; returns the total transform per
    site.

    Args:
        batch: rows of a minibatch, where the family's code has minibatches (64 there).

    Raises:
        ConfigError: the rows are not laid out as in the released code, or nothing can absorb a
            site's scale and shift.
    """
    require("calib.layout", adapter.layout, ("released",))
    for site in recipe.scope.sites(adapter):
        if site.kind in SMOOTHED and site.fold is None:
            raise ConfigError(
                "method: ptq4arvg_released needs a norm or AdaLN of its own in front of "
                f"{site.name}"
            )
    if RELEASED[adapter.family].averaging:
        calibration = in_blocks(calibration)
    run = ReleasedRun(adapter, calibration, recipe, batch)
    for stage in track(
        (run.smooth, run.first_calibration, run.shift, run.scale), "released calibration"
    ):
        stage()
    run.freeze()
    return run.transforms
