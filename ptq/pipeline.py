"""The whole of post-training quantization. The function `quantize` is this list:

    calibration.py          select the calibration rows (before `quantize` is called)
    methods/quarot.py       if the recipe rotates: rotate weights wherever that alone leaves the
                            model's outputs the same
    methods/solver.py       for each transform of the recipe: stream the inputs of its sites through
                            solvers, and extend the sites' transforms by what they find
    omniquant/omniquant.py  or train the transforms, block by block
    folding.py              apply the transforms; the model still computes the same
    rounding.py             round the weights
    activations.py          run the calibration rows through observers, and put quantizers in the
                            places of these

A site is an activation with the linears that read it; a product is one of attention's two
(`sites.py`: `Site`, `MatMulSite`). The adapter says which of them a model has. A recipe
(`recipe.py`) is one row of a table.

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
from ptq.activations import calibrate_activations
from ptq.inputs import watch_inputs, watch_tokens
from ptq.methods.probe import Judge
from ptq.methods.quarot import rotate_offline, rotated_offline, score_rotation
from ptq.methods.solver import FixesInput, Problem, SeesTokens, Solver, stacked_weight
from ptq.modules import OnlineTransform, QuantLinear, QuantMatMul, swap_module
from ptq.numbers.numerics import NonFiniteError, QParams
from ptq.numbers.quantizers import Clip
from ptq.omniquant import omniquant
from ptq.recipe import Recipe, require_places
from ptq.registry.entries import TRANSFORMS
from ptq.released.sequence import quantize_released
from ptq.rivals.shift_and_sum import install_shifts
from ptq.rounding import round_weights
from ptq.sites import Adapter, CalibrationSet, Rows, Site, Track
from ptq.staq.fitting import fit_model
from ptq.transform import InputTransform


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
        batch: calibration rows per forward pass.
        track: shows progress.
        checkpoint: file that keeps what is trained, block by block, for a run that is started again
            (OmniQuant).

    Raises:
        ConfigError: the recipe does not fit.
        NonFiniteError: an activation or weight holds NaN or infinity.
    """
    require_places(adapter, recipe)
    adapter.prepare()
    if recipe.released:
        # the released code calibrates in another order, see there
        transforms = quantize_released(adapter, calibration, recipe, batch, track)
        return Report(report_tensors(adapter.model, transforms))

    rows = len(calibration)
    batches = calibration.batches(batch)
    solution = transform_model(adapter, batches, rows, recipe, track, checkpoint)
    round_model(adapter, batches, rows, recipe, solution, track)
    return Report(report_tensors(adapter.model, solution.transforms))


def transform_model(
    adapter: Adapter,
    batches: Sequence[Rows],
    rows: int,
    recipe: Recipe,
    track: Track,
    checkpoint: Path | None = None,
) -> Solution:
    """Find the recipe's transforms and apply them: the model computes what it did before.

    Args:
        rows: calibration rows that the batches bring in all.
    """
    if recipe.rotates and recipe.options.hadamard.offline:
        rotate_offline(adapter)
    solution = solve_transforms(adapter, batches, rows, recipe, track, checkpoint)
    apply_transforms(adapter, recipe, solution)
    return solution


def round_model(
    adapter: Adapter,
    batches: Sequence[Rows],
    rows: int,
    recipe: Recipe,
    solution: Solution,
    track: Track,
) -> None:
    """Round the weights of a transformed model, and put quantizers in front of its products."""
    if recipe.fitted:
        fit_model(adapter, recipe, batches, track, solution.input_params, solution.clips)
    else:
        round_weights(adapter, recipe, batches, track, solution.clips)
        calibrate_activations(adapter, batches, rows, recipe, track, solution.input_params)
    if recipe.shift_and_sum:
        install_shifts(adapter, recipe, batches)


@dataclass
class Solution:
    """What is found before the model is changed.

    Attributes:
        transforms: by site name.
        input_params: by site name, of the input quantizers that a method fixes (RepQ).
        clips: by linear, the clipping of its weight where that was trained (OmniQuant).
    """

    transforms: dict[str, InputTransform] = field(default_factory=dict)
    input_params: dict[str, QParams] = field(default_factory=dict)
    clips: dict[str, Clip] = field(default_factory=dict)

    def extend(self, site_name: str, solver: Solver) -> None:
        """Put the step that a solver finds behind the steps that its site has so far."""
        try:
            step = solver.solve()
        except NonFiniteError as error:
            raise NonFiniteError(f"{site_name}: {error}") from error
        self.transforms[site_name] = self.transforms[site_name].then(step)
        # a quantizer that was fixed before is one of the input before this step
        self.input_params.pop(site_name, None)
        if isinstance(solver, FixesInput):
            self.input_params[site_name] = solver.input_params()


