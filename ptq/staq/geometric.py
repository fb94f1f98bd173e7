"""The channel scale as a geometric program: the exact minimiser of the error that GPS models.

With s on the channels (x' = x / s, W' = W diag(s)), token groups g that share a step and rows o of
the weight that have one each, the expected output error of both roundings is, up to 1/12,

    L(s) = sum_g n_g w_g d_g^2 sum_c s_c^2 |W_c|^2  +  sum_o D_o^2 sum_c M_c / s_c^2

    d_g = (max_c hi_gc / s_c + max_c lo_gc / s_c) / (2^a - 1)             step of group g, a bits
    D_o = (max_c (W_oc)+ s_c + max_c (-W_oc)+ s_c) / (2^b - 1)            step of row o, b bits

    hi_gc, -lo_gc: ends of channel c in group g      n_g: tokens of it     |W_c|: norm of column c
    M_c = sum_t w_t x_tc^2                           w_g = 1 / E_g |W x|^2: relative errors count

GPS (`gps.py`) minimises the same two terms with d set by one channel k and the error of column c of
the weight growing by s_c alone (the paper's Eq. 10), which gives its closed form. The second is not
what happens: a row's step grows by its largest entry, so one channel with a large s_c makes the
rounding of all others coarser. At eight bits that hardly shows; at four, GPS more than doubles the
weights' error of SmoothQuant.

Convexity. A maximum, sum, product or power of monomials s_1^a_1 ... s_C^a_C is a posynomial's
envelope: with t = log s, log hi/s is linear, a maximum of linear functions is convex, the log of a
sum of exponentials of convex functions is convex. So log L(t) is convex: any start leads to the one
optimum, and neither an anchor channel nor bounds nor a search over exponents are needed. A common
factor of s cancels, so the geometric mean of s is 1. Minimised by Adam on t, whose subgradients at
ties of the maxima are shared between the channels that tie.

The inputs are taken without their mean: that of the sinks at sink tokens (`sink_shift.py`, if the
recipe has it), and the mean of the rest everywhere else, which is the step's shift and folds as the
scale does. Groups are the site's segments, or single positions where the recipe has parameters per
position.

Statistics are per position, (L, C), in one pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.methods.smoothquant import FLOOR
from ptq.methods.solver import Problem
from ptq.options import COUNT, SITES, Settings, setting
from ptq.ranges import Flag
from ptq.registry.entries import register_settings, register_transform
from ptq.sites import RowsFold, Segments
from ptq.transform import InputTransform

RATE = 0.05  # of Adam at the start, on log s
TINY = 1e-30


@register_settings("geometric")
@dataclass(frozen=True)
class GeometricSettings(Settings):
    """The scale as a geometric program.

    Attributes:
        sites: whose inputs are scaled. online: of these, the kinds where vectors run online if
            nothing absorbs the scale; other such sites are left alone.
        shift: subtract the mean of each channel, too. steps: of Adam.
    """

    sites: tuple[str, ...] = setting(("qkv", "proj", "fc1", "fc2", "head"), SITES)
    online: tuple[str, ...] = setting(("fc2",), SITES)
    shift: bool = setting(True, Flag())
    steps: int = setting(60, COUNT)


@dataclass(frozen=True)
class Program:
    """The constants of L(s), float64.

    Attributes:
        upper, lower: hi and lo (G, C), not negative. tokens: n_g w_g (G,). energies: M (C,).
        weight: W (O, C). input_levels, weight_levels: codes of either.
    """

    upper: Tensor
    lower: Tensor
    tokens: Tensor
    energies: Tensor
    weight: Tensor
    input_levels: int
    weight_levels: int

    def log_loss(self, log_scale: Tensor) -> Tensor:
        """log L of log s (C,)."""
        scale = log_scale.exp()
        squared = scale.square()
        input_steps = (self.upper / scale).amax(dim=1) + (self.lower / scale).amax(dim=1)  # (G,)
        weight_steps = (self.weight * scale).amax(dim=1).clamp(min=0)  # (O,); a range holds zero
        weight_steps = weight_steps + (-self.weight * scale).amax(dim=1).clamp(min=0)
        input_error = self.tokens @ input_steps.square() / (self.input_levels - 1) ** 2
        weight_error = weight_steps.square().sum() / (self.weight_levels - 1) ** 2
        columns = self.weight.square().sum(dim=0)  # |W_c|^2 (C,)
        input_error = input_error * (squared @ columns)
        weight_error = weight_error * (self.energies / squared).sum()
        return torch.log(input_error + weight_error + TINY)

    def smoothed(self, alpha: float = 0.5) -> Tensor:
        """log s of SmoothQuant, where the search starts."""
        peaks = torch.maximum(self.upper, self.lower).amax(dim=0).clamp(min=FLOOR)  # (C,)
        widths = self.weight.abs().amax(dim=0).clamp(min=FLOOR)  # (C,)
        return centred(alpha * peaks.log() - (1 - alpha) * widths.log())


def centred(log_scale: Tensor) -> Tensor:
    """log s with the geometric mean of s at 1."""
    return log_scale - log_scale.mean()


def minimise(program: Program, steps: int, start: Tensor | None = None) -> Tensor:
    """log s (C,) of the smallest L found in that many steps from `start` (SmoothQuant's)."""
    log_scale = (program.smoothed() if start is None else start).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([log_scale], lr=RATE)
    best = log_scale.detach().clone()  # (C,)
    least = torch.full_like(best[0], math.inf)  # (), on the device: no step waits for a comparison
    for step in range(steps + 1):
        with torch.enable_grad():
            loss = program.log_loss(log_scale)
        better = loss.detach() < least
        least = torch.where(better, loss.detach(), least)
        best = torch.where(better, log_scale.detach(), best)
        # falls to 0 as a cosine
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        (log_scale.grad,) = torch.autograd.grad(loss, log_scale)
        optimizer.step()
    return centred(best)


class PositionStatistics:
    """Sums and extrema of inputs (L, C), per token position."""

    def __init__(self, weight: Tensor) -> None:
        channels = weight.shape[1]
        self.weight = weight
        self.counts = weight.new_zeros(0)
        self.outputs = weight.new_zeros(0)  # sums of |W x|^2
        self.sums = weight.new_zeros(0, channels)
        self.squares = weight.new_zeros(0, channels)
        self.upper = weight.new_zeros(0, channels)
        self.lower = weight.new_zeros(0, channels)

    def update(self, x: Tensor, positions: Tensor) -> None:
        """Take inputs (B, T, C) of tokens at positions (T,), all different, in."""
        self._grow(int(positions.max()) + 1)
        self.counts[positions] += len(x)
        self.outputs[positions] += (x @ self.weight.t()).square().sum(dim=(0, 2))  # (T,)
        self.sums[positions] += x.sum(dim=0)
        self.squares[positions] += x.square().sum(dim=0)
        self.upper[positions] = torch.maximum(self.upper[positions], x.amax(dim=0))
        self.lower[positions] = torch.minimum(self.lower[positions], x.amin(dim=0))

    def _grow(self, length: int) -> None:
        missing = length - len(self.counts)
        if missing <= 0:
            return
        for name, value in (
            ("counts", 0.0),
            ("outputs", 0.0),
            ("sums", 0.0),
            ("squares", 0.0),
            ("upper", -math.inf),
            ("lower", math.inf),
        ):
            grown = getattr(self, name)
            added = grown.new_full((missing, *grown.shape[1:]), value)  # (missing,) or (missing, C)
            setattr(self, name, torch.cat((grown, added)))

    def mean(self, chosen: Tensor) -> Tensor:
        """Mean (C,) in float64 over the positions `chosen` (L,)."""
        count = self.counts[chosen].double().sum().clamp(min=1)
        return self.sums[chosen].double().sum(dim=0) / count


def program_of(
    statistics: PositionStatistics,
    segments: Segments,
    per_position: bool,
    centre: Tensor,
    input_levels: int,
    weight_levels: int,
) -> Program:
    """The program of inputs whose `centre` (L, C) is taken off.

    Args:
        segments: groups whose output energies weigh tokens, and that share a step unless
            `per_position`.
    """
    seen = statistics.counts > 0
    positions = seen.nonzero().squeeze(1)
    counts = statistics.counts[seen].double()  # (L,)
    group = segments.index(positions)  # (L,)
    energy = sum_groups(statistics.outputs[seen].double(), group, len(segments))  # (G,)
    group_counts = sum_groups(counts, group, len(segments))
    weights = (group_counts / energy.clamp(min=TINY))[group]  # (L,)
    centre = centre[seen]
    sums = statistics.sums[seen].double()
    # sum (x - m)^2 = sum x^2 - 2 m sum x + n m^2; rounding may leave less than 0
    squares = statistics.squares[seen].double() - 2 * centre * sums
    squares = (squares + counts[:, None] * centre.square()).clamp(min=0)
    upper = (statistics.upper[seen].double() - centre).clamp(min=0)  # (L, C)
    lower = (centre - statistics.lower[seen].double()).clamp(min=0)  # (L, C)
    tokens = counts * weights
    energies = weights @ squares  # (C,)
    if not per_position:
        rows = group[:, None].expand_as(upper)  # (L, C)
        empty = upper.new_zeros(len(segments), upper.shape[1])
        upper = empty.scatter_reduce(0, rows, upper, "amax")  # (G, C)
        lower = empty.scatter_reduce(0, rows, lower, "amax")
        tokens = sum_groups(tokens, group, len(segments))
    return Program(
        upper, lower, tokens, energies, statistics.weight.double(), input_levels, weight_levels
    )


def sum_groups(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums (G,) of values (L,) by group (L,)."""
    return values.new_zeros(groups).index_add_(0, group, values)


@register_transform("geometric", step=60, integers_only=True)
class Geometric:
    """The program at one site, on inputs that stream."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.options = problem.recipe.options.geometric
        site = problem.site
        self.streams = site.fold is not None or site.kind in self.options.online
        self.statistics = PositionStatistics(problem.weight)

    def update(self, x: Tensor) -> None:
        self.update_tokens(x, None)  # without positions all tokens are one group

    def update_tokens(self, x: Tensor, positions: Tensor | None) -> None:
        if x.dim() == 2:
            x = x[:, None]  # (N, 1, C)
        if positions is None:
            positions = torch.zeros(1, dtype=torch.long, device=x.device)
            x = x.flatten(0, 1)[:, None]  # (N, 1, C), all at one position
        self.statistics.update(x, positions)

    def end_pass(self) -> bool:
        return True

    def solve(self) -> InputTransform:
        weight = self.problem.weight
        if not self.streams:
            return InputTransform.identity(weight.shape[1], weight)
        recipe = self.problem.recipe
        centre, shift = self._centre()
        program = program_of(
            self.statistics,
            self.problem.site.segments,
            recipe.per_position,
            centre,
            recipe.activations.levels,
            recipe.weights.levels,
        )
        scale = minimise(program, self.options.steps).exp()
        return InputTransform(scale.to(weight.dtype), shift.to(weight.dtype))

    def _centre(self) -> tuple[Tensor, Tensor]:
        """What is taken off the inputs at every position (L, C), and the step's shift (C,)."""
        site = self.problem.site
        recipe = self.problem.recipe
        positions = torch.arange(len(self.statistics.counts), device=self.problem.weight.device)
        is_sink = positions < site.sinks
        shift = torch.zeros_like(self.statistics.sums[0], dtype=torch.float64)  # (C,)
        if self.options.shift and can_shift(site.fold):
            shift = self.statistics.mean(~is_sink)
        centre = shift.expand(len(positions), -1)
        if recipe.sink_shift and site.kind in recipe.options.sink_shift.sites:
            centre = torch.where(is_sink[:, None], self.statistics.mean(is_sink), centre)  # (L, C)
        return centre, shift


def can_shift(fold: object) -> bool:
    """Whether a site's producer, or an online vector, takes a shift as well."""
    return not (isinstance(fold, RowsFold) and not fold.shift)
