"""What a quantized model takes at rest, counted by hand."""

from __future__ import annotations

import pytest
import torch

from experiments.run.scoring import model_bytes
from ptq.calibration import no_rows
from ptq.methods.svdquant import SVDQuantSettings
from ptq.options import Options
from ptq.pipeline import quantize
from ptq.recipe import Change, Recipe
from ptq.sites import Scope
from ptq.types import QuantSpec
from tests.experiments.cells import config_of
from tests.families import calibration, tiny

RANK = 6


@pytest.mark.parametrize("chain", [(), ("svd",)], ids="+".join)
@torch.no_grad()
def test_codes_parameters_and_branches_count_at_their_own_width(chain: tuple[str, ...]) -> None:
    adapter = tiny("par", torch.float32)
    model = adapter.model
    plain = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    settings = Options(svd=SVDQuantSettings(rank=RANK, iterations=1, grid=False))
    how = Recipe(
        QuantSpec(6, granularity="out_channel"),
        QuantSpec(6, granularity="token_dynamic"),
        chain,
        scope=Scope(("qkv", "fc1"), False),
        options=settings,
    )
    shapes = {
        site.name: [tuple(model.get_submodule(name).weight.shape) for name in site.consumers]
        for site in how.scope.sites(adapter)
    }
    quantize(adapter, calibration("par", adapter), how, batch=4)
    rows = sum(o for group in shapes.values() for o, _ in group)
    channels = 48
    weights = rows * channels
    expected = plain - 4 * weights + weights * 6 // 8 + 8 * rows
    if chain:  # w1 and w3 share one A; every site folds, so nothing runs online
        assert [len(group) for group in shapes.values()] == [1, 2] * 2
        expected += 2 * RANK * (rows + channels * len(shapes))
    assert model_bytes(model, config_of("quant=w6a6")) == expected


@torch.no_grad()
def test_a_smoothing_that_runs_online_counts_too() -> None:
    adapter = tiny("rar", torch.float32)
    settings = Options(svd=SVDQuantSettings(rank=RANK, iterations=1, grid=False))
    sizes = {}
    for chain in ((), ("svd",)):
        adapter = tiny("rar", torch.float32)
        how = Recipe(
            QuantSpec(8, granularity="out_channel"),
            QuantSpec(8, granularity="token_dynamic"),
            chain,
            scope=Scope(("fc2",), False),
            options=settings,
        )
        quantize(adapter, calibration("rar", adapter), how, batch=4)
        sizes[chain] = model_bytes(adapter.model, config_of("quant=w8a8"))
    branch = 2 * RANK * (48 + 192)
    online = 4 * 192
    assert sizes["svd",] - sizes[()] == 2 * (branch + online)  # in either block


# bytes of a scale with its zero point, and of the whole tensor's scale
SCALES = {"int": (8, 0), "mxfp4": (1, 0), "nvfp4": (1, 4), "fp6_e2m3": (4, 0)}


@pytest.mark.parametrize("name", SCALES)
@torch.no_grad()
def test_scales_of_groups_count_as_they_are_stored(name: str) -> None:
    adapter = tiny("rar", torch.float32)
    model = adapter.model
    plain = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    size = {"mxfp4": 32, "nvfp4": 16}.get(name, 20)
    bits = 6 if name == "fp6_e2m3" else 4
    weights = QuantSpec(bits, granularity="group", range="minmax", format=name, group_size=size)
    how = Recipe(weights, QuantSpec(16), scope=Scope(("fc2",), False))
    assert not how.reads_rows
    quantize(adapter, no_rows(), how)
    scale_bytes, whole_bytes = SCALES[name]
    count = 2 * 48 * 192  # fc2 of either block
    groups = 2 * 48 * -(-192 // size)
    expected = plain - 4 * count + count * bits // 8 + scale_bytes * groups + 2 * whole_bytes
    assert model_bytes(model, config_of("quant=w8a8")) == expected


@torch.no_grad()
def test_a_weight_that_is_left_as_it_is_counts_as_it_is() -> None:
    adapter = tiny("rar", torch.float32)
    plain = model_bytes(adapter.model, config_of("quant=w8a8"))
    changes = (Change("fc2", "weights", (("bits", 16),)),)
    how = Recipe(
        QuantSpec(8, granularity="out_channel"),
        QuantSpec(8, granularity="token_dynamic"),
        scope=Scope(("fc2",), False),
        changes=changes,
    )
    quantize(adapter, calibration("rar", adapter, 2), how, batch=4)
    assert model_bytes(adapter.model, config_of("quant=w8a8")) == plain