def solve_transforms(
    adapter: Adapter,
    batches: Sequence[Rows],
    rows: int,
    recipe: Recipe,
    track: Track,
    checkpoint: Path | None = None,
) -> Solution:
    """Find the recipe's transforms, one after the other, at every site they act on.

    The model stays as it is.
    """
    solution = Solution()
    if recipe.omniquant:
        trained_blocks = omniquant.train_blocks(adapter, batches, recipe, track, checkpoint)
        for trained in trained_blocks.values():
            solution.transforms |= trained.transforms
            solution.clips |= trained.clips
        return solution

    sites = recipe.scope.sites(adapter)
    weights = {site.name: stacked_weight(adapter.model, site) for site in sites}  # (O, C) each
    rotated = rotated_offline(adapter, recipe.options.hadamard)
    for name in recipe.transforms:
        transformed_sites = [site for site in sites if site.kind in recipe.sites_of(name)]
        solvers: dict[str, Solver] = {}
        for site in transformed_sites:
            weight = weights[site.name]
            identity = InputTransform.identity(weight.shape[1], weight)
            # the site's steps so far, which this one extends
            chain = solution.transforms.setdefault(site.name, identity)
            problem = Problem(
                site=site,
                weight=chain.on_weight(weight),
                recipe=recipe.at_site(adapter, site),
                rows=rows,
                probe=partial(Judge, adapter, site, chain, batches, recipe.exclude_sinks),
                rotated=rotated.get(site.name, 0),
            )
            solvers[site.name] = TRANSFORMS[name].solver(problem)
        stream_inputs(
            adapter,
            batches,
            transformed_sites,
            solvers,
            solution.transforms,
            recipe.exclude_sinks,
            partial(track, what=name),
        )
        for site_name, solver in solvers.items():
            solution.extend(site_name, solver)
    return solution


def stream_inputs(
    adapter: Adapter,
    batches: Sequence[Rows],
    sites: list[Site],
    solvers: dict[str, Solver],
    transforms: dict[str, InputTransform],
    exclude_sinks: bool,
    track: Callable[[Iterable], Iterable],
) -> None:
    """Run the calibration rows through the model until every solver has seen enough.

    A solver gets the input of its site, seen through the site's steps so far.
    """

    def take(site: Site, x: Tensor) -> None:
        solvers[site.name].update(transforms[site.name](x))

    def take_tokens(site: Site, x: Tensor, positions: Tensor | None) -> None:
        solvers[site.name].update_tokens(transforms[site.name](x), positions)

    waiting = [site for site in sites if getattr(solvers[site.name], "streams", True)]
    while waiting:
        # all solvers are of one method
        if isinstance(solvers[waiting[0].name], SeesTokens):
            watching = watch_tokens(adapter, waiting, take_tokens)
        else:
            watching = watch_inputs(adapter, waiting, exclude_sinks, take)
        with watching:
            for part in track(batches):
                adapter.forward(part)
        waiting = [site for site in waiting if not solvers[site.name].end_pass()]


def apply_transforms(adapter: Adapter, recipe: Recipe, solution: Solution) -> None:
    """Put quantizable linears and products everywhere in scope, and the transforms into them and
    into what feeds them.

    Nothing is rounded yet: the model computes what it did before.
    """
    model = adapter.model
    for site in recipe.scope.sites(adapter):
        transform = solution.transforms.get(site.name)
        folded = transform is None or folding.apply_transform(model, site, transform)
        first_row = 0  # of the consumer in the stacked weights
        for name in site.consumers:
            linear = QuantLinear(model.get_submodule(name))
            end_row = first_row + len(linear.weight)
            if transform is not None:
                attach_transform(linear, transform, folded, slice(first_row, end_row))
            swap_module(model, name, linear)
            first_row = end_row
    for product in recipe.scope.products(adapter):
        rotation = None
        if recipe.rotates:
            rotation = score_rotation(adapter, product, recipe.options.hadamard)
        swap_module(model, product.name, QuantMatMul(rotation))


def attach_transform(
    linear: QuantLinear, transform: InputTransform, folded: bool, rows: slice
) -> None:
    """Give a linear the parts of a transform that run online.

    Args:
        folded: scale and shift are in what feeds the site.
        rows: the linear's rows in the stacked weights of the site's consumers.
    """
    online = OnlineTransform(transform, folded)
    if online.needed:
        linear.transform = online
    if transform.low_rank is not None:
        linear.down = transform.low_rank.down  # (r, C), shared by the site's consumers
        linear.up = transform.low_rank.up[rows].clone()  # (O of this linear, r)


def report_tensors(model: nn.Module, transforms: dict[str, InputTransform]) -> dict[str, Tensor]:
    """Scales and zero points of weights and static activations, and the transforms, by name."""
    tensors: dict[str, Tensor] = {}

    def add_params(prefix: str, params: QParams) -> None:
        tensors[f"{prefix}.scale"] = params.scale
        tensors[f"{prefix}.zero_point"] = params.zero_point

    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and module.weight_params is not None:
            add_params(f"{name}.weight", module.weight_params)
            if module.down is not None:
                tensors[f"{name}.down"] = module.down
                tensors[f"{name}.up"] = module.up
        if isinstance(module, (QuantLinear, QuantMatMul)):
            for operand, quantizer in module.named_children():
                if hasattr(quantizer, "zero_point"):
                    params = QParams(quantizer.scale, quantizer.zero_point)
                    add_params(f"{name}.{operand}", params)
    for name, transform in transforms.items():
        tensors[f"{name}.transform.scale"] = transform.scale
        tensors[f"{name}.transform.shift"] = transform.shift
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
