"""The whole of post-training quantization; the function `quantize` is this list from its second
line on.

    select calibration rows (calibration.py) -> if the recipe rotates: rotate weights wherever the
    model's outputs stay the same by that alone (quarot.py) -> for each transform of the recipe:
    stream the inputs of its sites through solvers (solver.py), extend the sites'
       transforms by what they found; or train them block by block (omniquant.py)
    -> apply the transforms (folding.py), which leaves the function of the model unchanged -> round
    the weights (rounding.py) -> run the calibration rows through observers, replace these by
    quantizers (observers.py, quantizers.py)

A site is an activation with the linears that read it, a product one of attention's two (`sites.py`:
`Site`, `MatMulSite`); which of them a model has, its adapter says. A recipe (`recipe.py`) is one
row of a table.

Because the transforms leave the function unchanged, the inputs of all sites are those of the
full-precision model, seen through the transforms found so far. Activation ranges are calibrated
with rounded weights and unrounded activations. `quantize` changes the adapter's model in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ptq import folding
from ptq.inputs import watch_inputs
from ptq.methods.probe import Judge
from ptq.methods.quarot import rotate_offline, rotated_offline, score_rotation
from ptq.methods.registry import METHODS
from ptq.methods.solver import FixesInput, Problem, Solver, stacked_weight
from ptq.modules import OnlineTransform, QuantLinear, QuantMatMul, swap_module
from ptq.numbers.numerics import NonFiniteError, QParams
from ptq.numbers.observers import Observer
from ptq.numbers.quantizers import Clip, DynamicQuantizer
from ptq.omniquant import omniquant
from ptq.recipe import Recipe
from ptq.released.sequence import quantize_released
from ptq.rounding import round_weights
from ptq.sites import Adapter, CalibrationSet, Rows, Segments, Site, Track
from ptq.spec import QuantSpec
from ptq.stwq import input_spec, static_quantizer
from ptq.transform import InputTransform


@dataclass
class Solution:
    """What is found before the model is changed.

    Attributes:
        transforms: by site name. input_params: by site name, of input quantizers that a method
            fixes (RepQ).
        clips: by linear, the clipping of its weight where that was trained (OmniQuant).
    """

    transforms: dict[str, InputTransform] = field(default_factory=dict)
    input_params: dict[str, QParams] = field(default_factory=dict)
    clips: dict[str, Clip] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What quantization found: parameters and transforms by name, flat."""

    tensors: dict[str, Tensor]


@torch.no_grad()
def quantize(
    adapter: Adapter,
    calibration: CalibrationSet,
    recipe: Recipe,
    batch: int = 32,
    track: Track = lambda it, what: it,
    checkpoint: Path | None = None,
) -> Report:
    """Quantize the adapter's model in place by a recipe.

    Args:
        batch: calibration rows per forward pass. track: shows progress.
        checkpoint: file that keeps what is trained, block by block, for a run that is started again
            (OmniQuant).

    Raises:
        ConfigError: the recipe does not fit. NonFiniteError: an activation or weight holds NaN or
            infinity.
    """
    adapter.prepare()
    if recipe.released:
        # a sequence of its own, see there
        transforms = quantize_released(adapter, calibration, recipe, batch, track)
        return Report(report_tensors(adapter.model, transforms))
    if recipe.rotates and recipe.options.hadamard.offline:
        rotate_offline(adapter)
    batches = calibration.batches(batch)
    solution = solve_transforms(adapter, batches, len(calibration), recipe, track, checkpoint)
    apply_transforms(adapter, recipe, solution)
    round_weights(adapter, recipe, batches, track, solution.clips)
    calibrate_activations(adapter, batches, len(calibration), recipe, track, solution)
    return Report(report_tensors(adapter.model, solution.transforms))


def solve_transforms(
    adapter: Adapter,
    batches: Sequence[Rows],
    rows: int,
    recipe: Recipe,
    track: Track,
    checkpoint: Path | None = None,
) -> Solution:
    """Find the recipe's transforms, one after the other, at every site they act on; the model stays
    as it is."""
    found = Solution()
    if recipe.omniquant:
        for trained in omniquant.solve(adapter, batches, recipe, track, checkpoint).values():
            found.transforms |= trained.transforms
            found.clips |= trained.clips
        return found
    weights = {s.name: stacked_weight(adapter.model, s) for s in recipe.scope.sites(adapter)}
    rotated = rotated_offline(adapter, recipe.options.hadamard)
    for name in recipe.transforms:
        solvers: dict[str, Solver] = {}
        sites = [s for s in recipe.scope.sites(adapter) if s.kind in recipe.sites_of(name)]
        for site in sites:
            weight = weights[site.name]
            # the site's steps so far, which this one extends
            chain = found.transforms.setdefault(
                site.name, InputTransform.identity(weight.shape[1], weight)
            )
            probe = partial(Judge, adapter, site, chain, batches, recipe.exclude_sinks)
            problem = Problem(
                site, chain.on_weight(weight), recipe, rows, probe, rotated.get(site.name, 0)
            )
            solvers[site.name] = METHODS[name](problem)
        stream_inputs(
            adapter,
            batches,
            sites,
            solvers,
            found.transforms,
            recipe.exclude_sinks,
            partial(track, what=name),
        )
        for key, solver in solvers.items():
            try:
                step = solver.solve()
            except NonFiniteError as error:
                raise NonFiniteError(f"{key}: {error}") from error
            found.transforms[key] = found.transforms[key].then(step)
            found.input_params.pop(key, None)  # of the input before this step
            if isinstance(solver, FixesInput):
                found.input_params[key] = solver.input_params()
    return found


