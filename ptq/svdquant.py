"""SVDQuant (Li et al., 2024, arXiv 2411.05007): a low-rank branch in 16 bits takes the hard part of the weight away.

    x' = x / s,    W' = W diag(s) - B A,    y = Q(x') Q(W')^T + (x' A^T) B^T + b,    B A = SVD_r(W diag(s))

First the smoothing s moves the outliers of the activation into the weight, then the branch, which reads the unquantized
x', takes the largest r singular directions of the weight, and what is left has a smaller range. Any A and B are exact
with the quantizers off, because W' is defined as the remainder.

    smoothing    s_j = max |x_j|^a / max_o |W_oj|^b.  With `grid` of all exponents (a, b) in
                 {(0, 0)} u {(i/20, 0)} u {(i/20, 1 - i/20)}, i = 1 .. 19, those with the least output error of the
                 quantized site, the branch of each candidate included; otherwise (alpha, 1 - alpha).
    iterations   Qw = 0;  repeat: B A = SVD_r(W diag(s) - Qw),  Qw = Q(W diag(s) - B A).  The first round is the plain
                 decomposition. The best round is kept, and the first one that is no better ends the search.

Symbols. x (N, C): inputs. W (O, C): all weights that read x, stacked, so that they share A (r, C); B (O, r).
The rank is at most min(O, C) / 2, where the branch is about as large as the weight; a weight with one row or column
gets none.

The output error is judged at the site's probe (`probe.py`: attention before its projection, a gated product, else the
linear outputs) on `rows` calibration rows, so that memory does not grow with their number; the maxima are of all rows.
Activations are quantized as the recipe says. Static token-wise parameters, which need positions, are stood in for by
dynamic ones. With one candidate and one iteration there is nothing to judge.

Official code and paper. mit-han-lab/deepcompressor has this grid and up to 100 rounds; it divides by s online
everywhere and leaves AdaLN, embeddings and the head alone. Here s is folded where a producer can absorb it, which
changes nothing but the cost, and every layer in scope is treated alike. The official four-bit format (groups of 64,
shifted GELU) is not used: all methods share one quantizer. PTQ4ARVG compares with (Table 7) a = b = 0.5 in every layer
and does not state iterations. After a rotation there is no smoothing, which a diagonal cannot follow.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ptq.probe import Judge
from ptq.quantizers import DynamicQuantizer, StaticQuantizer, calibrated, rounded_weight
from ptq.smoothquant import Peaks, smoothing
from ptq.solver import Problem
from ptq.types import InputTransform, LowRank

STEPS = 20  # of the grid of exponents


def exponents() -> list[tuple[float, float]]:
    """The 39 pairs (a, b) of the official grid, no smoothing first."""
    alphas = [i / STEPS for i in range(1, STEPS)]
    return [(0.0, 0.0), *((a, 0.0) for a in alphas), *((a, 1 - a) for a in alphas)]


def truncated_svd(weight: Tensor, rank: int) -> LowRank | None:
    """The best approximation B A of W (O, C) of the given rank, but at most min(O, C) / 2; None for rank 0.

    From the eigenvectors of the smaller Gram matrix, in float64: seconds for 1920 x 7680 on one CPU core.
    """
    rank = min(rank, min(weight.shape) // 2)
    if rank == 0:
        return None
    if weight.shape[0] > weight.shape[1]:
        other = truncated_svd(weight.t(), rank)
        return LowRank(other.up.t().contiguous(), other.down.t().contiguous())
    wide = weight.double()
    basis = torch.linalg.eigh(wide @ wide.t()).eigenvectors[:, -rank:]  # (O, r), eigenvalues ascend
    return LowRank((basis.t() @ wide).to(weight.dtype), basis.to(weight.dtype).contiguous())


class SVDQuant(Peaks):
    """Smoothing and branch, chosen by the output error."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.recipe, self.options = problem.recipe, problem.recipe.options.svd

    def smoothings(self) -> list[InputTransform]:
        """The smoothing steps to choose from."""
        pairs = exponents() if self.options.grid else [(self.options.alpha, 1 - self.options.alpha)]
        if self.recipe.rotates:
            pairs = [(0.0, 0.0)]
        return [smoothing(self.peaks, self.weight, a, b) for a, b in pairs]

    def solve(self) -> InputTransform:
        steps, nothing = self.smoothings(), torch.zeros_like(self.weight)
        if len(steps) == self.options.iterations == 1:
            return self.with_branch(steps[0], nothing)
        judge = self.problem.probe(self.options.rows)
        tried = (self.judged(judge, self.with_branch(step, nothing)) for step in steps)
        least, best, rounded = min(tried, key=lambda found: found[0])
        for _ in range(1, self.options.iterations):
            error, step, rounded = self.judged(judge, self.with_branch(best.diagonal, rounded))
            if not error < least:
                break
            least, best = error, step
        return best

    def with_branch(self, smooth: InputTransform, rounded: Tensor) -> InputTransform:
        """A smoothing step with the branch for W diag(s) - Qw, `rounded` being Qw (O, C)."""
        return replace(smooth, low_rank=truncated_svd(smooth.on_weight(self.weight) - rounded, self.options.rank))

    def judged(self, judge: Judge, step: InputTransform) -> tuple[float, InputTransform, Tensor]:
        """The output error of a step, the step, and its Qw (O, C)."""
        rounded, _ = rounded_weight(step.on_weight(self.weight), self.recipe.weights)
        return float(judge(step, rounded, self.quantizer(judge, step))), step, rounded

    def quantizer(self, judge: Judge, step: InputTransform) -> nn.Module:
        """What rounds x' of a step."""
        spec = self.recipe.activations
        if self.recipe.stwq or spec.granularity == "token_dynamic":
            return DynamicQuantizer(spec)
        return StaticQuantizer(spec, calibrated(torch.cat([step(x).flatten(0, -2) for x in judge.inputs]), spec))
