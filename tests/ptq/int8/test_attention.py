"""Attention in integers: exact products, equality with simulation in all families, what stays
simulated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import models
from models.decoding.decoder import StaticCache
from models.layers import KVCache, attend, causal_mask
from ptq import pipeline
from ptq.int8.attention import (
    Int8Scores,
    Int8Values,
    int8_attention,
    reference_attention,
)
from ptq.int8.attentions import find_attentions, simulation_reason
from ptq.int8.exports.encoding import encode_model, restore_model
from ptq.int8.modules import all_codes, to_int8
from ptq.methods.hadamard import HadamardRotation
from ptq.modules import QuantMatMul, swap_module
from ptq.numbers.numerics import QParams
from ptq.numbers.quantizers import DynamicQuantizer, Passthrough, StaticQuantizer
from ptq.recipe import Recipe
from ptq.types import Adapter, QuantSpec
from tests.families import FAMILIES, calibration, decoded, relative, tiny

gpu = pytest.mark.gpu
Products = tuple[nn.Module, nn.Module]
UNIT = torch.ones(3)  # scales


def static(scale: float, zero_point: float, bits: int = 8) -> StaticQuantizer:
    return StaticQuantizer(
        QuantSpec(bits), QParams(torch.tensor([scale]), torch.tensor([zero_point]))
    )


# scale and zero point of queries, keys, weights and values; attention weights are at most 1
CASES = {
    "as usual": ((0.02, 117.0), (0.03, 140.0), (1 / 255, 0.0), (0.01, 120.0)),
    "clipped": ((0.005, 100.0), (0.02, 130.0), (0.002, 0.0), (0.006, 90.0)),
    "weights without zero": ((0.02, 128.0), (0.02, 128.0), (0.003, -5.0), (0.02, 128.0)),
    "far from zero": ((0.001, -2500.0), (0.001, 2300.0), (0.004, -1.0), (0.002, -2000.0)),
}


def simulated(
    case: str, bits: int = 8, rotation: nn.Module | None = None
) -> tuple[QuantMatMul, QuantMatMul]:
    """Both products of attention with static quantizers."""
    qk = QuantMatMul(rotation)
    pv = QuantMatMul()
    qk.a, qk.b, pv.a, pv.b = (
        static(s * 2 ** (8 - bits), round(z / 2 ** (8 - bits)), bits) for s, z in CASES[case]
    )
    return qk, pv


def integer(qk: QuantMatMul, pv: QuantMatMul) -> Products:
    model = nn.Module()
    model.attn = nn.Module()
    model.attn.qk = qk
    model.attn.pv = pv
    found = find_attentions(model)
    return found["attn.qk"], found["attn.pv"]


def operands(
    batch: int, heads: int, tokens: int, keys: int, channels: int, case: str
) -> list[Tensor]:
    """q, k, v in the ranges of a case, a little beyond."""
    torch.manual_seed(tokens)
    found = []
    for (scale, zero_point), n in zip((CASES[case][i] for i in (0, 1, 3)), (tokens, keys, keys)):
        middle = scale * (127.5 - zero_point)
        found.append(middle + scale * 45 * torch.randn(batch, n, heads, channels).transpose(1, 2))
    return found


def codes(
    batch: int, heads: int, tokens: int, keys: int, channels: int, device: str = "cpu"
) -> list[Tensor]:
    """Codes of q, k and v, the extreme ones among them."""
    torch.manual_seed(tokens)
    found = [
        torch.randint(-128, 128, (batch, heads, n, channels), dtype=torch.int8)
        for n in (tokens, keys, keys)
    ]
    for x in found:
        x[:, :, 0] = -128
    return [x.to(device) for x in found]


def close(found: Tensor, expected: Tensor, step: float) -> None:
    """Equal to rounding, but for few attention weights at the edge of two codes, which may be
    `step` of the result."""
    error = (found - expected).abs()
    assert (error > 2e-6 * expected.abs().max()).float().mean() < 0.05
    assert error.max() < 2.5 * step


# --- the operator


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "shape", [(2, 3, 9, 9, 16), (1, 2, 1, 33, 12), (2, 1, 65, 65, 48), (1, 1, 5, 130, 7)]
)
@pytest.mark.parametrize("masked", ["no", "causal", "one row"])
def test_attention_computes_what_simulation_does(
    case: str, shape: tuple[int, ...], masked: str
) -> None:
    _, _, tokens, keys, _ = shape
    q, k, v = operands(*shape, case)
    mask = None
    if masked == "causal":
        mask = causal_mask(keys)[keys - tokens :]
    elif masked == "one row":
        mask = torch.randn(1, keys).masked_fill(torch.arange(keys) == keys // 2, float("-inf"))
    qk, pv = simulated(case)
    scale = 0.3 if case != "far from zero" else 2.0
    expected = attend(q, k, v, qk, pv, scale, mask)
    found = attend(q, k, v, *integer(qk, pv), scale, mask)
    assert found.dtype == torch.float32
    close(found, expected, CASES[case][2][0] * float(v.abs().max()))


def test_integers_are_exact() -> None:
    """Weights of one code make the result the sum of values, which unit scales leave as it is."""
    q, k, v = codes(2, 2, 3, 700, 16)
    for zv in (-128, 5, 3000):
        # all weights, below 1, are the lowest code
        zeros = torch.tensor([3, -7, -1000, zv], dtype=torch.int32)
        found = int8_attention(q, k, v, None, None, UNIT, zeros, 1e-3, 8, torch.float32)
        exact = (1000 - 128) * (v.long() - zv).sum(dim=2)
        assert torch.equal(found, exact.float()[:, None].expand_as(found))


def test_all_of_the_row_decides_on_a_weight() -> None:
    """Four keys of one quarter each, of which the last comes a thousand keys later: 64 steps of the
    grid, not 255."""
    q, k, v = (torch.zeros(1, 1, n, 32, dtype=torch.int8) for n in (1, 1026, 1026))
    q += 100
    k[:, :, [0, 400, 800, 1025]] = 100
    v[:, :, 0] = 1
    zeros = torch.tensor([0, 0, -128, 0], dtype=torch.int32)
    found = int8_attention(
        q, k, v, None, None, UNIT / torch.tensor([1, 255, 1]), zeros, 1.0, 8, torch.float32
    )
    assert torch.equal(found, torch.full((1, 1, 1, 32), 64.0))


def test_keys_that_are_not_there_add_nothing() -> None:
    q, k, v = codes(2, 2, 3, 20, 16)
    zeros = torch.tensor([3, -7, -140, 9], dtype=torch.int32)  # a weight of zero is no code
    scales = torch.tensor([1e-3, 0.004, 0.01])
    expected = int8_attention(
        q, k[:, :, :13], v[:, :, :13], None, None, scales, zeros, 0.2, 8, torch.float32
    )
    filled = torch.tensor([13])
    for mask in (None, torch.zeros(1, 20).index_fill_(1, torch.arange(13, 20), float("-inf"))):
        found = int8_attention(q, k, v, mask, filled, scales, zeros, 0.2, 8, torch.float32)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bits", [6, 4])
def test_fewer_bits_and_rotations_in_front_of_quantizers(bits: int) -> None:
    qk, pv = simulated("as usual", bits, HadamardRotation(16))
    q, k, v = operands(2, 2, 9, 9, 16, "as usual")
    q = q - q.mean()
    k = k - k.mean()
    close(
        attend(q, k, v, *integer(qk, pv), 0.25),
        attend(q, k, v, qk, pv, 0.25),
        2 ** (8 - bits) * CASES["as usual"][2][0] * float(v.abs().max()),
    )


def test_half_precision_goes_in_and_out_and_scales_are_kept() -> None:
    qk, pv = integer(*simulated("as usual"))
    q, k, v = (x.bfloat16() for x in operands(2, 2, 9, 9, 16, "as usual"))
    expected = attend(q.float(), k.float(), v.float(), qk, pv, 0.25)
    before = {n: x.clone() for n, x in qk.state_dict().items()}
    qk.bfloat16()
    pv.bfloat16()
    assert all(
        x.dtype == before[n].dtype and torch.equal(x, before[n]) for n, x in qk.state_dict().items()
    )
    found = attend(q, k, v, qk, pv, 0.25)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.01 * expected.norm()


def test_attention_compiles_into_one_graph() -> None:
    qk, pv = integer(*simulated("as usual"))
    q, k, v = operands(2, 2, 5, 5, 16, "as usual")
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    found = torch.compile(attend, backend=backend, fullgraph=True)(
        q, k, v, qk, pv, 0.25, causal_mask(5)
    )
    assert torch.equal(found, attend(q, k, v, qk, pv, 0.25, causal_mask(5)))
    assert len(graphs) == 1


# --- the cache


@pytest.mark.parametrize("kind", [KVCache, StaticCache])
@pytest.mark.parametrize("case", CASES)
def test_a_cache_holds_codes_of_one_byte_and_decoding_equals_simulation(
    kind: type[KVCache], case: str
) -> None:
    sim = simulated(case)
    q, k, v = operands(2, 2, 12, 12, 16, case)
    caches = [kind(16), kind(16)]
    scale = 0.3 if case != "far from zero" else 2.0
    for first, end in ((0, 3), (3, 4), (4, 9), (9, 12)):
        positions = torch.arange(first, end)
        expected, found = (
            attend(
                *(x[:, :, first:end] for x in (q, k, v)), *products, scale, None, positions, cache
            )
            for products, cache in zip((sim, integer(*sim)), caches)
        )
        close(found, expected, CASES[case][2][0] * float(v.abs().max()))
    assert caches[1].k.dtype == caches[1].v.dtype == torch.int8
    assert 4 * caches[1].k.nbytes == caches[0].k.nbytes


# --- models


def both(family: str, recipe: Recipe) -> tuple[Adapter, Adapter]:
    """A model simulated, and run in integers from its export."""
    adapter = tiny(family, torch.float32)
    other = tiny(family, torch.float32)
    pipeline.quantize(adapter, calibration(family, adapter, 2), recipe, batch=2)
    to_int8(other.model, restore_model(other.model, encode_model(adapter.model, 8, "float32")))
    return adapter, other


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_in_integers_computes_what_the_simulated_one_does(family: str) -> None:
    adapter, other = both(family, Recipe(QuantSpec(8, granularity="out_channel"), QuantSpec(8)))
    attention = [m for m in other.model.modules() if isinstance(m, Int8Scores | Int8Values)]
    assert len(attention) == len(adapter.matmuls) > 0
    assert not any(isinstance(m, QuantMatMul) for m in other.model.modules())
    rows = calibration(family, adapter, 2).rows
    expected = adapter.forward(rows)
    found = other.forward(rows)
    assert relative(found, expected) < 0.02
    assert (found - expected).norm() < 0.01 * expected.norm()
    stepwise = decoded(other, rows)
    assert stepwise is None or (stepwise - decoded(adapter, rows)).norm() < 0.01 * expected.norm()


@torch.no_grad()
def test_a_decoder_of_fixed_shapes_samples_the_same_in_integers() -> None:
    generator = models.load("rar_twin")
    for block in range(len(generator.transformer.blocks)):
        for name, product in zip(("qk", "pv"), simulated("as usual")):
            swap_module(generator.transformer, f"blocks.{block}.attn.{name}", product)
    to_int8(generator.transformer, {})
    labels = torch.arange(4)
    index = torch.arange(4)
    settings = dict(generator.preset.samplers["official"])
    expected = generator.sample(labels, 3, index, settings)
    generator.decoder = generator.captured(compiled=False, exact=True)
    assert torch.equal(generator.sample(labels, 3, index, settings), expected)
    # AdaLN's sums are rounded in another order, and a code that turns over changes what follows
    generator.decoder = generator.captured(compiled=False)
    found = [generator.sample(labels, 3, index, settings) for _ in range(2)]
    assert torch.equal(found[0], found[1])
    assert (found[0] == expected).float().mean() > 0.5
    assert generator.decoder.caches[0].k.dtype == torch.int8


@pytest.mark.parametrize(
    ("operand", "quantizer", "said"),
    [
        (
            "qk.a",
            DynamicQuantizer(QuantSpec(8, granularity="token_dynamic")),
            "the queries have dynamic ranges",
        ),
        ("pv.a", Passthrough(), "the weights are not quantized"),
        (
            "pv.a",
            StaticQuantizer(
                QuantSpec(8, format="log_sqrt2"), QParams(torch.ones(1), torch.zeros(1))
            ),
            "weights: format log_sqrt2 has no integer path",
        ),
        ("pv.b", static(0.1, 3.5), "values: zero points are not integers"),
        ("qk.b", static(1e-6, -1e6), "sums could leave 32 bits"),
        (
            "qk.b",
            StaticQuantizer(
                QuantSpec(8, granularity="in_channel"), QParams(torch.ones(4), torch.zeros(4))
            ),
            "keys: granularity in_channel has no integer path",
        ),
    ],
)
def test_what_stays_simulated_and_why(operand: str, quantizer: nn.Module, said: str) -> None:
    products = nn.Module()
    products.qk, products.pv = simulated("as usual")
    assert simulation_reason(products.qk, products.pv) is None
    swap_module(products, operand, quantizer)
    model = nn.Module()
    model.attn = products
    assert said in simulation_reason(products.qk, products.pv)
    assert find_attentions(model) == {}
    to_int8(model, all_codes(model, 8))
    assert isinstance(products.qk, QuantMatMul)
    assert isinstance(products.pv, QuantMatMul)


# --- the kernel


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 4, 257, 257, 64),
        (2, 3, 680, 680, 64),
        (2, 4, 65, 65, 48),
        (3, 4, 1, 130, 64),
        (1, 2, 17, 70, 100),
        (1, 2, 1, 1, 32),
        (1, 2, 64, 576, 80),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("zeros", [(3, -7, -128, 5), (-2500, 900, -133, 700)], ids=str)
def test_the_kernel_equals_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, masked: bool, zeros: tuple[int, ...]
) -> None:
    _, _, tokens, keys, channels = shape
    q, k, v = codes(*shape, device="cuda")
    mask = (
        torch.full((tokens, keys), float("-inf"), device="cuda").triu_(keys - tokens + 1).to(dtype)
    )
    scales = torch.tensor([1e-4, 1 / 255, 1 / 255], device="cuda")
    for filled in (None, torch.tensor([max(keys - 3, 1)], device="cuda")):
        given = (
            q,
            k,
            v,
            mask if masked else None,
            filled,
            scales,
            torch.tensor(zeros, device="cuda").int(),
            0.2,
            8,
        )
        expected = reference_attention(*given, torch.float32)
        found = int8_attention(*given, dtype)
        assert found.dtype == dtype
        error = (found.float() - expected).abs()
        worst = {torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype] * float(expected.abs().max())
        # of scores of thousands
        assert (error > worst).float().mean() < (0.005 if abs(zeros[0]) < 128 else 0.1)
        # weights at the edge of two codes
        assert error.max() < worst + 3 * (128 + abs(zeros[3])) / 255


@gpu
def test_the_kernel_s_integers_are_exact() -> None:
    q, k, v = codes(2, 3, 100, 1000, 64, device="cuda")
    for zv in (-128, 5, 2000):
        zeros = torch.tensor([3, -7, -1000, zv], dtype=torch.int32, device="cuda")
        found = int8_attention(q, k, v, None, None, UNIT.cuda(), zeros, 1e-3, 8, torch.float32)
        exact = (1000 - 128) * (v.long() - zv).sum(dim=2)
        assert torch.equal(found, exact.float()[:, None].expand_as(found))
