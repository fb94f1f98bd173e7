"""The whole of post-training quantization on one page.

    select calibration rows (calibration.py)
    -> for every site: solve the recipe's transforms on its inputs, one after the other, and fold them (folding.py)
    -> round the weights
    -> run the calibration rows through observers, replace these by quantizers (observers.py, quantizers.py)

Folding leaves the function of the model unchanged, so the inputs of all sites are those of the full-precision model and
can be collected before any transform is applied. Activation ranges are calibrated with rounded weights and unrounded
activations. `quantize` changes the adapter's model in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq import folding
from ptq.modules import OnlineTransform, QuantLinear, QuantMatMul, swap
from ptq.numerics import NonFiniteError, QParams
from ptq.observers import Observer
from ptq.quantizers import DynamicQuantizer, rounded_weight, with_params
from ptq.recipe import TRANSFORMS, Recipe
from ptq.stwq import input_spec
from ptq.types import Adapter, CalibrationSet, InputTransform, QuantSpec, Rows, Segments, Site

Track = Callable[[Iterable, str], Iterable]  # wraps an iterable to show progress
COLLECT_BYTES = 4 * 2**30  # of site inputs held at a time


@dataclass(frozen=True)
class Report:
    """What quantization found: parameters and transforms by name, flat."""

    tensors: dict[str, Tensor]


@torch.no_grad()
def quantize(
    adapter: Adapter, calibration: CalibrationSet, recipe: Recipe, batch: int = 32, track: Track = lambda it, what: it,
) -> Report:
    """Quantize the adapter's model in place by a recipe.

    Args:
        batch: calibration rows per forward pass. track: shows progress.

    Raises:
        ConfigError: the recipe does not fit. NonFiniteError: an activation or weight holds NaN or infinity.
    """
    if recipe.released:
        from ptq.released import quantize_released  # a sequence of its own, see there

        transforms = quantize_released(adapter, calibration, recipe, track)
    else:
        batches = calibration.batches(batch)
        transforms = transform_sites(adapter, batches, recipe, track)
        round_weights(adapter, recipe, transforms)
        calibrate_activations(adapter, batches, len(calibration), recipe, track)
    return Report(parameters(adapter.model, transforms))


def transform_sites(
    adapter: Adapter, batches: Sequence[Rows], recipe: Recipe, track: Track
) -> dict[str, InputTransform]:
    """Solve and apply the recipe's transforms at every site they act on; returns the total transform per site."""
    sites = [s for s in recipe.scope.sites(adapter) if s.kind in recipe.sites] if recipe.transforms else []
    total: dict[str, InputTransform] = {}
    for site, x in track(list_inputs(adapter, batches, sites, recipe.exclude_sinks), "transforms"):
        weight = torch.cat([adapter.model.get_submodule(name).weight for name in site.consumers])
        chain = InputTransform.identity(x.shape[1], x)
        for name in recipe.transforms:
            step = TRANSFORMS[name](chain(x), weight * chain.scale, recipe)
            chain = chain.then(step)
        total[site.name] = chain
    for site in sites:  # not before all are solved: what cannot fold runs online only once its linear is quantized
        folding.apply(adapter.model, site, total[site.name])
    return total


def list_inputs(
    adapter: Adapter, batches: Sequence[Rows], sites: list[Site], exclude_sinks: bool
) -> Iterator[tuple[Site, Tensor]]:
    """Inputs (N, C) of every site over all calibration tokens, sinks left out if asked to.

    Holds at most about `COLLECT_BYTES` of inputs and runs the rows again for the sites that did not fit.
    """
    queue = list(sites)
    room = COLLECT_BYTES
    while queue:
        seen = collect(adapter, batches[:1], queue, exclude_sinks)
        size = {s.name: seen[s.name].numel() * seen[s.name].element_size() * len(batches) for s in queue}
        fit, used = 0, 0
        while fit < len(queue) and (fit == 0 or used + size[queue[fit].name] <= room):
            used += size[queue[fit].name]
            fit += 1
        taken, queue = queue[:fit], queue[fit:]
        if len(batches) > 1 or queue:
            seen = collect(adapter, batches, taken, exclude_sinks)
        for site in taken:
            yield site, seen.pop(site.name)


