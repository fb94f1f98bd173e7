"""Rounding the weights, the step after the transforms: to nearest, or by GPTQ (Frantar et al.,
2023, arXiv 2210.17323).

Both put every row, or every group of columns in a row, on the grid of one scale and zero point.
These are found from the weight before (`recipe.weights`); GPTQ finds those of a group when it comes
to it, from what the columns before have left of it.

GPTQ rounds column after column and lets the columns still to come make up for the error, so that
the output changes least, || (W^ - W) X ||^2 = tr((W^ - W) H (W^ - W)^T):

    H = sum x x^T + damping mean(diag H) I,    H^-1 = U^T U  (U upper triangular)
    column i:   e = (w_i - Q(w_i)) / U_ii,     w_j <- w_j - e U_ij   for all j > i

A block of columns is finished before its errors reach the columns behind it, in one product (lazy
updates); the result does not depend on the block. With groups a block ends where a group does, so
that the columns of the next group are what they will be rounded from. (The official code finds the
parameters of a group that begins inside a block from columns without the updates of that block.)

Symbols. x (C,): transformed inputs of the site as its weight reads them, unrounded, sink tokens
left out if the recipe leaves them out of its statistics. W (O, C): the weight, or what a low-rank
branch leaves of it.

Official code (IST-DASLab/gptq, and the same inside QuaRot): the same damping and order of columns
(no act-order). It sets the columns of dead inputs to zero; here they are rounded to nearest. It
rounds layer after layer and takes H from the layers rounded so far; here all H are of the unrounded
model, so one pass over the calibration rows serves all sites, or, where their H need more than
`HESSIAN_BYTES`, some passes with as many sites each and the same result.

A low-rank branch is kept in 16 bits (bfloat16) from here on; the weight takes what that changes
before it is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ptq.inputs import watch_inputs
from ptq.modules import QuantLinear
from ptq.numbers.gptq_columns import graphed_columns, round_columns
from ptq.numbers.grouping import params_by_column
from ptq.numbers.numerics import NonFiniteError, QParams
from ptq.numbers.quantizers import (
    Clip,
    choose_by_rule,
    choose_weight_qparams,
    fake_quantize_weight,
)
from ptq.options import Settings, setting
from ptq.ranges import Integer, Number
from ptq.recipe import Recipe
from ptq.registry.entries import ROUNDERS, register_rounder, register_settings
from ptq.sites import Adapter, Rows, Site, Track
from ptq.spec import ConfigError, QuantSpec

HESSIAN_BYTES = 2 * 2**30  # of all H at a time


@register_settings("gptq")
@dataclass(frozen=True)
class GPTQSettings(Settings):
    """GPTQ rounding.

    Attributes:
        damping: share of the mean diagonal added to the Hessian.
        block: columns per lazy update.
    """

    damping: float = setting(0.01, Number(0, 100, above=True))
    block: int = setting(128, Integer(1, 65_536))


def inverse_factor(hessian: Tensor, damping: float, rounder: str = "gptq") -> Tensor:
    """U (C, C) in float64, upper triangular, with H^-1 = U^T U for H = `hessian` and its damping.

    A dead input, whose row of H is zero, is taken for one that is independent of all others.

    Args:
        rounder: whose damping it is, for the error.

    Raises:
        ConfigError: H is not positive definite.
    """
    h = hessian.double()  # (C, C)
    diagonal = h.diagonal().clone()  # (C,)
    added = torch.where(diagonal > 0, damping * diagonal.mean(), torch.ones_like(diagonal))  # (C,)
    damped = h + torch.diag(added)
    # H = R R^T with R upper triangular comes from the Cholesky factor of H turned by 180 degrees
    try:
        r = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    except torch.linalg.LinAlgError as error:
        raise ConfigError(
            f"method.options.{rounder}.damping: {damping} leaves a Hessian that is not positive "
            "definite, allowed is more"
        ) from error
    # U = R^-1
    identity = torch.eye(len(r), dtype=r.dtype, device=r.device)
    return torch.linalg.solve_triangular(r, identity, upper=True)


def gptq_round(
    weight: Tensor, factor: Tensor, params: QParams, spec: QuantSpec, block: int = 128
) -> Tensor:
    """The weight W (O, C) on the grid of known parameters, rounded by GPTQ.

    Args:
        factor: U (C, C) of `inverse_factor`.
        params: (O,) or (1,), or (C, O) of every column its own.
        block: columns per lazy update.
    """
    left = weight.t().clone(memory_format=torch.contiguous_format)  # (C, O), a column in one piece
    u = factor.to(weight.dtype)
    rounded = round_span(left, u, 0, len(left), params, spec, block)
    return rounded.t().contiguous()  # (O, C)


def round_span(
    left: Tensor, u: Tensor, start: int, stop: int, params: QParams, spec: QuantSpec, block: int
) -> Tensor:
    """The columns start .. stop - 1 on their grid, (n, O); those behind make up for their errors.

    Args:
        left: all columns (C, O), changed in place. u: GPTQ's factor (C, C).
        params: (O,) or (1,), or (n, O) of every column its own.
        block: columns per lazy update, at most.
    """
    by_column = params.scale.dim() == 2
    round_block = graphed_columns if left.is_cuda else round_columns
    rounded = torch.empty_like(left[start:stop])
    for first in range(start, stop, block):
        end = min(first + block, stop)
        place = slice(first - start, end - start)
        own = params[place] if by_column else params
        corner = u[first:end, first:end]
        rounded[place], errors = round_block(left[first:end], corner, own, spec)
        left[end:] -= u[first:end, end:].t() @ errors  # the lazy update, (C - end, O)
    return rounded


def gptq_round_groups(
    weight: Tensor, factor: Tensor, spec: QuantSpec, block: int = 128
) -> tuple[Tensor, QParams]:
    """The weight W (O, C) rounded by GPTQ, and its parameters (O * G,) of G groups of columns a
    row: those of a group are found when all columns before it are rounded.

    Args:
        factor: U (C, C) of `inverse_factor`.
        block: columns per lazy update, at most.
    """
    left = weight.t().clone(memory_format=torch.contiguous_format)  # (C, O)
    u = factor.to(weight.dtype)
    rounded = torch.empty_like(left)
    scales = []
    zero_points = []
    for start in range(0, len(left), spec.group_size):
        stop = min(start + spec.group_size, len(left))
        params = choose_by_rule(left[start:stop].t().contiguous(), spec)  # (O,)
        scales.append(params.scale)
        zero_points.append(params.zero_point)
        rounded[start:stop] = round_span(left, u, start, stop, params, spec, block)
    scale = torch.stack(scales, dim=1).flatten()  # (O * G,), row after row
    zero_point = torch.stack(zero_points, dim=1).flatten()
    return rounded.t().contiguous(), QParams(scale, zero_point)


class SiteRounder(Protocol):
    """A rounder, made for one site."""

    def __call__(self, weight: Tensor, clip: Clip | None) -> tuple[Tensor, QParams]:
        """A weight (O, C) rounded, and its parameters (O,)."""


@register_rounder("nearest")
class NearestRounder:
    """To nearest."""

    def __init__(self, recipe: Recipe, inputs: None) -> None:
        self.spec = recipe.weights

    def __call__(self, weight: Tensor, clip: Clip | None) -> tuple[Tensor, QParams]:
        return fake_quantize_weight(weight, self.spec, clip)


@register_rounder("gptq", reads="correlations", integers_only=True)
class GPTQRounder:
    """GPTQ for the sum of x x^T (C, C) of unrounded inputs."""

    def __init__(self, recipe: Recipe, correlations: Tensor) -> None:
        self.spec = recipe.weights
        self.block = recipe.options.gptq.block
        self.factor = inverse_factor(correlations, recipe.options.gptq.damping)  # (C, C)

    def __call__(self, weight: Tensor, clip: Clip | None) -> tuple[Tensor, QParams]:
        if self.spec.granularity == "group" and clip is None:
            return gptq_round_groups(weight, self.factor, self.spec, self.block)
        params = choose_weight_qparams(weight, self.spec, clip)
        grid = params
        if self.spec.granularity == "group":  # ranges that were learned stay
            grid = params_by_column(params, self.spec, weight)
        return gptq_round(weight, self.factor, grid, self.spec, self.block), params


def input_correlations(
    adapter: Adapter, sites: list[Site], batches: Sequence[Rows], exclude_sinks: bool
) -> Iterator[tuple[Site, Tensor]]:
    """Sums of x x^T (C, C) over the calibration rows, for every site.

    Each is let go when the next one is asked for.
    """
    linears = {site.name: adapter.model.get_submodule(site.name) for site in sites}
    sums: dict[str, Tensor] = {}
    for name, linear in linears.items():
        channels = linear.weight.shape[1]
        sums[name] = linear.weight.new_zeros((channels, channels))  # (C, C)

    def take(site: Site, x: Tensor) -> None:
        online = linears[site.name].transform
        if online is not None:
            x = online(x)  # H is of what the weight multiplies
        x = x.flatten(0, -2)  # (N, C)
        sums[site.name].addmm_(x.t(), x)

    with watch_inputs(adapter, sites, exclude_sinks, take):
        for part in batches:
            adapter.forward(part)
    for site in sites:
        yield site, sums.pop(site.name)


def memory_portions(adapter: Adapter, sites: list[Site]) -> list[list[Site]]:
    """The sites in order, cut so that the H of a portion need at most `HESSIAN_BYTES`.

    A site whose H needs more is a portion of its own.
    """
    portions: list[list[Site]] = []
    free_bytes = 0
    for site in sites:
        weight = adapter.model.get_submodule(site.name).weight
        hessian_bytes = weight.shape[1] ** 2 * weight.element_size()
        if not portions or hessian_bytes > free_bytes:
            portions.append([])
            free_bytes = HESSIAN_BYTES
        portions[-1].append(site)
        free_bytes -= hessian_bytes
    return portions


def site_rounders(
    adapter: Adapter, recipe: Recipe, batches: Sequence[Rows], track: Track
) -> Iterator[tuple[Site, SiteRounder]]:
    """The recipe's rounder, made site by site from what it reads of the inputs."""
    recipes: dict[str, Recipe] = {}  # of sites whose weights are rounded
    for site in recipe.scope.sites(adapter):
        own = recipe.at_site(adapter, site)
        if own.weights.is_rounded:
            recipes[site.name] = own
    sites = [site for site in recipe.scope.sites(adapter) if site.name in recipes]
    rounder = ROUNDERS[recipe.rounder]
    if rounder.reads == "nothing":
        for site in sites:
            yield site, rounder.make(recipes[site.name], None)
        return
    for number, portion in enumerate(memory_portions(adapter, sites)):
        tracked = track(batches, f"input correlations, pass {number + 1}")
        for site, sums in input_correlations(adapter, portion, tracked, recipe.exclude_sinks):
            yield site, rounder.make(recipes[site.name], sums)


