"""Finding the ranges of activations, the last step of the pipeline: the calibration rows run
through observers, which then make room for quantizers.

The weights are rounded by now, the activations are not: an observer passes on what it sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ptq.numbers.numerics import QParams
from ptq.numbers.observers import Observer, TensorScaleObserver
from ptq.numbers.quantizers import run_time_quantizer
from ptq.recipe import Recipe
from ptq.registry.entries import FORMATS
from ptq.sites import Adapter, Rows, Segments, Track, product_segments
from ptq.spec import QuantSpec
from ptq.stwq import input_spec, static_quantizer


@dataclass(frozen=True)
class Slot:
    """A place for a quantizer: the attribute `name` of `module`.

    Attributes:
        label: how messages and reports call it.
        followers: other linears that read the same activation and get the same quantizer.
    """

    module: nn.Module
    name: str
    spec: QuantSpec
    segments: Segments
    label: str
    followers: tuple[nn.Module, ...] = ()

    def fill(self, quantizer: nn.Module) -> None:
        """Put a quantizer here, in the followers too."""
        for module in (self.module, *self.followers):
            setattr(module, self.name, quantizer)


def quantizer_slots(adapter: Adapter, recipe: Recipe) -> list[Slot]:
    """All activation quantizers of a recipe, in forward order of the sites."""
    model = adapter.model
    slots: list[Slot] = []
    for site in recipe.scope.sites(adapter):
        first, *followers = [model.get_submodule(name) for name in site.consumers]
        spec = input_spec(site, recipe.at_site(adapter, site).activations, recipe.stwq)
        if not spec.is_rounded:
            continue
        slots.append(Slot(first, "input", spec, site.segments, site.name, tuple(followers)))
    for product in recipe.scope.products(adapter):
        module = model.get_submodule(product.name)
        for operand in ("a", "b"):
            spec = recipe.operand(adapter, product, operand)
            # an operand may stay in full precision
            if spec is not None:
                by_segment = spec.granularity == "head_segment"
                segments = product_segments(adapter, product) if by_segment else Segments()
                label = f"{product.name}.{operand}"
                slots.append(Slot(module, operand, spec, segments, label))
    return slots


def calibrate_activations(
    adapter: Adapter,
    batches: Sequence[Rows],
    rows: int,
    recipe: Recipe,
    track: Track,
    input_params: Mapping[str, QParams],
) -> None:
    """Fill every slot with its quantizer.

    Args:
        rows: calibration rows that the batches bring in all.
        input_params: by site name, parameters that a method has fixed already.
    """
    observed: list[tuple[Slot, Observer | TensorScaleObserver]] = []
    for slot in quantizer_slots(adapter, recipe):
        if slot.label in input_params and slot.spec.granularity == "tensor":
            slot.fill(static_quantizer(slot.spec, input_params[slot.label], slot.segments))
        elif FORMATS[slot.spec.format].own_quantizer:
            slot.fill(FORMATS[slot.spec.format].kind(slot.spec.levels))
        elif slot.spec.is_dynamic and not FORMATS[slot.spec.format].tensor_scale:
            slot.fill(run_time_quantizer(slot.spec))
        else:
            observer = make_observer(slot, rows)
            # the followers read the same activation, which is to be counted once
            setattr(slot.module, slot.name, observer)
            observed.append((slot, observer))

    passes = max((observer.passes for _, observer in observed), default=0)
    for number in range(passes):
        for part in track(batches, f"activation ranges, pass {number + 1}"):
            adapter.forward(part)
        for _, observer in observed:
            observer.end_pass()

    for slot, observer in observed:
        if isinstance(observer, TensorScaleObserver):
            slot.fill(observer.quantizer())
        else:
            slot.fill(static_quantizer(slot.spec, observer.params(), slot.segments))


def make_observer(slot: Slot, rows: int) -> Observer | TensorScaleObserver:
    """What finds the parameters of a slot, or what of them is fixed in calibration."""
    if slot.spec.is_dynamic:
        return TensorScaleObserver(slot.spec, slot.label)
    return Observer(slot.spec, slot.segments, rows, slot.label)
