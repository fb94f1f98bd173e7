"""With the histogram observer, what solvers and observers keep does not grow with the number of
calibration rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ptq.methods.solver import Problem
from ptq.numbers.observers import Observer
from ptq.recipe import Recipe
from ptq.registry.entries import TRANSFORMS
from ptq.types import QuantSpec, Segments, Site


def held(thing: object, seen: set[int]) -> int:
    """Bytes of all tensors that an object holds, directly or not."""
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return thing.untyped_storage().nbytes()
    if isinstance(thing, dict):
        return sum(held(value, seen) for value in thing.values())
    if isinstance(thing, (list, tuple)):
        return sum(held(value, seen) for value in thing)
    if isinstance(thing, nn.Module) or type(thing).__module__.startswith("ptq."):
        return held(vars(thing), seen)
    return 0


def kept_by(name: str, rows: int, observer: str) -> int:
    """Bytes that a solver of that name, or the observer of a quantizer, keeps after all passes over
    the rows."""
    spec = QuantSpec(6, observer=observer)
    if name in TRANSFORMS:
        how = Recipe(QuantSpec(6, granularity="out_channel"), spec, (name,))
        thing = TRANSFORMS[name].solver(
            Problem(Site("fc1", "fc1", ("fc1",)), torch.ones(8, 24), how, rows=rows)
        )
    else:
        thing = Observer(
            spec if name == "tensor" else spec.at("token_static"), Segments((0, 1, 2)), rows
        )
    x = torch.randn(rows, 40, 24, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40)
    most = 0
    done = False
    while not done:
        for part in x.split(4):
            thing.update(part) if name in TRANSFORMS else thing(part, positions)
            most = max(most, held(thing, set()))
        done = thing.end_pass()
    return most


@pytest.mark.parametrize("name", ["smoothquant", "shift", "gps", "repq", "tensor", "token_static"])
def test_what_is_kept_does_not_grow_with_the_rows(name: str) -> None:
    sizes = [kept_by(name, rows, "histogram") for rows in (8, 64)]
    assert sizes[0] == sizes[1] > 0


def test_the_exact_observer_may_grow() -> None:
    assert kept_by("tensor", 512, "exact") > kept_by("tensor", 8, "exact")