def collect(adapter: Adapter, batches: Sequence[Rows], sites: list[Site], exclude_sinks: bool) -> dict[str, Tensor]:
    """Inputs (N, C) of the sites' first consumers during forward passes over the batches."""
    parts: dict[str, list[Tensor]] = {s.name: [] for s in sites}

    def keep(site: Site) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, args: tuple) -> None:
            x, positions = args[0], args[1] if len(args) > 1 else None
            if exclude_sinks and site.sinks and positions is not None:
                x = x[:, positions >= site.sinks]
            parts[site.name].append(x.reshape(-1, x.shape[-1]))
        return hook

    handles = [adapter.model.get_submodule(s.name).register_forward_pre_hook(keep(s)) for s in sites]
    try:
        for rows in batches:
            adapter.forward(rows)
    finally:
        for handle in handles:
            handle.remove()
    for name, x in parts.items():
        if not all(bool(torch.isfinite(part).all()) for part in x):
            raise NonFiniteError(f"{name}: activations contain NaN or infinity, only finite numbers are allowed")
    return {name: torch.cat(x) for name, x in parts.items()}


def round_weights(adapter: Adapter, recipe: Recipe, transforms: dict[str, InputTransform]) -> None:
    """Replace every linear in scope by a quantized one with its weight rounded, every product by a quantized one."""
    model = adapter.model
    for site in recipe.scope.sites(adapter):
        for name in site.consumers:
            linear = QuantLinear(model.get_submodule(name))
            try:
                linear.weight, linear.weight_params = rounded_weight(linear.weight, recipe.weights)
            except NonFiniteError as error:
                raise NonFiniteError(f"{name}.weight: {error}") from error
            if site.fold is None and site.name in transforms:
                linear.transform = OnlineTransform(transforms[site.name])
            swap(model, name, linear)
    for product in recipe.scope.products(adapter):
        swap(model, product.name, QuantMatMul())


@dataclass(frozen=True)
class Slot:
    """A place for a quantizer: attribute `name` of `module`, filled the same way in `followers`."""

    module: nn.Module
    name: str
    spec: QuantSpec
    segments: Segments
    label: str
    followers: tuple[nn.Module, ...] = ()

    def fill(self, quantizer: nn.Module) -> None:
        for module in (self.module, *self.followers):
            setattr(module, self.name, quantizer)


def slots(adapter: Adapter, recipe: Recipe) -> list[Slot]:
    """All activation quantizers of a recipe, in forward order of the sites."""
    found: list[Slot] = []
    for site in recipe.scope.sites(adapter):
        first, *rest = (adapter.model.get_submodule(name) for name in site.consumers)
        spec = input_spec(site, recipe.activations, recipe.stwq)
        found.append(Slot(first, "input", spec, site.segments, site.name, tuple(rest)))
    for product in recipe.scope.products(adapter):
        module = adapter.model.get_submodule(product.name)
        for operand in ("a", "b"):
            found.append(Slot(module, operand, recipe.activations, Segments(), f"{product.name}.{operand}"))
    return found


def calibrate_activations(
    adapter: Adapter, batches: Sequence[Rows], rows: int, recipe: Recipe, track: Track
) -> None:
    """Fill every slot with its quantizer, static ones after observing the calibration rows."""
    observed: list[tuple[Slot, Observer]] = []
    for slot in slots(adapter, recipe):
        if slot.spec.granularity == "token_dynamic":
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
        slot.fill(with_params(slot.spec, observer.params(), slot.segments))


def parameters(model: nn.Module, transforms: dict[str, InputTransform]) -> dict[str, Tensor]:
    """Scales and zero points of weights and static activations, and the transforms, by name."""
    tensors: dict[str, Tensor] = {}

    def add(prefix: str, params: QParams) -> None:
        tensors[f"{prefix}.scale"], tensors[f"{prefix}.zero_point"] = params.scale, params.zero_point

    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and module.weight_params is not None:
            add(f"{name}.weight", module.weight_params)
        if isinstance(module, (QuantLinear, QuantMatMul)):
            for slot, quantizer in module.named_children():
                if hasattr(quantizer, "zero_point"):
                    add(f"{name}.{slot}", QParams(quantizer.scale, quantizer.zero_point))
    for name, transform in transforms.items():
        tensors[f"{name}.transform.scale"], tensors[f"{name}.transform.shift"] = transform.scale, transform.shift
    return {k: v.detach().cpu().clone() for k, v in tensors.items()}
