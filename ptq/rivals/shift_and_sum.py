"""Shift-and-sum (Moon and Ham, ICLR 2026, arXiv 2606.16131): values that get much attention are
rounded several times.

A value token v_j with a large attention weight passes its rounding error on to the output. It is
rounded 2^n times instead, with shifts that lie symmetrically around zero, and the results are
averaged (the sum of attention-value products does that, with a weight of 2^-n for each):

    v^_j = scale (mean_i round(v_j / scale + t_i)),      t_i = (2 i + 1) / 2^(n+1) - 1 / 2,  i < 2^n

By Hermite's identity, sum_k floor(y + k / m) = floor(m y), that is one rounding on a finer grid:

    mean_i round(u + t_i) = round(2^n u) / 2^n

which is how it is computed here. A token has 2^n duplicates by the attention that it gets from a
call's queries on average, in every head,

    n_j = clip(ceil(log2(mean_t p_tj / theta)), 0, 3)

and one theta for the model is the least with which all duplicates together take no more than a
share `budget` of its bit operations (multiplications times the bits of both factors).

What is the authors' (cvlab-yonsei/Shift-and-Sum, `quant/quantizer.py`, `compute_bitop.py`): the
formulas, at most eight duplicates, the budget of 1 %, what the duplicates cost (products, additions
in 16 bits, the mean and the count). What is other here:

- their ranges of values are found at run time over all tokens of a head that are cached; a cache of
  codes cannot do that, so they are static, per head or tensor (`quant.by_kind.v`). As in their
  code the cache holds values before they are rounded, since n_j depends on the queries to come.
- theta is searched among powers 2^(-j/64), on the first calibration rows; theirs among 10,000
  equal steps, on one image.
- queries that see the values together are those of a scale, so VAR alone has it.

Left out: their weights are rounded by block reconstruction (BRECQ). Of their method there are also
`log2_rows.py`, `two_sided.py` and the selector `resample` (`resampling.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.inputs import watch_tokens
from ptq.modules import QuantMatMul, swap_module
from ptq.numbers.grouping import params_of_channels
from ptq.numbers.numerics import QParams, fake_quantize
from ptq.numbers.quantizers import StaticQuantizer
from ptq.options import Settings, setting
from ptq.ranges import Number
from ptq.recipe import Recipe
from ptq.registry.entries import register_settings
from ptq.sites import Adapter, Rows, Segments, Site, product_segments
from ptq.spec import ConfigError

MOST = 3  # log2 of the largest number of duplicates
SUM_BITS = 16  # of sums of attention weights and of duplicates
STEPS = 64  # of theta, and bins of attention weights, per factor of two
OCTAVES = 32  # below one, that are told apart
ROWS = 8  # of the calibration set, that theta is searched on


@register_settings("shift_and_sum")
@dataclass(frozen=True)
class ShiftAndSumSettings(Settings):
    """budget: share of the model's bit operations that duplicates may take."""

    budget: float = setting(0.01, Number(0, 1))


class AttentionCount:
    """How often value tokens get how much attention, and what their duplicates cost.

    Args:
        channels: of a head. bits: of both operands.
    """

    def __init__(self, channels: int, bits: int) -> None:
        self.channels = channels
        self.bits = bits
        self.fixed = 0.0  # bit operations that do not depend on theta
        self.product = 0.0  # those of the product itself
        bins = STEPS * OCTAVES
        self.tokens = torch.zeros(bins, dtype=torch.float64)  # by log2 of their attention
        self.queries = torch.zeros(bins, dtype=torch.float64)  # the same times queries of a call

    def add(self, attention: Tensor, queries: Tensor) -> None:
        """Count mean attention (B, H, G, S) of calls with so many `queries` (G,)."""
        seen = attention > 0  # masked keys get none
        place = (torch.log2(attention.clamp(min=1e-30)) + OCTAVES) * STEPS
        place = place.long().clamp(0, len(self.tokens) - 1)[seen].cpu()
        each = queries[:, None].expand_as(attention)[seen].double().cpu()
        self.tokens.index_add_(0, place, torch.ones_like(each))
        self.queries.index_add_(0, place, each)
        pairs = float(each.sum())
        # the mean over queries, the threshold, and the count of duplicates
        self.fixed += SUM_BITS * pairs + (SUM_BITS + MOST + 1) * len(each)
        self.product += pairs * self.channels * self.bits**2

    def cost(self, theta_step: int) -> float:
        """Bit operations of all duplicates for theta = 2^(-theta_step / STEPS)."""
        lower_edge = torch.arange(len(self.tokens), dtype=torch.float64) - OCTAVES * STEPS
        # a bin has the values above its lower edge
        exponent = torch.floor((lower_edge + theta_step) / STEPS) + 1
        more = 2.0 ** exponent.clamp(0, MOST) - 1  # duplicates beyond the first
        sums = float((more * self.tokens).sum()) * SUM_BITS * self.channels
        products = float((more * self.queries).sum())
        return self.fixed + sums + products * (1 + self.channels * self.bits**2)


