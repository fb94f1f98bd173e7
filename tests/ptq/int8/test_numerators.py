"""STAQ in integers: attention with numerators and tables, sink shifts, exports; equal to
simulation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.decoding.decoder import StaticCache
from models.layers import KVCache, attend, causal_mask
from ptq.int8.attentions import find_attentions, simulation_reason
from ptq.int8.codes import operand_codes
from ptq.int8.exports.encoding import check_integer_path, encode_model, restore_model
from ptq.int8.exports.export_files import read_export, save_export
from ptq.int8.modules import Int8Linear, all_codes, to_int8
from ptq.int8.numerators import Int8NumeratorScores, int8_numerators, reference_numerators
from ptq.methods.hadamard import HadamardRotation
from ptq.modules import QuantMatMul
from ptq.numbers.numerics import QParams
from ptq.numbers.quantizers import StaticQuantizer
from ptq.options import Options
from ptq.pipeline import quantize
from ptq.staq.numerators import NumeratorQuantizer
from ptq.staq.positions import TableQuantizer, compact
from ptq.types import Adapter, ConfigError, QuantSpec, Segments
from tests.families import FAMILIES, calibration, decoded, relative, tiny
from tests.ptq.staq.test_fitting import STAQ, with_sinks

gpu = pytest.mark.gpu
HEADS = 3
SINKS = 2


def table(positions: int, bits: int, seed: int, key_weights: Tensor | None = None) -> nn.Module:
    """A quantizer with parameters by head and position, for standard normal values."""
    generator = torch.Generator().manual_seed(seed)
    levels = 2**bits
    scale = (5 + torch.rand(HEADS, positions, generator=generator)) / levels
    zero_point = (levels / 2 + torch.randn(HEADS, positions, generator=generator)).round()
    params = compact(QParams(scale, zero_point))
    segments = Segments(tuple(range(positions)))
    return TableQuantizer(QuantSpec(bits), params, segments, key_weights, SINKS)


def products(
    bits: int, positions: int = 9, weighted: bool = True, rotation: nn.Module | None = None
) -> tuple[QuantMatMul, QuantMatMul]:
    """Both products of attention as STAQ has them."""
    key_weights = torch.tensor([0.2, 1.7, 0.6]) if weighted else None
    qk = QuantMatMul(rotation)
    pv = QuantMatMul()
    qk.a = table(positions, bits, 0)
    qk.b = table(positions, bits, 1)
    pv.a = NumeratorQuantizer(2**bits, key_weights, SINKS)
    pv.b = table(1, bits, 2, key_weights)
    return qk, pv


def integer(qk: QuantMatMul, pv: QuantMatMul) -> tuple[nn.Module, nn.Module]:
    model = nn.Module()
    model.attn = nn.Module()
    model.attn.qk = qk
    model.attn.pv = pv
    found = find_attentions(model)
    return found["attn.qk"], found["attn.pv"]


def operands(tokens: int, keys: int, channels: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return tuple(
        torch.randn(2, HEADS, n, channels, generator=generator) for n in (tokens, keys, keys)
    )


def close(found: Tensor, expected: Tensor, step: float) -> None:
    """Equal to rounding, but for few numerators at the edge of two codes."""
    error = (found - expected).abs()
    assert (error > 1e-5 * expected.abs().max()).float().mean() < 0.05
    assert error.max() < step


# --- attention


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_computes_what_simulation_does(bits: int, weighted: bool, masked: bool) -> None:
    q, k, v = operands(9, 9)
    qk, pv = products(bits, weighted=weighted)
    mask = causal_mask(9) if masked else None
    positions = torch.arange(9)
    expected = attend(q, k, v, qk, pv, 0.3, mask, positions)
    scores, values = integer(qk, pv)
    found = attend(q, k, v, scores, values, 0.3, mask, positions)
    close(found, expected, 8 / 2**bits)


@pytest.mark.parametrize("cache", [KVCache, StaticCache])
def test_steps_with_a_cache_are_the_full_sequence(cache: type) -> None:
    q, k, v = operands(9, 9)
    scores, values = integer(*products(8))
    whole = attend(q, k, v, scores, values, 0.3, causal_mask(9), torch.arange(9))
    stored = cache(9)
    steps = []
    for position in range(9):
        here = slice(position, position + 1)
        given = (q[:, :, here], k[:, :, here], v[:, :, here], scores, values, 0.3)
        steps.append(attend(*given, None, torch.arange(9)[here], stored))
    assert stored.k.dtype == torch.int8
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)


def test_static_quantizers_beside_numerators_and_rotation_are_integers() -> None:
    q, k, v = operands(7, 7)
    qk, pv = products(8, weighted=False, rotation=HadamardRotation(16))
    qk.a, qk.b, pv.b = (
        StaticQuantizer(QuantSpec(8), QParams(torch.tensor([0.03]), torch.tensor([zero])))
        for zero in (120.0, 130.0, 128.0)
    )
    expected = attend(q, k, v, qk, pv, 0.3, None, torch.arange(7))
    found = attend(q, k, v, *integer(qk, pv), 0.3, None, torch.arange(7))
    close(found, expected, 8 / 2**8)


def test_positions_beyond_the_table_share_its_last_entry() -> None:
    codes = operand_codes(table(4, 8, 0), "q")
    assert codes.by_position().shape == (2, HEADS, 4)
    q, k, v = operands(6, 6)
    qk, pv = products(8, positions=4)
    positions = torch.arange(6)
    expected = attend(q, k, v, qk, pv, 0.3, None, positions)
    close(attend(q, k, v, *integer(qk, pv), 0.3, None, positions), expected, 8 / 2**8)


def test_what_stays_simulated_is_said() -> None:
    qk, pv = products(8)
    assert simulation_reason(qk, pv) is None
    far = pv.b.zero_point.clone()
    pv.b.zero_point = far + 30000
    assert "32 bits" in simulation_reason(qk, pv)
    pv.b.zero_point = far
    pv.a = StaticQuantizer(QuantSpec(8), QParams(torch.tensor([1 / 255]), torch.tensor([0.0])))
    assert "parameters by head" in simulation_reason(qk, pv)


def test_in_half_precision_tables_stay_in_float32() -> None:
    scores, values = integer(*products(8))
    scores.bfloat16()
    assert scores.queries.table.dtype == torch.float32
    q, k, v = (x.bfloat16() for x in operands(9, 9))
    found = attend(q, k, v, scores, values, 0.3, None, torch.arange(9))
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_operator_compiles(backend: str) -> None:
    q, k, v = operands(9, 9)
    scores, values = integer(*products(8))
    positions = torch.arange(9)
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    found = compiled(q, k, v, scores, values, 0.3, None, positions)
    torch.testing.assert_close(found, attend(q, k, v, scores, values, 0.3, None, positions))


# --- whole models


def quantized(family: str, bits: int) -> tuple[Adapter, dict[str, Tensor]]:
    adapter = with_sinks(family, torch.float32)
    chosen = calibration(family, adapter)
    how = replace(
        STAQ,
        weights=replace(STAQ.weights, bits=bits),
        activations=replace(STAQ.activations, bits=bits),
        # how good the scales are changes nothing here
        options=Options(geometric=replace(STAQ.options.geometric, steps=5)),
    )
    quantize(adapter, chosen, how, batch=5)
    return adapter, chosen.rows


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_in_integers_is_the_simulated_one(family: str, bits: int) -> None:
    adapter, rows = quantized(family, bits)
    expected = adapter.forward(rows)
    stepwise = decoded(adapter, rows)
    to_int8(adapter.model, all_codes(adapter.model, bits))
    kinds = [type(module) for module in adapter.model.modules()]
    assert kinds.count(Int8NumeratorScores) == len(adapter.matmuls) // 2
    assert Int8Linear in kinds
    # flips at the edge of two codes, each a step of one operand
    assert relative(adapter.forward(rows), expected) < 8 / 2**bits
    assert float((adapter.forward(rows) - expected).abs().median()) < 1e-3
    if stepwise is not None:
        assert relative(decoded(adapter, rows), stepwise) < 8 / 2**bits


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_export_comes_back_bit_for_bit(family: str, bits: int, tmp_path: Path) -> None:
    adapter, rows = quantized(family, bits)
    export = encode_model(adapter.model, bits, "float32")
    save_export(export, tmp_path / "model.json", {})
    fresh = tiny(family, torch.float32)
    codes = restore_model(fresh.model, read_export(tmp_path / "model.json"))
    to_int8(fresh.model, codes)
    to_int8(adapter.model, all_codes(adapter.model, bits))
    assert torch.equal(fresh.forward(rows), adapter.forward(rows))
    kinds = {"scale": torch.bfloat16, "zero": torch.int16}
    for name, value in export.tensors.items():
        owner, _, part = name.rpartition(".")
        if part in kinds and not owner.endswith("transform"):
            assert value.dtype == kinds[part], name


def test_numerators_pass_the_check_of_formats_and_other_formats_do_not() -> None:
    adapter = tiny("rar", torch.float32)
    check_integer_path(adapter, STAQ)
    with pytest.raises(ConfigError, match="log_sqrt2 has no integer path"):
        check_integer_path(adapter, replace(STAQ, softmax="log_sqrt2", key_weights=False))


@gpu
@pytest.mark.parametrize("shape", [(2, 3, 70, 70, 64), (1, 2, 1, 257, 48), (2, 4, 257, 257, 64)])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_kernel_computes_what_the_reference_does(shape: tuple[int, ...], bits: int) -> None:
    batch, heads, tokens, keys, channels = shape
    torch.manual_seed(0)
    q, k, v = (
        torch.randint(-128, 128, (batch, heads, n, channels), dtype=torch.int8, device="cuda")
        for n in (tokens, keys, keys)
    )

    def params(count: int, scale: float) -> Tensor:
        scales = scale * (0.5 + torch.rand(heads, count))
        return torch.stack((scales, torch.randint(-9, 9, (heads, count)).float())).cuda()

    tables = params(tokens, 1e-2), params(keys, 1e-2), params(1, 1 / 255)[:, :, 0]
    weights = (0.3 + torch.rand(heads)).cuda()
    given = q, k, v, None, None, *tables, weights, 2, 0.2, bits, torch.float32
    error = (int8_numerators(*given) - reference_numerators(*given)).abs()
    assert (error > 1e-5).float().mean() < 0.01
    assert error.max() < 3 / 2**bits
