"""Linear layers in integers: the product, the corrections for zero points, and equality with
simulation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.int8 import ops
from ptq.int8.codes import FEW_ROWS, WeightCodes, linear_codes, weight_codes
from ptq.int8.epilogue import Epilogue, exact_product, reference_linear
from ptq.int8.modules import Int8Linear, all_codes, to_int8
from ptq.modules import OnlineTransform, QuantLinear
from ptq.numbers.numerics import QParams
from ptq.numbers.quantizers import DynamicQuantizer, StaticQuantizer, fake_quantize_weight
from ptq.stwq import TokenStaticQuantizer
from ptq.types import ConfigError, InputTransform, QuantSpec, Segments

SEGMENTS = Segments((0, 1, 2))
gpu = pytest.mark.gpu


def quantized(
    inputs: int,
    outputs: int,
    spec: QuantSpec,
    params: QParams | None,
    bits: int = 8,
    symmetric: bool = False,
    bias: bool = True,
    offset: float = 0.0,
) -> QuantLinear:
    """A simulated layer with random weights around `offset`; `params` of its input, None for
    dynamic ones."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    linear.weight.data += offset
    layer = QuantLinear(linear)
    weight_spec = QuantSpec(bits, symmetric, "out_channel")
    layer.weight, layer.weight_params = fake_quantize_weight(layer.weight, weight_spec)
    if params is None:
        layer.input = DynamicQuantizer(spec)
    elif spec.granularity == "token_static":
        layer.input = TokenStaticQuantizer(spec, params, SEGMENTS)
    else:
        layer.input = StaticQuantizer(spec, params)
    return layer.requires_grad_(False)


def grid(scales: list[float], zeros: list[float]) -> QParams:
    return QParams(torch.tensor(scales), torch.tensor(zeros))


CASES = {
    "per tensor": (QuantSpec(8), grid([0.02], [117.0])),
    "six bits": (QuantSpec(6), grid([0.11], [31.0])),
    "symmetric": (QuantSpec(8, symmetric=True), grid([0.025], [128.0])),
    "zero not in range": (QuantSpec(8), grid([0.001], [-2500.0])),
    "segments": (
        QuantSpec(8, granularity="token_static"),
        grid([0.2, 0.05, 0.02], [10.0, 300.0, 128.0]),
    ),
    "dynamic": (QuantSpec(8, granularity="token_dynamic", range="minmax"), None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 40), (17, 5), (3, 2), (200, 7)])
@pytest.mark.parametrize("weights", ["asymmetric", "symmetric", "four bits", "far from zero"])
def test_a_layer_computes_what_simulation_does(
    case: str, inputs: int, outputs: int, weights: str
) -> None:
    spec, params = CASES[case]
    layer = quantized(
        inputs,
        outputs,
        spec,
        params,
        bits=4 if weights == "four bits" else 8,
        symmetric=weights == "symmetric",
        bias=outputs != 5,
        offset=3.0 if weights == "far from zero" else 0.0,
    )
    x = 2 * torch.randn(3, 9, inputs)
    positions = torch.arange(9)
    integer = Int8Linear(linear_codes(layer, 4 if weights == "four bits" else 8))
    bias = None if layer.bias is None else layer.bias.double()
    # summed without rounding
    expected = F.linear(layer.input(x, positions).double(), layer.weight.double(), bias)
    found = integer(x, positions)
    # zero points of four bits come off
    assert (integer.w_offset is None) == (weights in ("symmetric", "four bits"))
    assert (found - expected).abs().max() <= 2e-6 * (
        expected.abs().max() + x.abs().max() * layer.weight.abs().max()
    )


