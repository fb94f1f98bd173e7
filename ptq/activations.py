"""Finding the ranges of activations, the last step of the pipeline: the calibration rows run
through observers, which then make room for quantizers.

The weights are rounded by now, the activations are not: an observer passes on what it sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ptq.numbers.numerics import QParams
from ptq.numbers.observers import Observer
from ptq.numbers.quantizers import DynamicQuantizer
from ptq.recipe import Recipe
from ptq.registry.entries import FORMATS
from ptq.sites import Adapter, Rows, Segments, Track
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
        spec = input_spec(site, recipe.activations, recipe.stwq)
        slots.append(Slot(first, "input", spec, site.segments, site.name, tuple(followers)))
    for product in recipe.scope.products(adapter):
        module = model.get_submodule(product.name)
        for operand in ("a", "b"):
            spec = recipe.operand(product, operand)
            # attention weights may stay in full precision
            if spec is not None:
                label = f"{product.name}.{operand}"
                slots.append(Slot(module, operand, spec, Segments(), label))
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
    observed: list[tuple[Slot, Observer]] = []
    for slot in quantizer_slots(adapter, recipe):
        if slot.label in input_params and slot.spec.granularity == "tensor":
            slot.fill(static_quantizer(slot.spec, input_params[slot.label], slot.segments))
        elif FORMATS[slot.spec.format].own_quantizer:
            slot.fill(FORMATS[slot.spec.format].kind(slot.spec.levels))
        elif slot.spec.granularity == "token_dynamic":
            slot.fill(DynamicQuantizer(slot.spec))
        else:
            observer = Observer(slot.spec, slot.segments, rows, slot.label)
            # the followers read the same activation, which is to be counted once
            setattr(slot.module, slot.name, observer)
            observed.append((slot, observer))

    # all slots follow the recipe's range rule, so that they need equally many passes
    passes = max((observer.passes for _, observer in observed), default=0)
    for number in range(passes):
        for part in track(batches, f"activation ranges, pass {number + 1}"):
            adapter.forward(part)
        for _, observer in observed:
            observer.end_pass()

    for slot, observer in observed:
        slot.fill(static_quantizer(slot.spec, observer.params(), slot.segments))
