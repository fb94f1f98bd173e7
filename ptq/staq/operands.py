"""Fitting quantizers of attention's operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ptq.numbers.grouping import WHOLE
from ptq.numbers.quantizers import choose_qparams, run_time_quantizer
from ptq.recipe import Recipe
from ptq.spec import BY_HEAD
from ptq.staq.numerators import NumeratorQuantizer, fit_key_weights
from ptq.staq.places import OperandPlace, Tokens
from ptq.staq.positions import TableQuantizer, fit_heads, segments_of
from ptq.stwq import static_quantizer


def fit_operands(
    places: Sequence[OperandPlace], given: Mapping[str, Tokens], recipe: Recipe, sinks: int
) -> None:
    """Put quantizers into the places of one attention.

    Args:
        given: what reaches those that depend on it. sinks: leading sink tokens.
    """
    key_weights = None
    values = given.get(next((p.label for p in places if p.role == "v"), ""))
    if recipe.key_weights and values is not None:
        key_weights = weights_of_sinks(values, sinks)
    for place in places:
        if place.spec.format == "numerators":
            place.put(NumeratorQuantizer(place.spec.levels, key_weights, sinks))
        elif place.spec.is_dynamic:
            tokens = given.get(place.label)
            largest = None if tokens is None else tokens.values.abs().amax()
            place.put(run_time_quantizer(place.spec, largest))
        elif place.role == "v" and recipe.per_head:
            place.put(fit_values(place, given[place.label], key_weights, sinks))
        else:
            place.put(fit_operand(place, given[place.label], recipe.per_head))


def weights_of_sinks(values: Tokens, sinks: int) -> torch.Tensor | None:
    """Key weights (H,) of what reaches V's place; None where there are no sinks, or nothing
    else."""
    is_sink = values.positions < sinks
    if not bool(is_sink.any()) or bool(is_sink.all()):
        return None
    return fit_key_weights(values.values, is_sink)


def fit_values(
    place: OperandPlace, tokens: Tokens, key_weights: torch.Tensor | None, sinks: int
) -> nn.Module:
    """V's quantizer: parameters per head, behind the key weights if there are any."""
    values = tokens.values  # (N, H, D)
    if key_weights is not None:
        is_sink = (tokens.positions < sinks)[:, None, None]  # (N, 1, 1)
        values = torch.where(is_sink, values * key_weights[:, None], values)  # (N, H, D)
    params = fit_heads(values, tokens.positions, place.spec, WHOLE)
    return TableQuantizer(place.spec.at("tensor"), params, WHOLE, key_weights, sinks)


def fit_static(place: OperandPlace, tokens: Tokens) -> nn.Module:
    """The quantizer of an operand at the granularity that its spec says."""
    spec = place.spec
    values = tokens.values
    if values.dim() == 3:
        values = values.transpose(0, 1)[None]  # (N, H, D) -> (1, H, N, D)
    elif spec.granularity in BY_HEAD:
        spec = spec.at("tensor")  # attention weights over several numbers of keys are one column
    params = choose_qparams(values, spec, tokens.positions, place.segments)
    return static_quantizer(spec, params, place.segments)


def fit_operand(place: OperandPlace, tokens: Tokens, per_head: bool) -> nn.Module:
    """The quantizer of q, k or p: per head and position, or one for the tensor."""
    if not per_head or place.role == "p":
        return fit_static(place, tokens)
    segments = segments_of(tokens.positions)
    params = fit_heads(tokens.values, tokens.positions, place.spec, segments)
    return TableQuantizer(place.spec.at("tensor"), params, segments)
