"""Whole blocks in integers: what they compute in VAR, RAR and MAR, and which stay as they are."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from models.decoding.decoder import StaticCache
from models.layers import KVCache
from ptq import pipeline
from ptq.int8.blocks.layers import (
    Int8Block,
    Pending,
    chain_blocks,
    part_at,
    run_by_kernels,
)
from ptq.int8.modules import Int8Linear, all_codes, to_int8
from ptq.modules import OnlineTransform
from ptq.recipe import Recipe
from ptq.sites import Scope
from ptq.transform import InputTransform
from ptq.types import Adapter, QuantSpec
from tests.families import calibration, decoded, tiny

gpu = pytest.mark.gpu
WEIGHTS = QuantSpec(8, granularity="out_channel")


def in_integers(family: str, products: bool = False, stwq: bool = True, **parts: Any) -> Adapter:
    """A small model whose linear layers are in integers, with the products of attention or
    without, with parameters by token or per tensor, or with parts of STAQ."""
    adapter = tiny(family, torch.float32)
    recipe = Recipe(WEIGHTS, QuantSpec(8), stwq=stwq, scope=Scope(matmuls=products), **parts)
    pipeline.quantize(adapter, calibration(family, adapter, 2), recipe, batch=2)
    to_int8(adapter.model, all_codes(adapter.model, 8))
    return adapter


def half_precision(rows: dict[str, torch.Tensor], device: str = "cpu") -> dict[str, torch.Tensor]:
    """Rows for a model in half precision."""
    converted = {}
    for name, value in rows.items():
        value = value.to(device)
        converted[name] = value.bfloat16() if value.is_floating_point() else value
    return converted


@pytest.mark.parametrize("family", ["var", "rar", "mar"])
@pytest.mark.parametrize("products", [False, True])
@torch.no_grad()
def test_blocks_compute_what_their_layers_do(family: str, products: bool) -> None:
    adapter = in_integers(family, products)
    rows = calibration(family, adapter, 2).rows
    expected = adapter.forward(rows)
    stepwise = decoded(adapter, rows)
    names = list(adapter.model.state_dict())
    assert run_by_kernels(adapter)
    blocks = [adapter.model.get_submodule(name) for name in adapter.blocks]
    assert all(isinstance(block, Int8Block) for block in blocks)
    assert list(adapter.model.state_dict()) == names
    # a code at the edge of a step may get either, and GELU's polynomial is no erf
    assert (adapter.forward(rows) - expected).norm() < 0.01 * expected.norm()
    if stepwise is not None:
        assert (decoded(adapter, rows) - stepwise).norm() < 0.01 * stepwise.norm()


@pytest.mark.parametrize("family", ["var", "rar", "mar"])
@torch.no_grad()
def test_blocks_shift_sinks_as_their_layers_do(family: str) -> None:
    adapter = in_integers(family, sink_shift=True)
    block = adapter.model.get_submodule(adapter.blocks[0])
    linears = [module for module in block.modules() if isinstance(module, Int8Linear)]
    assert sum(linear.sink_shift is not None for linear in linears) >= 3
    rows = calibration(family, adapter, 2).rows
    expected = adapter.forward(rows)
    assert run_by_kernels(adapter)
    assert (adapter.forward(rows) - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("family", ["var", "rar", "mar"])
@torch.no_grad()
def test_blocks_scale_what_gelu_gives_as_their_layers_do(family: str) -> None:
    adapter = in_integers(family, transforms=("geometric",))
    fc2 = part_at(adapter.model.get_submodule(adapter.blocks[0]), adapter.block_form.fc2)
    assert fc2.transform.scale.std() > 0
    assert fc2.transform.shift.any()
    rows = calibration(family, adapter, 2).rows
    expected = adapter.forward(rows)
    assert run_by_kernels(adapter)
    assert (adapter.forward(rows) - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("family", ["var", "rar", "mar"])
@torch.no_grad()
def test_a_chain_of_blocks_computes_what_they_do_alone(family: str) -> None:
    adapter = in_integers(family)
    adapter.model.bfloat16()
    if family == "var":
        adapter.quantizer.bfloat16()
    rows = half_precision(calibration(family, adapter, 2).rows)
    assert not chain_blocks(adapter)  # they are layers still
    assert run_by_kernels(adapter)
    expected = adapter.forward(rows).float()
    stepwise = decoded(adapter, rows)
    assert chain_blocks(adapter)
    handed: list[object] = []
    for name in adapter.blocks:
        block = adapter.model.get_submodule(name)
        block.register_forward_hook(lambda block, inputs, output: handed.append(output))
    # of a row of blocks, the last one alone adds
    found = adapter.forward(rows).float()
    rows_of_blocks = 2 if family == "mar" else 1
    assert sum(isinstance(output, Pending) for output in handed) == len(handed) - rows_of_blocks
    assert (found - expected).norm() < 0.01 * expected.norm()
    if stepwise is not None:
        assert (decoded(adapter, rows) - stepwise).norm() < 0.01 * stepwise.norm()


def test_blocks_that_kernels_do_not_run_alone_are_no_chain() -> None:
    adapter = in_integers("rar", products=True)
    assert run_by_kernels(adapter)
    assert not chain_blocks(adapter)  # in float32, and with attention in integers
    adapter.model.bfloat16()
    assert not chain_blocks(adapter)


@torch.no_grad()
def test_a_causal_mask_needs_no_tensor() -> None:
    adapter = in_integers("rar")
    block = adapter.model.blocks[0]
    x, c = torch.randn(2, 3, 9, 48)
    positions = torch.arange(9)
    mask = torch.full((9, 9), float("-inf")).triu_(1)
    expected = block(x, c, positions, mask)
    torch.testing.assert_close(block(x, c, positions, "causal"), expected)
    assert run_by_kernels(adapter)
    masked = block(x, c, positions, mask)
    torch.testing.assert_close(block(x, c, positions, "causal"), masked)
    assert (masked - expected).norm() < 0.01 * expected.norm()


@torch.no_grad()
def test_keys_go_to_the_slots_of_a_cache_of_fixed_shape() -> None:
    adapter = in_integers("rar")
    adapter.model.bfloat16()
    assert run_by_kernels(adapter)
    block = adapter.model.blocks[0]
    x, c = torch.randn(2, 3, 9, 48).bfloat16()
    growing = KVCache(9)
    fixed = StaticCache(9, masked=False)
    for first, end in ((0, 4), (4, 5), (5, 9)):
        fixed.visible = end
        positions = torch.arange(first, end)
        given = x[:, first:end], c[:, first:end], positions, None
        expected = block(*given, growing)
        assert torch.equal(block(*given, fixed), expected)
    assert torch.equal(fixed.k, growing.k)
    assert torch.equal(fixed.v, growing.v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_block_compiles_into_one_graph(dtype: torch.dtype) -> None:
    adapter = in_integers("rar")
    adapter.model.to(dtype)
    assert run_by_kernels(adapter)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    x, c = torch.randn(2, 3, 9, 48).to(dtype)
    given = x, c, torch.arange(9), "causal"
    block = adapter.model.blocks[0]
    expected = block(*given)
    forward = torch.compile(type(block).forward, backend=backend, fullgraph=True)
    assert torch.equal(forward(block, *given), expected)
    forward(adapter.model.blocks[1], *given)  # blocks share their graph
    assert len(graphs) == 1
    assert expected.dtype == dtype


@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "mlp.fc1"])
def test_only_what_gelu_hands_on_is_scaled_online(
    layer: str, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = in_integers("rar")
    linear = adapter.model.blocks[1].get_submodule(layer)
    channels = linear.in_features
    transform = InputTransform(torch.full((channels,), 2.0), torch.zeros(channels))
    linear.transform = OnlineTransform(transform)
    with caplog.at_level(logging.INFO):
        assert not run_by_kernels(adapter)
    name = layer.rpartition(".")[2]
    assert f"in blocks.1 {name} transforms its input online" in caplog.text


def test_a_copy_of_a_model_is_run_by_kernels_too() -> None:
    adapter = in_integers("rar")
    assert run_by_kernels(adapter)
    assert isinstance(copy.deepcopy(adapter.model).blocks[1], Int8Block)


@pytest.mark.parametrize(
    ("family", "layer", "said"),
    [
        ("par", None, "those of par have another form"),
        ("rar", "blocks.1.mlp.fc1", "in blocks.1 fc1 is not in integers"),
        ("var", "blocks.0.ln_wo_grad", "in blocks.0 norm1 is no LayerNorm"),
    ],
)
def test_what_stays_as_it_is_and_why(
    family: str, layer: str | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = in_integers(family, stwq=False)
    if layer is not None:
        parent, _, name = layer.rpartition(".")
        setattr(adapter.model.get_submodule(parent), name, nn.Identity())
    with caplog.at_level(logging.INFO):
        assert not run_by_kernels(adapter)
    assert said in caplog.text
    assert not any(isinstance(module, Int8Block) for module in adapter.model.modules())


@gpu
@pytest.mark.parametrize("family", ["var", "rar", "mar"])
@pytest.mark.parametrize(
    "parts",
    [{}, {"sink_shift": True}, {"sink_shift": True, "transforms": ("geometric",)}],
    ids=str,
)
@torch.no_grad()
def test_kernels_compute_what_the_layers_do(family: str, parts: dict[str, Any]) -> None:
    adapter = in_integers(family, **parts)
    rows = calibration(family, adapter, 2).rows
    exact = adapter.forward(rows)
    adapter.model.cuda().bfloat16()
    if family == "var":
        adapter.quantizer.cuda().bfloat16()
    on_gpu = half_precision(rows, "cuda")
    layers = adapter.forward(on_gpu).cpu()
    assert run_by_kernels(adapter)
    kernels = adapter.forward(on_gpu).cpu()
    # both round in half precision between the layers, at different places
    error = (layers - exact).norm() / exact.norm()
    assert (kernels - exact).norm() / exact.norm() < max(1.3 * error, 0.01)
    assert chain_blocks(adapter)
    chained = adapter.forward(on_gpu).cpu()
    assert (chained - exact).norm() / exact.norm() < max(1.3 * error, 0.01)
    stepwise = decoded(adapter, on_gpu)
    if stepwise is not None:
        assert (stepwise.cpu() - exact).norm() / exact.norm() < max(1.5 * error, 0.02)


@gpu
@pytest.mark.parametrize("family", ["var", "rar", "mar"])
@torch.no_grad()
def test_kernels_run_in_float32_too(family: str) -> None:
    adapter = in_integers(family)
    rows = calibration(family, adapter, 2).rows
    exact = adapter.forward(rows)
    adapter.model.cuda()
    if family == "var":
        adapter.quantizer.cuda()
    on_gpu = {name: value.cuda() for name, value in rows.items()}
    assert run_by_kernels(adapter)
    assert (adapter.forward(on_gpu).cpu() - exact).norm() < 0.01 * exact.norm()
    stepwise = decoded(adapter, on_gpu)
    if stepwise is not None:
        assert (stepwise.cpu() - exact).norm() < 0.01 * exact.norm()
