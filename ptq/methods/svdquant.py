"""SVDQuant (Li et al., 2024, arXiv 2411.05007): a 16-bit low-rank branch beside the weight.

    x' = x / s,    W' = W diag(s) - B A,    B A = SVD_r(W diag(s)),
    y = Q(x') Q(W')^T + (x' A^T) B^T + b

First the smoothing s moves the outliers of the activation into the weight, then the branch, which
reads the unquantized x', takes the largest r singular directions of the weight, and what is left
has a smaller range. Any A and B are exact with the quantizers off, because W' is defined as the
remainder.

    smoothing    s_j = max |x_j|^a / max_o |W_oj|^b.  With `grid` of all exponents (a, b) in
                 {(0, 0)} u {(i/20, 0)} u {(i/20, 1 - i/20)}, i = 1 .. 19, those with the least
                 output error of the quantized site, the branch of each candidate included;
                 otherwise (alpha, 1 - alpha).
    iterations   Qw = 0;  repeat: B A = SVD_r(W diag(s) - Qw),  Qw = Q(W diag(s) - B A).
                 The first round is the plain decomposition. The best round is kept, and the first
                 one that is no better ends the search.

Symbols. x (N, C): inputs. W (O, C): all weights that read x, stacked, so that they share A (r, C);
B (O, r). The rank is at most min(O, C) / 2, where the branch is about as large as the weight; a
weight with one row or column gets none.

The branches of the grid's candidates come from one subspace iteration over all of them, since 39
eigendecompositions a site would be most of the cost; the branch of the chosen one is exact. Their
remainders are within 1e-4 of the least for Gaussian or falling spectra, within 2e-3 where many
singular values are equal.

The output error is judged at the site's probe (`probe.py`: attention before its projection, a gated
product, else the linear outputs) on `rows` calibration rows, so that memory does not grow with
their number; the maxima are of all rows. Activations are quantized as the recipe says. Static
token-wise parameters, which need positions, are stood in for by dynamic ones. With one candidate
and one iteration there is nothing to judge.

Official code and paper. mit-han-lab/deepcompressor has this grid and up to 100 rounds; it divides
by s online everywhere and leaves AdaLN, embeddings and the head alone. Here s is folded where a
producer can absorb it, which changes nothing but the cost, and every layer in scope is treated
alike. The official four-bit format (groups of 64, shifted GELU) is not used: all methods share one
quantizer. PTQ4ARVG compares with (Table 7) a = b = 0.5 in every layer and does not state
iterations. After a rotation there is no smoothing, which a diagonal cannot follow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ptq.methods.probe import Judge
from ptq.methods.smoothquant import Peaks, smoothing_step
from ptq.methods.solver import Problem
from ptq.numbers.quantizers import (
    StaticQuantizer,
    choose_qparams,
    fake_quantize_weight,
    run_time_quantizer,
)
from ptq.options import COUNT, KINDS, SITES, Settings, setting
from ptq.ranges import Flag, Integer, Number
from ptq.registry.entries import register_settings, register_transform
from ptq.transform import InputTransform, LowRank

STEPS = 20  # of the grid of exponents
ROUNDS = 20  # of subspace iteration


def exponent_grid() -> list[tuple[float, float]]:
    """The 39 pairs (a, b) of the official grid, no smoothing first."""
    by_activations = []
    by_both = []
    for step in range(1, STEPS):
        alpha = step / STEPS
        by_activations.append((alpha, 0.0))
        by_both.append((alpha, 1 - alpha))
    return [(0.0, 0.0), *by_activations, *by_both]


def possible_rank(rank: int, weight: Tensor) -> int:
    """The rank that a branch beside a weight (O, C) may have."""
    return min(rank, min(weight.shape) // 2)


def wide_side(weight: Tensor) -> Tensor:
    """The weight (O, C) or its transpose, whichever has no more rows than columns, in float64."""
    return (weight.t() if weight.shape[0] > weight.shape[1] else weight).double()


def gram_matrix(weight: Tensor) -> Tensor:
    """The smaller Gram matrix (n, n) of a weight (O, C), n = min(O, C), in float64."""
    rows = wide_side(weight)
    return rows @ rows.t()


def project_onto(weight: Tensor, basis: Tensor) -> LowRank:
    """The weight (O, C) projected onto orthonormal columns (n, r) of its smaller side."""
    narrow = basis.to(weight.dtype).contiguous()
    long = (basis.t() @ wide_side(weight)).to(weight.dtype)  # (r, max(O, C))
    if weight.shape[0] > weight.shape[1]:
        return LowRank(narrow.t().contiguous(), long.t().contiguous())
    return LowRank(long, narrow)


def truncated_svd(weight: Tensor, rank: int) -> LowRank | None:
    """The best approximation B A of W (O, C) of the given rank, but at most min(O, C) / 2; None for
    rank 0.

    From the eigenvectors of the smaller Gram matrix, in float64: seconds for 1920 x 7680 on one CPU
    core.
    """
    rank = possible_rank(rank, weight)
    if not rank:
        return None
    vectors = torch.linalg.eigh(gram_matrix(weight)).eigenvectors  # (n, n), eigenvalues ascend
    return project_onto(weight, vectors[:, -rank:])


def orthonormal_columns(columns: Tensor) -> Tensor:
    """Orthonormal columns (K, n, m) that span those of each matrix (K, n, m), by Cholesky
    decomposition, twice.

    Columns of zeros stay so, and of columns that depend on others a rounding error is left, or
    nothing.
    """
    for _ in range(2):
        lengths = columns.norm(dim=-2, keepdim=True)  # (K, 1, m)
        columns = columns / lengths.clamp(min=torch.finfo(columns.dtype).tiny)
        products = columns.mT @ columns  # (K, m, m)
        # so that none is singular
        products.diagonal(dim1=-2, dim2=-1).add_(1e-13 * columns.shape[-1])
        factor = torch.linalg.cholesky(products)
        # (K, n, m)
        columns = torch.linalg.solve_triangular(factor, columns.mT, upper=False).mT
    return columns


def leading_eigenvectors(grams: Tensor, rank: int) -> Tensor:
    """Orthonormal columns (K, n, rank) near the leading eigenvectors of Gram matrices (K, n, n).

    By subspace iteration with twice as many columns, all matrices at once, from a fixed start;
    where these are many for n, by eigendecomposition.
    """
    n = grams.shape[-1]
    if n <= 8 * rank:
        return torch.linalg.eigh(grams).eigenvectors[..., -rank:]
    noise = torch.Generator().manual_seed(0)
    # on the CPU, so that the start is the same on every device
    columns = torch.randn(n, 2 * rank, generator=noise, dtype=grams.dtype).to(grams.device)
    for _ in range(ROUNDS):
        columns = orthonormal_columns(grams @ columns)  # (K, n, 2 rank)
    projected = columns.mT @ grams @ columns  # (K, 2 rank, 2 rank)
    return columns @ torch.linalg.eigh(projected).eigenvectors[..., -rank:]


@register_settings("svd")
@dataclass(frozen=True)
class SVDQuantSettings(Settings):
    """SVDQuant's low-rank branch.

    Attributes:
        rank: of the branch.
        iterations: alternations of branch and rounding, ended early when the output error rises.
        grid: search the smoothing exponents for the least output error; without it they are `alpha`
            and 1 - alpha.
        rows: calibration rows that output errors are judged on.
        spread: as for OS+.
    """

    sites: tuple[str, ...] = setting(KINDS, SITES)
    rank: int = setting(32, Integer(1, 65_536))
    iterations: int = setting(100, COUNT)
    grid: bool = setting(True, Flag())
    alpha: float = setting(0.5, Number(0, 1))
    rows: int = setting(16, COUNT)
    spread: bool = setting(False, Flag())


@register_transform("svd", step=90)
class SVDQuant(Peaks):
    """Smoothing and branch, chosen by the output error."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.recipe = problem.recipe
        self.options = problem.recipe.options.svd

    def smoothings(self) -> list[InputTransform]:
        """The smoothing steps to choose from."""
        if self.recipe.rotates:
            pairs = [(0.0, 0.0)]  # rotated channels are even already
        elif self.options.grid:
            pairs = exponent_grid()
        else:
            pairs = [(self.options.alpha, 1 - self.options.alpha)]
        return [smoothing_step(self.peaks, self.weight, a, b) for a, b in pairs]

    def solve(self) -> InputTransform:
        steps = self.smoothings()
        nothing = torch.zeros_like(self.weight)
        if len(steps) == self.options.iterations == 1:
            return self.with_branch(steps[0], nothing)
        judge = self.problem.probe(self.options.rows, self.options.spread)
        chosen = steps[0] if len(steps) == 1 else self.best_of(steps, judge)
        least, best, rounded = self.judged(judge, self.with_branch(chosen, nothing))
        for _ in range(1, self.options.iterations):
            error, step, rounded = self.judged(judge, self.with_branch(chosen, rounded))
            if not error < least:
                break
            least = error
            best = step
        return best

    def best_of(self, steps: list[InputTransform], judge: Judge) -> InputTransform:
        """The smoothing step with the least output error beside its branch."""
        rank = possible_rank(self.options.rank, self.weight)
        if rank:
            grams = [gram_matrix(step.on_weight(self.weight)) for step in steps]  # (n, n) each
            bases = leading_eigenvectors(torch.stack(grams), rank)  # (K, n, rank)
        errors: list[float] = []
        for number, step in enumerate(steps):
            # made one at a time: a branch is as long as the weight
            branch = project_onto(step.on_weight(self.weight), bases[number]) if rank else None
            error, _, _ = self.judged(judge, replace(step, low_rank=branch))
            errors.append(error)
        return steps[errors.index(min(errors))]

    def with_branch(self, smooth: InputTransform, rounded: Tensor) -> InputTransform:
        """A smoothing step with the branch for W diag(s) - Qw, `rounded` being Qw (O, C)."""
        remainder = smooth.on_weight(self.weight) - rounded  # (O, C)
        return replace(smooth, low_rank=truncated_svd(remainder, self.options.rank))

    def judged(self, judge: Judge, step: InputTransform) -> tuple[float, InputTransform, Tensor]:
        """The output error of a step, the step, and its Qw (O, C)."""
        rounded, _ = fake_quantize_weight(step.on_weight(self.weight), self.recipe.weights)
        error = float(judge(step, rounded, self.quantizer(judge, step)))
        return error, step, rounded

    def quantizer(self, judge: Judge, step: InputTransform) -> nn.Module:
        """What rounds x' of a step."""
        spec = self.recipe.activations
        if self.recipe.stwq or spec.is_dynamic or not spec.is_rounded:
            return run_time_quantizer(spec)
        transformed = [step(x).flatten(0, -2) for x in judge.inputs]  # (N, C) each
        return StaticQuantizer(spec, choose_qparams(torch.cat(transformed), spec))