@pytest.mark.parametrize("case", ["segments", "dynamic"])
def test_many_rows_are_summed_elsewhere_and_come_out_the_same(case: str) -> None:
    integer = Int8Linear(linear_codes(quantized(48, 40, *CASES[case], bits=8, symmetric=False), 8))
    assert integer.w_offset is not None
    x = torch.randn(FEW_ROWS // 6 + 1, 9, 48)
    positions = torch.arange(9)
    parts = torch.cat([integer(part, positions) for part in x.split(50)])  # whose rows are few
    torch.testing.assert_close(integer(x, positions), parts)


def test_the_operators_say_what_the_compiler_is_to_expect() -> None:
    codes, weight, epilogue = random_operands(6, 16, 4)
    cases = (
        epilogue,
        epilogue._replace(code_sums=None, bias=None),
        epilogue._replace(code_sums=None, w_offset=None),
    )
    for case in cases:
        torch.library.opcheck(ops.int8_linear, (codes, weight, *case, torch.bfloat16))
    torch.library.opcheck(ops.token_params, (torch.randn(3, 5), torch.arange(7)))


def test_a_decoding_step_uses_the_parameters_of_its_position() -> None:
    layer = quantized(32, 8, *CASES["segments"])
    integer = Int8Linear(linear_codes(layer, 8))
    x = torch.randn(2, 6, 32)
    whole = integer(x, torch.arange(6))
    for step in range(6):
        torch.testing.assert_close(
            integer(x[:, step : step + 1], torch.tensor([step]))[:, 0], whole[:, step]
        )


def test_transform_and_low_rank_branch_read_what_they_do_in_simulation() -> None:
    layer = quantized(32, 8, *CASES["per tensor"])
    layer.transform = OnlineTransform(InputTransform(torch.rand(32) + 0.5, torch.randn(32)))
    layer.down = torch.randn(3, 32)
    layer.up = torch.randn(8, 3)
    x = torch.randn(4, 32)
    torch.testing.assert_close(
        Int8Linear(linear_codes(layer, 8))(x), layer(x), rtol=1e-5, atol=1e-5
    )


def test_half_precision_goes_in_and_out_and_scales_stay_exact() -> None:
    layer = quantized(64, 16, *CASES["per tensor"])
    x = torch.randn(5, 64)
    found = Int8Linear(linear_codes(layer, 8))(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(x.bfloat16().float()), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("case", ["per tensor", "segments", "dynamic"])
def test_codes_of_half_precision_are_those_of_the_same_values_in_float32(case: str) -> None:
    layer = quantized(64, 16, *CASES[case])
    integer = Int8Linear(linear_codes(layer, 8))
    x = torch.randn(2, 5, 64).bfloat16()
    positions = torch.arange(5)
    exact = integer.encode(x.float(), positions)
    found = integer.encode(x, positions)
    for part, exact_part in zip(found[:2], exact[:2]):  # codes and parameters
        assert torch.equal(part, exact_part)
        assert part.dtype == exact_part.dtype
    assert [part.dtype for part in exact[:2]] == [torch.int8, torch.float32]
    assert found[2] is exact[2]
    assert (found[2] is positions) == (case == "segments")


def test_turning_a_model_to_half_precision_leaves_integer_layers_alone() -> None:
    layer = quantized(32, 8, *CASES["segments"])
    layer.transform = OnlineTransform(InputTransform(torch.rand(32) + 0.5, torch.randn(32)))
    layer.down = torch.randn(3, 32)
    layer.up = torch.randn(8, 3)
    model = nn.Sequential(nn.Linear(4, 32), Int8Linear(linear_codes(layer, 8)))
    x = torch.randn(2, 6, 32)
    positions = torch.arange(6)
    before = {k: v.clone() for k, v in model[1].state_dict().items()}
    model.bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert all(
        v.dtype == before[k].dtype and torch.equal(v, before[k])
        for k, v in model[1].state_dict().items()
    )
    found = model[1](x.bfloat16(), positions)
    assert found.dtype == torch.bfloat16  # though what the transform gives is in float32
    expected = layer(x.bfloat16().float(), positions)
    # the low-rank branch is in half precision
    assert (found.float() - expected).norm() < 0.01 * expected.norm()
    assert {v.device.type for v in model[1].to("meta").state_dict().values()} == {"meta"}


def random_operands(
    rows: int, inputs: int, outputs: int, device: str = "cpu"
) -> tuple[Tensor, Tensor, Epilogue]:
    """Codes, weight and all terms, with the most extreme codes among them; outputs fit float16."""
    torch.manual_seed(rows)
    codes, weight = (
        torch.randint(-128, 128, (n, inputs), dtype=torch.int8) for n in (rows, outputs)
    )
    codes[0] = -128
    weight[0] = -128
    x_params = torch.rand(3, rows) * 0.1
    w_scale, zero_correction, w_offset, bias = torch.randn(4, outputs)
    epilogue = Epilogue(
        x_params,
        None,
        codes.sum(dim=1, dtype=torch.int32),
        1e-3 * w_scale,
        zero_correction,
        1e-2 * w_offset,
        bias,
    )
    on_device = Epilogue(*(term if term is None else term.to(device) for term in epilogue))
    return codes.to(device), weight.to(device), on_device


def test_zero_points_come_off_the_rows_where_differences_are_int8() -> None:
    codes = torch.tensor([[-8, 7], [-128, 127], [-128, 127], [-100, -90]], dtype=torch.int8)
    weight = WeightCodes(codes, torch.rand(4), torch.tensor([-8, 0, 1, -200], dtype=torch.int32), 8)
    found = weight.centred()
    assert found.zero_point.tolist() == [0, 0, 1, 0]
    assert found.codes.tolist() == [[0, 15], [-128, 127], [-128, 127], [100, 110]]
    assert [found.codes.dtype, found.zero_point.dtype] == [torch.int8, torch.int32]
    assert torch.equal(found.dequantize(), weight.dequantize())


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_codes_are_rounded_half_to_even_and_end_where_the_bits_do(bits: int) -> None:
    half = 2 ** (bits - 1)
    zero = torch.tensor([0.0, 3.0, -half, half - 1.0])
    ties = torch.arange(-300, 300) / 2
    x = (
        torch.cat((ties, torch.tensor([1e9, -1e9, 3e38])))[:, None]
        .expand(-1, 4)[None]
        .mT.reshape(1, 4, -1)
    )
    for scale in (torch.ones(4), torch.tensor([0.1, 0.3, 7.0, 1e-3])):
        expected = (
            (torch.round(x / scale[:, None]) + zero[:, None]).clamp(-half, half - 1).to(torch.int8)
        )
        assert torch.equal(ops.static_codes(x, scale, zero, bits), expected)
    halved = x.bfloat16()
    expected = (torch.round(halved.float()) + zero[:, None]).clamp(-half, half - 1).to(torch.int8)
    assert torch.equal(ops.static_codes(halved, torch.ones(4), zero, bits), expected)


@pytest.mark.parametrize("shape", [(1, 16, 1), (7, 33, 5), (64, 4096, 8), (3, 100, 257)])
def test_the_integer_product_of_a_cpu_is_exact(shape: tuple[int, int, int]) -> None:
    codes, weight, _ = random_operands(*shape)
    product = torch._int_mm(codes, weight.t())
    assert torch.equal(product.long(), exact_product(codes, weight))


def test_one_token_may_stand_for_all_and_parameters_repeat_over_sequences() -> None:
    codes, weight, epilogue = random_operands(6, 16, 4)
    x_params = epilogue.x_params[:, :3]
    of_three = epilogue._replace(x_params=x_params)
    of_six = epilogue._replace(x_params=x_params.repeat(1, 2))
    found = ops.int8_linear(codes, weight, *of_three, torch.float32)
    torch.testing.assert_close(found, ops.int8_linear(codes, weight, *of_six, torch.float32))
    sums_made_there = of_three._replace(code_sums=None)
    assert torch.equal(found, ops.int8_linear(codes, weight, *sums_made_there, torch.float32))


def test_a_row_has_the_parameters_of_its_token_s_position() -> None:
    codes, weight, epilogue = random_operands(6, 16, 4)
    table = epilogue.x_params[:, :4]
    # the last column is for all positions behind it
    at_places = epilogue._replace(x_params=table, positions=torch.tensor([2, 3, 9]))
    looked_up = epilogue._replace(x_params=table[:, [2, 3, 3, 2, 3, 3]])
    found = ops.int8_linear(codes, weight, *at_places, torch.float32)
    assert torch.equal(found, ops.int8_linear(codes, weight, *looked_up, torch.float32))


def test_names_and_reasons_of_layers_without_integers() -> None:
    spec = QuantSpec(8, format="fp8_e4m3")
    layer = quantized(16, 4, QuantSpec(8), grid([0.02], [3.5]))
    with pytest.raises(ConfigError, match=r"blocks\.0\.fc1.*not integers"):
        linear_codes(layer, 8, "blocks.0.fc1")
    layer.input = StaticQuantizer(spec, grid([0.02], [0.0]))
    with pytest.raises(ConfigError, match="format fp8_e4m3 has no integer path"):
        linear_codes(layer, 8)
    with pytest.raises(ConfigError, match="does not lie on an integer grid of 4 bits"):
        weight_codes(layer, 4)
    layer.weight_params = None
    with pytest.raises(ConfigError, match="the weight is not quantized"):
        weight_codes(layer, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["segments", "dynamic"])
def test_a_model_of_integer_layers_compiles_into_one_graph(case: str, dtype: torch.dtype) -> None:
    layer = quantized(32, 8, *CASES[case])
    model = nn.Sequential(layer)
    to_int8(model, all_codes(model, 8))
    assert isinstance(model[0], Int8Linear)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(2, 6, 32).to(dtype)
    positions = torch.arange(6)
    compiled = torch.compile(model[0], backend=backend, fullgraph=True)
    found = compiled(x, positions)
    assert found.dtype == dtype
    assert torch.equal(found, model[0](x, positions))
    assert len(graphs) == 1


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 8),
        (100, 64, 96),
        (257, 1008, 1000),
        (300, 64, 1001),
        (4096, 512, 768),
        (200, 4096, 1024),
    ],
)
@pytest.mark.parametrize("columns", ["each row", "one", "positions"])
@pytest.mark.parametrize(
    "missing",
    [(), ("code_sums",), ("w_offset",), ("bias",), ("w_offset", "bias")],
    ids="+".join,
)
def test_the_kernel_equals_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, missing: tuple[str, ...], columns: str
) -> None:
    codes, weight, epilogue = random_operands(*shape, device="cuda")
    if columns == "one":
        epilogue = epilogue._replace(x_params=epilogue.x_params[:, :1].contiguous())
    if columns == "positions":
        positions = torch.arange(shape[0], device="cuda").flip(0)
        epilogue = epilogue._replace(positions=positions)
    epilogue = epilogue._replace(**dict.fromkeys(missing))
    expected = reference_linear(codes, weight, epilogue, torch.float32)
    found = ops.int8_linear(codes, weight, *epilogue, dtype)
    assert found.dtype == dtype
    error = (found.float() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


@gpu
@pytest.mark.parametrize("shape", [(200, 768), (1025, 16), (1031, 1040), (2000, 4096)])
def test_sums_of_rows_on_a_gpu(shape: tuple[int, int]) -> None:
    from ptq.int8 import row_kernels  # needs Triton

    codes = torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")
    assert torch.equal(row_kernels.row_sums(codes), codes.sum(dim=1, dtype=torch.int32))


@gpu
@pytest.mark.parametrize("tokens", [1, 256, 700])
def test_parameters_of_tokens_on_a_gpu(tokens: int) -> None:
    table = torch.randn(3, 300, device="cuda")
    positions = torch.arange(200, 200 + tokens, device="cuda")
    assert torch.equal(ops.token_params(table, positions), table[:, positions.clamp(max=299)])


@gpu
def test_the_kernel_s_integers_are_exact() -> None:
    codes, weight, _ = random_operands(300, 4096, 264, device="cuda")
    params = torch.tensor([[1.0], [0.0], [0.0]], device="cuda")
    unit = torch.ones(264, device="cuda")
    none = torch.zeros(264, device="cuda")
    plain = Epilogue(params, None, None, unit, none, w_offset=None, bias=None)
    found = ops.int8_linear(codes, weight, *plain, torch.float32)
    product = exact_product(codes, weight)
    # float32 does not hold them all: compare as it rounds them
    assert (product.abs() > 2**24).any()
    assert torch.equal(found, product.float())