def stream_inputs(
    adapter: Adapter,
    batches: Sequence[Rows],
    sites: list[Site],
    solvers: dict[str, Solver],
    transforms: dict[str, InputTransform],
    exclude_sinks: bool,
    track: Callable[[Iterable], Iterable],
) -> None:
    """Pass the calibration rows through the model, and what arrives at the sites to their solvers,
    until all have done.
    """
    waiting = [site for site in sites if getattr(solvers[site.name], "streams", True)]
    while waiting:

        def take(site: Site, x: Tensor) -> None:
            solvers[site.name].update(transforms[site.name](x))

        with watch_inputs(adapter, waiting, exclude_sinks, take):
            for part in track(batches):
                adapter.forward(part)
        waiting = [site for site in waiting if not solvers[site.name].end_pass()]


def apply_transforms(adapter: Adapter, recipe: Recipe, solution: Solution) -> None:
    """Put quantizable linears and products everywhere in scope and the transforms into them and
    into what feeds them.

    Nothing is rounded yet: the model computes what it did before.
    """
    model = adapter.model
    for site in recipe.scope.sites(adapter):
        transform = solution.transforms.get(site.name)
        folded = transform is None or folding.apply_transform(model, site, transform)
        first = 0
        for name in site.consumers:
            linear = QuantLinear(model.get_submodule(name))
            if transform is not None:
                online = OnlineTransform(transform, folded)
                end = first + len(linear.weight)
                linear.transform = online if online.needed else None
                if transform.low_rank is not None:
                    linear.down = transform.low_rank.down
                    linear.up = transform.low_rank.up[first:end].clone()
                first = end
            swap_module(model, name, linear)
    for product in recipe.scope.products(adapter):
        rotation = (
            score_rotation(adapter, product, recipe.options.hadamard) if recipe.rotates else None
        )
        swap_module(model, product.name, QuantMatMul(rotation))


@dataclass(frozen=True)
class Slot:
    """A place for a quantizer: attribute `name` of `module`. `followers`: other linears that read
    the same activation and get the same quantizer."""

    module: nn.Module
    name: str
    spec: QuantSpec
    segments: Segments
    label: str
    followers: tuple[nn.Module, ...] = ()

    def fill(self, quantizer: nn.Module) -> None:
        for module in (self.module, *self.followers):
            setattr(module, self.name, quantizer)


def quantizer_slots(adapter: Adapter, recipe: Recipe) -> list[Slot]:
    """All activation quantizers of a recipe, in forward order of the sites."""
    found: list[Slot] = []
    for site in recipe.scope.sites(adapter):
        first, *rest = (adapter.model.get_submodule(name) for name in site.consumers)
        spec = input_spec(site, recipe.activations, recipe.stwq)
        found.append(Slot(first, "input", spec, site.segments, site.name, tuple(rest)))
    for product in recipe.scope.products(adapter):
        module = adapter.model.get_submodule(product.name)
        for operand in ("a", "b"):
            spec = recipe.operand(product, operand)
            if spec is not None:
                found.append(Slot(module, operand, spec, Segments(), f"{product.name}.{operand}"))
    return found


def calibrate_activations(
    adapter: Adapter,
    batches: Sequence[Rows],
    rows: int,
    recipe: Recipe,
    track: Track,
    solution: Solution,
) -> None:
    """Fill every slot with its quantizer: dynamic ones, those that a method fixed, others after
    observing the rows."""
    observed: list[tuple[Slot, Observer]] = []
    for slot in quantizer_slots(adapter, recipe):
        if slot.label in solution.input_params and slot.spec.granularity == "tensor":
            slot.fill(static_quantizer(slot.spec, solution.input_params[slot.label], slot.segments))
        elif slot.spec.granularity == "token_dynamic":
            slot.fill(DynamicQuantizer(slot.spec))
        else:
            observer = Observer(slot.spec, slot.segments, rows, slot.label)
            setattr(slot.module, slot.name, observer)
            observed.append((slot, observer))
    for number in range(max((o.passes for _, o in observed), default=0)):
        for part in track(batches, f"activation ranges, pass {number + 1}"):
            adapter.forward(part)
        for _, observer in observed:
            observer.end_pass()
    for slot, observer in observed:
        slot.fill(static_quantizer(slot.spec, observer.params(), slot.segments))


def report_tensors(model: nn.Module, transforms: dict[str, InputTransform]) -> dict[str, Tensor]:
    """Scales and zero points of weights and static activations, and the transforms, by name."""
    tensors: dict[str, Tensor] = {}

    def add(prefix: str, params: QParams) -> None:
        tensors[f"{prefix}.scale"] = params.scale
        tensors[f"{prefix}.zero_point"] = params.zero_point

    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and module.weight_params is not None:
            add(f"{name}.weight", module.weight_params)
            tensors |= {
                f"{name}.{part}": getattr(module, part)
                for part in ("down", "up")
                if module.down is not None
            }
        if isinstance(module, (QuantLinear, QuantMatMul)):
            for slot, quantizer in module.named_children():
                if hasattr(quantizer, "zero_point"):
                    add(f"{name}.{slot}", QParams(quantizer.scale, quantizer.zero_point))
    for name, transform in transforms.items():
        tensors[f"{name}.transform.scale"] = transform.scale
        tensors[f"{name}.transform.shift"] = transform.shift
    return {k: v.detach().cpu().clone() for k, v in tensors.items()}
