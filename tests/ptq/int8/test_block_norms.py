"""From the residual stream to codes in one operator: residual, norm, modulation, rounding, sums."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ptq.int8 import ops
from ptq.int8.blocks.norms import (
    Branch,
    Grid,
    Modulation,
    Norm,
    reference_norm_codes,
)
from ptq.int8.blocks.operators import norm_codes, norm_codes_operator
from ptq.int8.epilogue import Epilogue, reference_linear

gpu = pytest.mark.gpu
IMAGES = 3
TOKENS = 4
ROWS = IMAGES * TOKENS
EPS = 1e-6


def input_table(columns: int, steps: float = 40.0) -> Tensor:
    """Scales, zero points and their products of so many positions (3, P)."""
    scale = (0.7 + 0.6 * torch.rand(columns)) / steps
    zero_point = torch.randint(-20, 20, (columns,)).float()
    return torch.stack((scale, zero_point, scale * zero_point))


def random_case(rows: int, channels: int, by_token: bool) -> tuple:
    """Arguments of `norm_codes` with everything but integer parts, for rows of `TOKENS` tokens."""
    torch.manual_seed(channels)
    count = rows if by_token else rows // TOKENS
    shift, scale, gate = torch.randn(count, 3 * channels).chunk(3, dim=1)
    norm = Norm("layer", 1 + 0.1 * torch.randn(channels), 0.1 * torch.randn(channels), EPS)
    grid = Grid(input_table(TOKENS + 1), torch.arange(1, TOKENS + 1))
    branch = Branch(torch.randn(rows, channels), gate)
    return torch.randn(rows, channels), norm, Modulation(scale, shift), grid, branch


def on_gpu(value: object) -> object:
    """The same arguments on a GPU."""
    if isinstance(value, Tensor):
        return value.cuda()
    if isinstance(value, tuple):
        moved = [on_gpu(part) for part in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


@pytest.mark.parametrize("by_token", [True, False])
def test_codes_are_those_of_the_parts_one_by_one(by_token: bool) -> None:
    x, norm, modulation, grid, branch = random_case(ROWS, 48, by_token)
    stream, codes, sums = norm_codes(x, norm, modulation, grid, branch)
    each = 1 if by_token else TOKENS
    gate, scale, shift = (
        part.repeat_interleave(each, dim=0)
        for part in (branch.gate, modulation.scale, modulation.shift)
    )
    expected_stream = x + gate * branch.value
    h = F.layer_norm(expected_stream, (48,), norm.weight, norm.bias, EPS) * (1 + scale) + shift
    x_scale, zero_point, _ = grid.x_params[:, grid.positions]
    expected = ops.static_codes(h.view(IMAGES, TOKENS, -1), x_scale, zero_point, 8).flatten(0, 1)
    torch.testing.assert_close(stream, expected_stream)
    assert (codes.int() - expected.int()).abs().max() <= 1
    assert (codes != expected).float().mean() < 0.005
    assert torch.equal(sums, codes.sum(dim=1, dtype=torch.int32))


def test_parts_of_a_product_are_what_the_product_would_be() -> None:
    x, norm, modulation, grid, branch = random_case(ROWS, 32, by_token=True)
    inputs = torch.randint(-128, 128, (ROWS, 64), dtype=torch.int8)
    weight = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    sums = inputs.sum(dim=1, dtype=torch.int32)
    terms = torch.randn(4, 32)
    epilogue = Epilogue(input_table(3), grid.positions, sums, 1e-3 * terms[0], *terms[1:])
    whole = reference_linear(inputs, weight, epilogue, torch.float32)
    halves = zip(inputs.split(32, dim=1), weight.split(32, dim=1), strict=True)
    parts = torch.stack([torch._int_mm(half, other.t().contiguous()) for half, other in halves])
    found = norm_codes(x, norm, modulation, grid, Branch(parts, branch.gate, epilogue))
    expected = norm_codes(x, norm, modulation, grid, Branch(whole, branch.gate))
    torch.testing.assert_close(found[0], expected[0])
    assert (found[1] != expected[1]).float().mean() < 0.005


def test_the_last_row_of_a_modulation_serves_all_that_follow() -> None:
    x, norm, modulation, grid, _ = random_case(ROWS, 32, by_token=True)
    count = ROWS // 2 + 1  # images of a class, and one row for those without
    few = Modulation(modulation.scale[:count], modulation.shift[:count])
    rows = torch.arange(ROWS).clamp(max=count - 1)
    whole = Modulation(modulation.scale[rows], modulation.shift[rows])
    found = norm_codes(x, norm, few, grid)
    assert found[0] is x
    assert torch.equal(found[1], norm_codes(x, norm, whole, grid)[1])


def test_the_operator_says_what_the_compiler_is_to_expect() -> None:
    x, norm, modulation, grid, branch = random_case(ROWS, 32, by_token=False)
    rest = (None,) * 6
    given = (x, *norm, *modulation, *grid, branch.value, branch.gate, *rest)
    torch.library.opcheck(norm_codes_operator, given)
    torch.library.opcheck(norm_codes_operator, (*given[:13], None, None, *rest))


@gpu
@pytest.mark.parametrize("channels", [768, 1024, 1280, 1920])
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_the_reference(channels: int, by_token: bool, dtype: torch.dtype) -> None:
    x, norm, modulation, grid, branch = on_gpu(random_case(200 * TOKENS, channels, by_token))
    x = x.to(dtype)
    branch = branch._replace(value=branch.value.to(dtype), gate=branch.gate.to(dtype))
    stream, codes, sums = norm_codes(x, norm, modulation, grid, branch)
    expected = reference_norm_codes(x, norm, modulation, grid, branch)
    torch.testing.assert_close(stream, expected[0])
    if dtype != torch.float32:  # its last bit depends on how a sum and a product are fused
        assert (stream != expected[0]).float().mean() < 1e-3
    # from the same stream
    expected_codes = reference_norm_codes(stream, norm, modulation, grid)[1]
    assert (codes.int() - expected_codes.int()).abs().max() <= 1
    assert (codes != expected_codes).float().mean() < 1e-4
    assert torch.equal(sums, codes.sum(dim=1, dtype=torch.int32))
