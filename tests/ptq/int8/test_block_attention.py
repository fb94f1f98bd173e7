"""Attention in half precision that leaves as codes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ptq.int8 import ops
from ptq.int8.blocks.attention import HeadNorm, normalise_heads, reference_attention_codes
from ptq.int8.blocks.norms import Grid
from ptq.int8.blocks.operators import (
    attention_codes,
    attention_codes_operator,
    int8_linear_keys,
    store_keys,
    store_keys_operator,
)
from ptq.int8.epilogue import Epilogue

gpu = pytest.mark.gpu


def output_grid(tokens: int, device: str = "cpu") -> Grid:
    """Steps of 1 / 80 for tokens from position 2 on; the last ones share theirs."""
    zero_point = torch.randint(-9, 9, (tokens,)).float()
    scale = (0.8 + 0.4 * torch.rand(tokens)) / 80
    table = torch.stack((scale, zero_point, scale * zero_point))
    return Grid(table.to(device), torch.arange(2, tokens + 2, device=device))


def random_heads(batch: int, tokens: int, heads: int, channels: int) -> tuple:
    """Queries, keys and values as a product leaves them, and what the models norm them with."""
    torch.manual_seed(channels)
    qkv = torch.randn(batch, tokens, 3, heads, channels)
    layer = HeadNorm("layer", *(1 + 0.2 * torch.randn(4, channels)), 1e-6)
    unit = HeadNorm("unit", head_scale=2 + 3 * torch.rand(heads))
    return qkv, layer, unit


def random_product(rows: int, heads: int, channels: int) -> tuple:
    """Codes, weight and epilogue of a product of queries, keys and values."""
    width = heads * channels
    codes = torch.randint(-128, 128, (rows, 64), dtype=torch.int8)
    weight = torch.randint(-128, 128, (3 * width, 64), dtype=torch.int8)
    terms = torch.randn(3, 3 * width)
    sums = codes.sum(dim=1, dtype=torch.int32)
    table = torch.tensor([[0.02], [3.0], [0.06]])
    epilogue = Epilogue(table, None, sums, 1e-3 * terms[0].abs(), *(0.1 * terms[1:]), None)
    return codes, weight, epilogue


def test_codes_are_those_of_the_library_s_attention() -> None:
    qkv, norm, _ = random_heads(2, 9, 3, 16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    grid = output_grid(9)
    codes, sums = attention_codes(q, k, v, norm, 0.25, True, None, grid)
    q = F.layer_norm(q, (16,), norm.q_weight, norm.q_bias, 1e-6)
    k = F.layer_norm(k, (16,), norm.k_weight, norm.k_bias, 1e-6)
    average = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)
    x_scale, zero_point, _ = grid.x_params[:, grid.positions.clamp(max=8)]
    expected = ops.static_codes(average.transpose(1, 2).flatten(2), x_scale, zero_point, 8)
    difference = (codes.view(2, 9, -1).int() - expected.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.005
    assert torch.equal(sums, codes.sum(dim=1, dtype=torch.int32))


def test_a_mask_does_what_causal_does() -> None:
    qkv, _, norm = random_heads(2, 9, 3, 16)
    heads = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mask = torch.full((9, 9), float("-inf")).triu_(1)
    grid = output_grid(9)
    causal = attention_codes(*heads, norm, 1.0, True, None, grid)
    masked = attention_codes(*heads, norm, 1.0, False, mask[None, None], grid)
    assert torch.equal(causal[0], masked[0])


def test_the_operator_says_what_the_compiler_is_to_expect() -> None:
    qkv, norm, _ = random_heads(2, 5, 3, 16)
    heads = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    grid = output_grid(5)
    given = (*heads, *norm, 0.25, True, None, *grid)
    torch.library.opcheck(attention_codes_operator, given)
    cache = torch.zeros(2, 2, 3, 9, 16)
    terms = norm.kind, norm.k_weight, norm.k_bias, norm.eps
    torch.library.opcheck(
        store_keys_operator, (*cache, *heads[1:], torch.tensor([3, 1, 8, 0, 5]), *terms)
    )
    codes, weight, epilogue = random_product(10, 2, 16)
    given = codes, weight, *epilogue, torch.float32, 2, "layer", 1e-6
    torch.library.opcheck(int8_linear_keys, given)


@gpu
@pytest.mark.parametrize("channels", [48, 64, 80, 88])
@pytest.mark.parametrize(("tokens", "keys"), [(256, 256), (257, 257), (36, 91), (1, 30)])
@pytest.mark.parametrize("kind", ["layer", "unit"])
def test_the_kernel_equals_the_reference(channels: int, tokens: int, keys: int, kind: str) -> None:
    qkv, layer, unit = random_heads(3, keys, 4, channels)
    norm = layer if kind == "layer" else unit
    norm = norm._replace(keys=tokens == keys)
    norm = HeadNorm(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in norm))
    q, k, v = qkv.cuda().bfloat16().permute(2, 0, 3, 1, 4).unbind(0)
    grid = output_grid(tokens, "cuda")
    given = q[:, :, -tokens:], k, v, norm, channels**-0.5, tokens == keys, None, grid
    codes, sums = attention_codes(*given)
    expected, _ = reference_attention_codes(*given)
    difference = (codes.int() - expected.int()).abs()
    # weights and values meet in half precision: 0.4 % of values of up to a few hundred steps
    assert difference.max() <= 3
    assert difference.float().mean() < 0.1
    assert torch.equal(sums, codes.sum(dim=1, dtype=torch.int32))


@gpu
@pytest.mark.parametrize("channels", [48, 64, 80, 88])
@pytest.mark.parametrize("kind", ["layer", "unit", "none"])
def test_the_kernel_stores_keys_and_values(channels: int, kind: str) -> None:
    qkv, layer, unit = random_heads(3, 9, 5, channels)
    norm = {"layer": layer, "unit": unit, "none": HeadNorm()}[kind]
    norm = HeadNorm(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in norm))
    _, k, v = qkv.cuda().bfloat16().permute(2, 0, 3, 1, 4).unbind(0)
    cache = torch.randn(2, 3, 5, 20, channels, device="cuda").bfloat16()
    expected = cache.clone()
    places = torch.arange(4, 13, device="cuda")
    store_keys(*cache, k, v, places, norm)
    key = normalise_heads(k.float(), kind, norm.k_weight, norm.k_bias, norm.eps)
    expected[:, :, :, places] = torch.stack((key.bfloat16(), v))
    assert torch.equal(cache[1], expected[1])
    torch.testing.assert_close(cache, expected)
    assert (cache != expected).float().mean() < 1e-3


@gpu
@pytest.mark.parametrize("rows", [600, 2560])
@pytest.mark.parametrize("kind", ["layer", "unit"])
def test_the_product_leaves_the_norms_of_keys(rows: int, kind: str) -> None:
    codes, weight, epilogue = random_product(rows, 4, 64)
    epilogue = Epilogue(*(None if part is None else part.cuda() for part in epilogue))
    given = codes.cuda(), weight.cuda(), *epilogue, torch.bfloat16
    y, factors = int8_linear_keys(*given, 4, kind, 1e-6)
    assert torch.equal(y, ops.int8_linear(*given))
    keys = y.float().view(rows, 3, 4, 64)[:, 1]
    expected = 1 / keys.norm(dim=-1)
    if kind == "layer":
        expected = torch.rsqrt(keys.var(dim=-1, correction=0) + 1e-6)
    torch.testing.assert_close(factors, expected, rtol=1e-4, atol=0)
    # attention with them is attention without
    layer_or_unit = random_heads(1, 1, 4, 64)[1 if kind == "layer" else 2]
    norm = HeadNorm(*(p.cuda() if isinstance(p, torch.Tensor) else p for p in layer_or_unit))
    q, k, v = y.view(2, rows // 2, 3, 4, 64).permute(2, 0, 3, 1, 4).unbind(0)
    rest = 0.125, True, None, output_grid(rows // 2, "cuda")
    found, _ = attention_codes(q, k, v, norm._replace(factors=factors), *rest)
    plain, _ = attention_codes(q, k, v, norm, *rest)
    difference = (found.int() - plain.int()).abs()
    assert difference.max() <= 3
    assert difference.float().mean() < 0.05
