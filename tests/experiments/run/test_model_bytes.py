"""What a quantized model takes at rest, counted by hand."""

from __future__ import annotations

import pytest
import torch

from experiments.run.scoring import model_bytes
from ptq.methods.svdquant import SVDQuantSettings
from ptq.options import Options
from ptq.pipeline import quantize
from ptq.recipe import Recipe
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
