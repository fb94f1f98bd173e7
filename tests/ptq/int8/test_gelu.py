"""GELU behind an integer product: its bound, and the codes that leave."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ptq.int8.blocks.gelu import approximate_gelu
from ptq.int8.blocks.operators import int8_linear_gelu, reference_linear_gelu
from ptq.int8.epilogue import Epilogue, reference_linear

gpu = pytest.mark.gpu
STEPS = 40.0  # per unit
EXACT = {"erf": "none", "tanh": "tanh"}  # PyTorch's names


def random_product(rows: int, inputs: int, outputs: int) -> tuple:
    """Codes, weight and terms whose results are about normal."""
    torch.manual_seed(rows)
    codes = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8)
    weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    x_params = torch.stack((torch.ones(2), torch.zeros(2), torch.zeros(2)))
    w_scale = torch.full((outputs,), 1.0 / (74**2 * inputs**0.5))
    zeros = torch.zeros(outputs)
    sums = codes.sum(dim=1, dtype=torch.int32)
    bias = 0.1 * torch.randn(outputs)
    positions = torch.arange(rows)
    return codes, weight, Epilogue(x_params, positions, sums, w_scale, zeros, zeros, bias)


def output_table(columns: int) -> torch.Tensor:
    zero_point = torch.randint(-30, 30, (columns,)).float()
    scale = torch.full((columns,), 1 / STEPS)
    return torch.stack((scale, zero_point, scale * zero_point))


def exact_codes(codes, weight, epilogue: Epilogue, table: torch.Tensor, form: str) -> torch.Tensor:
    """Codes of GELU as the library computes it, in float64."""
    y = reference_linear(codes, weight, epilogue, torch.float64)
    scale, zero_point, _ = table[:, epilogue.positions.clamp(max=table.shape[1] - 1)].double()
    steps = torch.round(F.gelu(y, approximate=EXACT[form]) / scale[:, None])
    return (steps + zero_point[:, None]).clamp(-128, 127)


@pytest.mark.parametrize("form", EXACT)
def test_the_polynomial_stays_within_its_bound(form: str) -> None:
    x = torch.linspace(-12, 12, 200_001)
    exact = F.gelu(x.double(), approximate=EXACT[form])
    error = (approximate_gelu(x, form) - exact).abs().max()
    assert error < {"erf": 3e-5, "tanh": 1e-6}[form]


@pytest.mark.parametrize("form", EXACT)
def test_codes_differ_from_those_of_exact_gelu_by_one_and_rarely(form: str) -> None:
    codes, weight, epilogue = random_product(96, 64, 512)
    table = output_table(50)
    found, sums = int8_linear_gelu(codes, weight, *epilogue, table, form, 8)
    difference = (found - exact_codes(codes, weight, epilogue, table, form)).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() <= 1e-3
    assert torch.equal(sums, found.sum(dim=1, dtype=torch.int32))


def test_the_operator_says_what_the_compiler_is_to_expect() -> None:
    codes, weight, epilogue = random_product(6, 16, 32)
    given = (codes, weight, *epilogue, output_table(3), "erf", 8)
    torch.library.opcheck(int8_linear_gelu, given)


@gpu
@pytest.mark.parametrize("shape", [(200, 1024, 4096), (1000, 768, 3072), (2561, 1280, 5120)])
@pytest.mark.parametrize("form", EXACT)
def test_the_kernel_s_codes_differ_by_one_and_rarely(
    shape: tuple[int, int, int], form: str
) -> None:
    codes, weight, epilogue = random_product(*shape)
    codes, weight = codes.cuda(), weight.cuda()
    epilogue = Epilogue(*(term.cuda() for term in epilogue))
    table = output_table(300).cuda()
    found, sums = int8_linear_gelu(codes, weight, *epilogue, table, form, 8)
    reference = reference_linear_gelu(codes, weight, epilogue, table, form, 8)[0]
    exact = exact_codes(codes, weight, epilogue, table, form)
    for expected in (reference, exact):
        difference = (found.double() - expected.double()).abs()
        assert difference.max() <= 1
        assert (difference > 0).double().mean() <= 1e-3
    assert torch.equal(sums, found.sum(dim=1, dtype=torch.int32))