@torch.no_grad()
def round_weights(
    adapter: Adapter,
    recipe: Recipe,
    batches: Sequence[Rows] = (),
    track: Track = lambda it, what: it,
    clips: Mapping[str, Clip] | None = None,
) -> None:
    """Round the weights of all quantizable linears in scope.

    Args:
        batches: calibration rows, for rounders that read the inputs.
        clips: by linear, in place of the recipe's range rule.

    Raises:
        NonFiniteError: a weight or an input holds NaN or infinity.
        ConfigError: GPTQ's damping is too small.
    """
    clips = clips or {}
    for site in recipe.scope.sites(adapter):
        linears = [adapter.model.get_submodule(name) for name in site.consumers]
        shorten_branch(linears)
        for linear in linears:
            linear.weight_spec = recipe.at_site(adapter, site).weights
    # until all are found, the model computes with none of them
    rounded_weights: dict[str, tuple[Tensor, QParams]] = {}
    for site, round_weight in site_rounders(adapter, recipe, batches, track):
        for name in site.consumers:
            weight = adapter.model.get_submodule(name).weight
            try:
                rounded_weights[name] = round_weight(weight, clips.get(name))
            except NonFiniteError as error:
                raise NonFiniteError(f"{name}.weight: {error}") from error
    for name, (rounded, params) in rounded_weights.items():
        linear = adapter.model.get_submodule(name)
        linear.weight = rounded
        linear.weight_params = params


def shorten_branch(linears: list[QuantLinear]) -> None:
    """Bring the low-rank branch of linears that read one site to 16 bits.

    What that changes goes into their weights, which are not rounded yet.
    """
    if linears[0].down is None:
        return
    down = _as_short(linears[0].down)  # (r, C)
    for linear in linears:
        up = _as_short(linear.up)  # (O, r)
        linear.weight = linear.weight + (linear.up @ linear.down - up @ down)
        linear.down = down
        linear.up = up


def _as_short(part: Tensor) -> Tensor:
    """The values of a tensor in 16 bits, in its own number format."""
    return part.bfloat16().to(part.dtype)