class ShiftedMatMul(QuantMatMul):
    """The product of attention weights with values, some of which are rounded several times.

    Args:
        product: whose quantizers it takes over. segments: of positions, a call each.
    """

    simulated = "values are rounded by the attention that they get"

    def __init__(self, product: QuantMatMul, segments: Segments) -> None:
        super().__init__()
        self.a = product.a
        self.b = product.b
        self.segments = segments
        self.theta = 1.0
        self.count: AttentionCount | None = None  # while theta is searched

    def prepare(self, b: Tensor, positions: Tensor | None = None) -> Tensor:
        return b  # rounded when the attention is known

    def forward(self, a: Tensor, b: Tensor, positions: Tensor | None = None) -> Tensor:
        attention, queries, group = self.mean_attention(a, positions)
        if self.count is not None:
            self.count.add(attention, queries)
        p = self.a(a, positions)  # (B, H, T, S)
        if not isinstance(self.b, StaticQuantizer):
            return p @ self.b(b, positions)
        exponent = torch.log2(attention / self.theta).ceil().clamp(0, MOST)[:, :, group]
        out = 0.0
        for n in range(MOST + 1):
            out = out + (p * (exponent == n)) @ round_duplicates(self.b, b, n)  # (B, H, T, D)
        return out

    def mean_attention(self, a: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean attention (B, H, G, S) that values get from the queries of a segment, how many these
        are (G,), and the segment of every query (T,)."""
        every = self.segments.index(positions)
        present, group = every.unique(return_inverse=True)
        # a product, as sums by index come in another order every time on a GPU
        member = (torch.arange(len(present), device=a.device)[:, None] == group).to(a.dtype)
        queries = member.sum(dim=1)  # (G,)
        return (member @ a) / queries[:, None], queries, group


def round_duplicates(quantizer: StaticQuantizer, values: Tensor, n: int) -> Tensor:
    """The mean of 2^n roundings of values (B, H, S, D), shifted symmetrically."""
    params = params_of_channels(
        QParams(quantizer.scale, quantizer.zero_point), quantizer.spec, values
    )
    finer = QParams(params.scale / 2**n, params.zero_point * 2**n)
    return fake_quantize(values, finer, (quantizer.spec.levels - 1) * 2**n + 1)


def install_shifts(adapter: Adapter, recipe: Recipe, batches: Sequence[Rows]) -> None:
    """Put shift-and-sum into the attention of a quantized model, with the theta of its budget.

    Raises:
        ConfigError: the model is no VAR, or values are not quantized by static integers.
    """
    if adapter.family != "var":
        raise ConfigError(
            f"method.shift_and_sum: {adapter.family} does not have it, allowed is var"
        )
    products: list[ShiftedMatMul] = []
    for product in recipe.scope.products(adapter):
        if product.kind != "pv":
            continue
        module = adapter.model.get_submodule(product.name)
        static = isinstance(module.b, StaticQuantizer)
        if not static or module.b.spec.format != "int":
            raise ConfigError(
                "method.shift_and_sum: true needs values in static integers, per tensor or head"
            )
        shifted = ShiftedMatMul(module, product_segments(adapter, product))
        shifted.count = AttentionCount(product.channels, module.b.spec.bits)
        swap_module(adapter.model, product.name, shifted)
        products.append(shifted)
    rows = {name: value[:ROWS] for name, value in batches[0].items()}
    total = count_bit_operations(adapter, recipe, rows)
    counts = [product.count for product in products]
    total += 2 * sum(count.product for count in counts)  # scores have as many as values
    theta = search_theta(counts, recipe.options.shift_and_sum.budget * total)
    for product in products:
        product.theta = theta
        product.count = None


def count_bit_operations(adapter: Adapter, recipe: Recipe, rows: Rows) -> float:
    """Bit operations of the linear layers in scope for these rows."""
    sites = recipe.scope.sites(adapter)
    total = 0.0

    def take(site: Site, x: Tensor, positions: Tensor | None) -> None:
        nonlocal total
        own = recipe.at_site(adapter, site)
        for name in site.consumers:
            weight = adapter.model.get_submodule(name).weight
            products = x.numel() * len(weight)
            total += products * own.weights.bits * own.activations.bits

    with watch_tokens(adapter, sites, take):
        adapter.forward(rows)
    return total


def search_theta(counts: Sequence[AttentionCount], budget: float) -> float:
    """The least theta of the grid whose duplicates cost at most `budget`; 1 if none does."""
    fits = 0  # theta = 1 gives no token a duplicate
    exceeds = STEPS * OCTAVES
    while exceeds - fits > 1:  # costs rise as theta falls
        middle = (fits + exceeds) // 2
        if sum(count.cost(middle) for count in counts) <= budget:
            fits = middle
        else:
            exceeds = middle
    return 2.0 ** (-fits / STEPS)
