"""What the tests of OmniQuant share: short trainings of small models that have something to
learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ptq.folding import apply_transform
from ptq.omniquant.omniquant import OmniQuantSettings as Settings
from ptq.omniquant.omniquant import TrainedBlock, train_blocks
from ptq.options import Options
from ptq.recipe import Recipe
from ptq.sites import Scope
from ptq.types import Adapter, InputTransform, QuantSpec, Rows
from tests.families import calibration, tiny

EVERYTHING = Scope()
LINEARS = Scope(("qkv", "proj", "fc1", "fc2"), matmuls=False)
NO_CHANGES: Mapping[str, object] = MappingProxyType({})


def recipe(
    bits: int = 4,
    scope: Scope = EVERYTHING,
    changes: Mapping[str, object] = NO_CHANGES,
    **settings: object,
) -> Recipe:
    """A short training unless `settings` say otherwise."""
    options = Options(omniquant=Settings(**{"epochs": 1, "batch": 4, **settings}))
    given = {
        "activations": QuantSpec(bits, granularity="token_dynamic"),
        "omniquant": True,
        **changes,
    }
    weights = QuantSpec(bits, granularity="out_channel")
    return Recipe(weights, sites=("qkv", "fc1"), scope=scope, options=options, **given)


def silent(items: Iterable, what: str) -> Iterable:
    return items


def outlying(family: str, dtype: torch.dtype = torch.float64) -> Adapter:
    """A small model with outlier channels that have an offset, where there is something to
    learn."""
    adapter = tiny(family, dtype)
    for site in adapter.sites:
        if site.kind in ("qkv", "fc1"):
            outlier = torch.arange(48) % 16 == 3
            shift = torch.where(outlier, -1.0, 0.0) if family != "par" else torch.zeros(48)
            scale = torch.where(outlier, 0.1, 1.0)
            apply_transform(adapter.model, site, InputTransform(scale.to(dtype), shift.to(dtype)))
    return adapter


def features(adapter: Adapter, rows: Rows) -> Tensor:
    """What the last block gives."""
    found = []
    handle = adapter.model.get_submodule(adapter.last_block).register_forward_hook(
        lambda m, args, y: found.append(y)
    )
    adapter.forward(rows)
    handle.remove()
    return found[0]


def trained(
    family: str, adapter: Adapter, how: Recipe, **kwargs: object
) -> dict[str, TrainedBlock]:
    return train_blocks(adapter, calibration(family, adapter).batches(4), how, silent, **kwargs)


def same(one: dict[str, TrainedBlock], other: dict[str, TrainedBlock]) -> bool:
    """Whether two results are equal bit by bit."""

    def flat(found: dict[str, TrainedBlock]) -> dict[str, Tensor]:
        tensors = {f"{b}.losses": t.losses for b, t in found.items()}
        for result in found.values():
            tensors |= {
                f"{n}.{k}": getattr(t, k)
                for n, t in result.transforms.items()
                for k in ("scale", "shift")
            }
            tensors |= {
                f"{n}.{k}": getattr(c, k) for n, c in result.clips.items() for k in ("low", "high")
            }
        return tensors

    a = flat(one)
    b = flat(other)
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
