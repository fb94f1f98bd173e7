"""Fitting one site: sink shift, input parameters, weights, biases, in this order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq.modules import QuantLinear
from ptq.numbers.numerics import NonFiniteError, QParams
from ptq.numbers.quantizers import Clip, choose_qparams, run_time_quantizer
from ptq.recipe import Recipe
from ptq.registry.entries import ROUNDERS
from ptq.rounding import NearestRounder, SiteRounder
from ptq.staq.places import InputPlace, Tokens
from ptq.staq.positions import TableQuantizer, fit_positions, segments_of
from ptq.staq.rounded_inputs import energy_weights, weighted_mean
from ptq.staq.sink_shift import SinkShift
from ptq.stwq import input_spec, static_quantizer


@dataclass(frozen=True)
class SiteData:
    """What a site's weights are rounded for.

    Attributes:
        exact: inputs x (N, C) of the full-precision model. given: the inputs that arrive, without
            the sinks' mean. rounded: what the input quantizer makes of these.
        is_sink: (N,) of tokens that are shifted. shift: mu (C,); None if no token is.
        token_weights: (N,).
    """

    exact: Tensor
    given: Tensor
    rounded: Tensor
    is_sink: Tensor
    shift: Tensor | None
    token_weights: Tensor

    def means(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Means (C,) in float64 of x (N, C): over the tokens whose outputs the bias corrects, and
        over the shifted sinks."""
        if self.shift is None:
            return weighted_mean(x, self.token_weights), None
        ones = torch.ones_like(self.token_weights)
        rest = ~self.is_sink
        return (
            weighted_mean(x[rest], ones[rest]),
            weighted_mean(x[self.is_sink], ones[self.is_sink]),
        )


def fit_site(
    place: InputPlace,
    exact: Tokens,
    given: Tokens,
    recipe: Recipe,
    fixed: QParams | None,
    clips: Mapping[str, Clip],
) -> None:
    """Give a site its input quantizer, and its linears their weights and biases.

    Args:
        exact: its inputs in the full-precision model. given: the same tokens as they arrive.
        fixed: input parameters that a method has found. clips: by linear, of its weight.
    """
    site = place.site
    positions = given.positions
    is_sink = positions < site.sinks
    shift = None
    inputs = given.values
    if recipe.sink_shift and site.kind in recipe.options.sink_shift.sites and bool(is_sink.any()):
        shift = inputs[is_sink].mean(dim=0)  # (C,)
        inputs = torch.where(is_sink[:, None], inputs - shift, inputs)  # (N, C)
    quantizer = fit_input(place, Tokens(inputs, positions), recipe, fixed)
    rounded = quantizer(inputs[None], positions)[0]  # (N, C), as one sequence of N tokens
    stacked = torch.cat([linear.weight for linear in place.linears])  # (O, C)
    weights = energy_weights(exact.values, positions, stacked, site.segments)
    data = SiteData(exact.values, inputs, rounded, is_sink, shift, weights)
    round_linears(place, data, recipe, clips)
    place.put(quantizer)


def fit_input(
    place: InputPlace, tokens: Tokens, recipe: Recipe, fixed: QParams | None
) -> nn.Module:
    """The quantizer of a site's input."""
    spec = input_spec(place.site, recipe.activations, recipe.stwq)
    if fixed is not None and spec.granularity == "tensor":
        return static_quantizer(spec, fixed, place.site.segments)
    if spec.is_dynamic or not spec.is_rounded:
        return run_time_quantizer(spec, tokens.values.abs().amax())
    if recipe.per_position:
        segments = segments_of(tokens.positions)
        params = fit_positions(tokens.values, tokens.positions, spec, segments)
        if spec.group_size is not None:  # tables have no groups
            return static_quantizer(spec.at("token_static"), params, segments)
        return TableQuantizer(spec.at("token_static"), params, segments)
    segments = place.site.segments
    params = choose_qparams(tokens.values[None], spec, tokens.positions, segments)
    return static_quantizer(spec, params, segments)


def round_linears(
    place: InputPlace, data: SiteData, recipe: Recipe, clips: Mapping[str, Clip]
) -> None:
    """Round the weights of the linears that read a site, and correct their biases."""
    exact_mean, exact_sinks = data.means(data.exact)
    rounded_mean, rounded_sinks = data.means(data.rounded)
    rounder = rounder_of(place, data, recipe)
    for name, linear in zip(place.site.consumers, place.linears):
        weight = linear.weight
        try:
            rounded, params = rounder(weight, clips.get(name))
        except NonFiniteError as error:
            raise NonFiniteError(f"{name}.weight: {error}") from error
        linear.weight = rounded
        linear.weight_params = params
        linear.weight_spec = recipe.weights
        sink_bias = None if data.shift is None else (weight @ data.shift).double()  # (O,)
        if recipe.bias_correction:
            moved = weight.double() @ exact_mean - rounded.double() @ rounded_mean  # (O,)
            add_bias(linear, moved)
            if data.shift is not None:
                at_sinks = weight.double() @ exact_sinks - rounded.double() @ rounded_sinks  # (O,)
                sink_bias = at_sinks - moved
        if data.shift is not None:
            bias = sink_bias.to(weight.dtype)
            linear.sink_shift = SinkShift(data.shift, bias, place.site.sinks)


def add_bias(linear: QuantLinear, added: Tensor) -> None:
    """Add to a linear's bias (O,), or make it one."""
    bias = added if linear.bias is None else linear.bias.double() + added
    linear.bias = bias.to(linear.weight.dtype)


def rounder_of(place: InputPlace, data: SiteData, recipe: Recipe) -> SiteRounder:
    """The recipe's rounder, made for one site."""
    if not recipe.weights.is_rounded:
        return NearestRounder(recipe, None)
    rounder = ROUNDERS[recipe.rounder]
    if rounder.reads == "nothing":
        return rounder.make(recipe, None)
    if rounder.reads == "site":
        return rounder.make(recipe, data)
    x = data.given
    if recipe.exclude_sinks and place.site.sinks:
        x = x[~data.is_sink]
    return rounder.make(recipe, x.t() @ x)
