"""Exports: what comes back is what simulation has, bit for bit; what cannot be exported or read is
refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.config.compose import CONF, configure
from experiments.config.recipe import build_recipe
from experiments.config.schema import Model, RunConfig
from ptq import files, pipeline
from ptq.int8.codes import DynamicCodes, InputCodes, LinearCodes, linear_codes
from ptq.int8.exports import export_files
from ptq.int8.exports.encoding import (
    check_export,
    check_integer_path,
    encode_model,
    restore_model,
    unquantized_tensors,
)
from ptq.int8.exports.export_files import Export, ExportError, read_export, save_export
from ptq.int8.exports.packing import pack_codes, packed_size, unpack_codes
from ptq.int8.exports.structure import describe_rotation, make_quantizer, segment_starts
from ptq.int8.modules import to_int8
from ptq.modules import QuantLinear, QuantMatMul, swap_module
from ptq.numbers.numerics import QParams
from ptq.recipe import Recipe
from ptq.sites import Scope
from ptq.stwq import TokenStaticQuantizer
from ptq.types import Adapter, CalibrationSet, ConfigError, QuantSpec, Segments
from tests.families import FAMILIES, calibration, relative, tiny

# one of each thing exported
STRUCTURES = ("ptq4arvg", "ptq4arvg_released", "quarot_stwq", "rtn_dynamic", "staq", "svdquant")
# FPQVAR's rotations and format of fc2 have no place in an export, and Shift-and-Sum is VAR's alone
NOT_EXPORTED = ("fp", "fpqvar", "shift_and_sum")
RECIPES = sorted(p.stem for p in (CONF / "method").glob("*.yaml") if p.stem not in NOT_EXPORTED)
# to name the family
PRESETS = {"var": "var_d16", "rar": "rar_b", "par": "par_xl_4x", "mar": "mar_b"}
SHORT = (
    "method.options.omniquant.epochs=1",
    "method.options.os_plus.steps=5",
    "method.options.os_plus.rows=2",
    "method.options.svd.iterations=2",
    "method.options.svd.grid=false",
    "method.options.geometric.steps=5",
)
FORMAT = "blocks.0.attn.pv.a: format log_sqrt2 has no integer path, allowed is int"


@cache
def composed(name: str, *more: str) -> RunConfig:
    """A recipe's config. RepQ's attention weights have no integer path: its linears alone."""
    scope = {"ptq4arvg_released": "released"}.get(name, "blocks" if "repq" in name else "paper")
    return configure([f"method={name}", "quant=w6a6", f"scope={scope}", *SHORT, *more])


def configured(name: str, family: str, *more: str) -> RunConfig:
    return replace(composed(name, *more), model=Model(PRESETS[family]))


def quantized(family: str, config: RunConfig) -> tuple[Adapter, CalibrationSet, Recipe]:
    adapter = tiny(family, torch.float32)
    chosen = calibration(family, adapter, 2)
    how = build_recipe(config)
    adapter.layout = config.calib.layout
    pipeline.quantize(adapter, chosen, how, batch=2)
    adapter.layout = "inference"
    return adapter, chosen, how


def fresh(family: str) -> Adapter:
    """A model of other weights than the quantized one's, in which nothing may be left."""
    adapter = tiny(family, torch.float32)
    for value in adapter.model.parameters():
        value.data.fill_(torch.nan)
    return adapter


def simulated(linear: nn.Linear, codes: LinearCodes) -> QuantLinear:
    """The layer as simulation has it, of its codes."""
    made = QuantLinear(linear)
    made.weight = codes.weight.dequantize()
    made.bias = codes.bias
    made.transform = codes.transform
    made.sink_shift = codes.sink_shift
    made.down = codes.down
    made.up = codes.up
    made.input = make_quantizer(codes.input)
    if isinstance(codes.input, InputCodes) and len(codes.input.group) > 1:
        zero_point = (codes.input.zero_point + 2 ** (codes.input.bits - 1)).float()
        made.input = TokenStaticQuantizer(
            QuantSpec(codes.input.bits, granularity="token_static"),
            QParams(codes.input.scale, zero_point),
            Segments(tuple(segment_starts(codes.input.group))),
        )
    return made


def same(one: InputCodes | DynamicCodes, other: InputCodes | DynamicCodes) -> bool:
    """Whether two are equal bit for bit."""
    pairs = [(value, vars(other)[key]) for key, value in vars(one).items()]
    return type(one) is type(other) and all(
        a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in pairs
    )


# --- packing


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (16, 9)])
def test_packed_codes_come_back(bits: int, shape: tuple[int, ...]) -> None:
    half = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-half, half, shape, generator=generator).to(torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_size(codes.numel(), bits) == -(-codes.numel() // 8) * bits
    assert torch.equal(unpack_codes(packed, shape, bits), codes)


def test_four_codes_of_six_bits_are_three_bytes_two_of_four_are_one() -> None:
    six = torch.tensor([1, 2, 3, 4, 0, 0, 0, 63], dtype=torch.int8) - 32
    assert pack_codes(six, 6)[:3].tolist() == [
        1 | (2 & 3) << 6,
        2 >> 2 | (3 & 15) << 4,
        3 >> 4 | 4 << 2,
    ]
    assert pack_codes(six, 6)[5].item() == 63 << 2
    assert (
        pack_codes(torch.tensor([1, 15, 0, 0, 0, 0, 0, 0], dtype=torch.int8) - 8, 4)[0].item()
        == 1 | 15 << 4
    )


# --- what comes back


@pytest.mark.parametrize(
    ("name", "family"),
    [
        (name, family)
        for name in RECIPES
        for family in FAMILIES
        if family == "rar" or name in STRUCTURES
    ],
)
@torch.no_grad()
def test_an_export_loads_as_the_simulated_model_bit_for_bit(
    name: str, family: str, tmp_path: Path
) -> None:
    """Its codes and, with `rest=float32`, everything: outputs of a model simulated from what was
    loaded are the same.

    Every recipe on RAR; on the other families one for each kind of thing that an export can hold:
    folded scales and shifts with segments, the released code's parameters, rotations on and off
    line, dynamic ranges, low-rank branches, vectors of sinks and tables by head.
    """
    adapter, chosen, how = quantized(family, configured(name, family))
    path = tmp_path / "model.json"
    if name == "ptq4arvg_released" and family in ("var", "par"):  # it averages over minibatches
        with pytest.raises(
            ConfigError, match=r"(blocks|layers)\.0.*zero points are not integers"
        ) as caught:
            save_export(encode_model(adapter.model, how.weights.bits), path, {})
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())
        return
    save_export(encode_model(adapter.model, how.weights.bits, "float32"), path, {})
    other = fresh(family)
    codes = restore_model(other.model, read_export(path))
    layers = {n: m for n, m in adapter.model.named_modules() if isinstance(m, QuantLinear)}
    for key, layer in layers.items():  # what has no kernel is in its place already
        assert key in codes or torch.equal(other.model.get_submodule(key).weight, layer.weight)
    assert len(codes) == len(layers) or name == "litevar"
    for key, each in codes.items():
        expected = linear_codes(layers[key], how.weights.bits)
        assert torch.equal(each.weight.codes, expected.weight.codes)
        assert torch.equal(each.weight.dequantize(), layers[key].weight)
        assert same(each.input, expected.input)
        swap_module(other.model, key, simulated(other.model.get_submodule(key), each))
    assert torch.equal(other.forward(chosen.rows), adapter.forward(chosen.rows))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_rest_in_fp16_is_the_simulated_models_rounded(family: str) -> None:
    adapter, _, how = quantized(family, configured("ptq4arvg", family))
    export = encode_model(adapter.model, how.weights.bits)
    other = fresh(family)
    codes = restore_model(other.model, export)
    taken = [
        n for n, m in adapter.model.named_modules() if isinstance(m, QuantLinear | QuantMatMul)
    ]
    before = unquantized_tensors(adapter.model, taken)
    after = unquantized_tensors(other.model, taken)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(
            after[name], value.half().float() if value.is_floating_point() else value
        )
    assert any("kappa" in n or "norm" in n for n in before)
    assert all(
        torch.equal(c.bias, adapter.model.get_submodule(n).bias)
        for n, c in codes.items()
        if c.bias is not None
    )


@pytest.mark.parametrize("include_zero", [False, True])
@torch.no_grad()
def test_dynamic_ranges_keep_what_they_include(include_zero: bool) -> None:
    more = ("method.dynamic=true", f"quant.activations.include_zero={include_zero}".lower())
    adapter, _, _ = quantized("rar", configured("rtn_dynamic", "rar", *more))
    other = fresh("rar")
    codes = restore_model(other.model, encode_model(adapter.model, 6, "float32"))
    assert {c.input.include_zero for c in codes.values()} == {include_zero}
    assert {m.a.spec.include_zero for m in other.model.modules() if isinstance(m, QuantMatMul)} == {
        True,
        include_zero,
    }
    to_int8(other.model, codes)
    # whose ranges hold zero only if they are made to
    x = torch.linspace(1, 2, 288).sin().view(2, 3, 48)
    name = "blocks.0.attn.qkv"
    simulated, integer = (a.model.get_submodule(name)(x, torch.arange(3)) for a in (adapter, other))
    assert relative(integer, simulated) < 1e-5


@torch.no_grad()
def test_one_scale_for_a_whole_weight_is_written_for_every_row() -> None:
    adapter, chosen, _ = quantized(
        "rar", configured("rtn", "rar", "quant.weights.granularity=tensor")
    )
    other = fresh("rar")
    codes = restore_model(other.model, encode_model(adapter.model, 6, "float32"))
    assert all(
        len(c.weight.scale) == len(c.weight.zero_point) == len(c.weight.codes)
        for c in codes.values()
    )
    to_int8(other.model, codes)
    assert relative(other.forward(chosen.rows), adapter.forward(chosen.rows)) < 0.05


def test_below_eight_bits_a_file_holds_packed_codes() -> None:
    sizes = {}
    for bits in (8, 6, 4):
        adapter, _ = small(BLOCKS, weights=QuantSpec(bits, granularity="out_channel"))
        sizes[bits] = encode_model(adapter.model, bits).sizes()["codes"]
    assert (8 * sizes[6], 8 * sizes[4]) == (6 * sizes[8], 4 * sizes[8])


# --- what has no integer path


def small(scope: Scope, **specs: QuantSpec) -> tuple[Adapter, Recipe]:
    how = Recipe(
        specs.get("weights", QuantSpec(8, granularity="out_channel")),
        specs.get("activations", QuantSpec(8)),
        scope=scope,
        softmax="log_sqrt2" if "softmax" in specs else "int",
    )
    adapter = tiny("rar", torch.float32)
    pipeline.quantize(adapter, calibration("rar", adapter, 2), how, batch=4)
    return adapter, how


FP8 = QuantSpec(8, format="fp8_e4m3")
BLOCKS = Scope(("qkv", "fc1"), False)


def test_attention_weights_of_another_format_are_refused_at_both_ends() -> None:
    adapter, how = small(Scope(("fc1",), True), softmax=FP8)
    for refuse in (
        lambda: check_integer_path(adapter, how),
        lambda: check_export(adapter, how),
        lambda: encode_model(adapter.model, 8),
    ):
        with pytest.raises(ConfigError) as caught:
            refuse()
        assert str(caught.value) == FORMAT


@pytest.mark.parametrize(
    "specs", [{"activations": FP8}, {"weights": replace(FP8, granularity="out_channel")}]
)
def test_other_number_formats_do_not_run_in_integers(specs: dict[str, QuantSpec]) -> None:
    adapter, how = small(BLOCKS, **specs)
    with pytest.raises(
        ConfigError,
        match="^blocks.0.attn.qkv: format fp8_e4m3 has no integer path, allowed is int$",
    ):
        check_integer_path(adapter, how)
    # an export has a place for them: `test_simulated.py`
    check_export(adapter, how)


def test_double_precision_and_models_without_quantized_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="^model: no layer is quantized"):
        encode_model(tiny("rar").model, 8)
    adapter = tiny("rar", torch.float64)
    how = Recipe(QuantSpec(8, granularity="out_channel"), QuantSpec(8), scope=BLOCKS)
    pipeline.quantize(adapter, calibration("rar", adapter, 2), how, batch=4)
    with pytest.raises(ConfigError, match="^blocks.0.attn.qkv: the weight is torch.float64"):
        encode_model(adapter.model, 8)


def test_what_fp16_cannot_hold_is_refused_and_named() -> None:
    adapter, _ = small(BLOCKS)
    adapter.model.pos_embed.data[0, 0, 0] = 1e5
    with pytest.raises(
        ConfigError,
        match="^rest: float16 cannot hold pos_embed, whose values reach 100000, allowed",
    ):
        encode_model(adapter.model, 8)
    assert float(encode_model(adapter.model, 8, "float32").tensors["pos_embed"].max()) == 1e5
    with pytest.raises(ConfigError, match="^rest: 'int8' is not one of float16, float32"):
        encode_model(adapter.model, 8, "int8")


# --- damaged and foreign files


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "rar.json"
    adapter, _ = small(Scope())
    save_export(encode_model(adapter.model, 8), path, {"model": "rar"})
    return path


@pytest.fixture
def pair(exported: Path, tmp_path: Path) -> Path:
    """A copy of the two files that a test may damage; the path of the description."""
    for file in (exported, exported.with_suffix(".safetensors")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / exported.name


def rewrite(pair: Path, change: Callable[[dict], object]) -> None:
    """Change the description as its own writer could: the digest is right."""
    plain = json.loads(pair.read_text())
    change(plain)
    plain["digest"] = export_files._description_digest(plain)
    pair.write_text(json.dumps(plain))


def retensor(pair: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors as their own writer could: all hashes are right."""
    file = pair.with_suffix(".safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    rewrite(pair, lambda plain: plain.update(sha256=export_files._file_sha256(file)))


def test_damage_anywhere_is_seen(pair: Path) -> None:
    for file, said in (
        (pair, "is damaged"),
        (pair.with_suffix(".safetensors"), "its sha256 differs"),
    ):
        whole = file.read_bytes()
        for damaged in (
            whole[: len(whole) // 2],
            whole[:-1],
            b"",
            whole[:99] + bytes([whole[99] ^ 1]) + whole[100:],
        ):
            if damaged == whole[:-1] and file == pair:
                continue  # the newline at the end says nothing
            file.write_bytes(damaged)
            with pytest.raises(ExportError, match=said) as caught:
                read_export(pair)
            assert "\n" not in str(caught.value)
        file.write_bytes(whole)
    assert read_export(pair).plain["about"] == {"model": "rar"}


def test_missing_and_foreign_files_are_refused(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="none.json cannot be read .No such file"):
        read_export(tmp_path / "none.json")
    for text in ("[1, 2]", '{"format": "gguf"}', "{}"):
        (tmp_path / "foreign.json").write_text(text)
        with pytest.raises(
            ExportError,
            match="is not the description of an export, allowed is the format ar-ptq-int8",
        ):
            read_export(tmp_path / "foreign.json")
    rewrite(pair, lambda plain: plain.update(version=3))
    with pytest.raises(ExportError, match="has the format version 3, allowed are 1 and 2"):
        read_export(pair)
    rewrite(pair, lambda plain: plain.update(version=1))
    pair.with_suffix(".safetensors").unlink()
    with pytest.raises(ExportError, match=r"rar\.safetensors cannot be read"):
        read_export(pair)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.pop("blocks.0.mlp.fc1.weight.scale"),
            "blocks.0.mlp.fc1.weight.scale is missing",
        ),
        (lambda t: t.pop("pos_embed"), "pos_embed is missing"),
        (lambda t: t.pop("blocks.1.attn.qk.b.zero"), "blocks.1.attn.qk.b.zero is missing"),
        (lambda t: t.update(more=torch.zeros(1)), "more is not expected"),
        (
            lambda t: t.update({"lm_head.weight.codes": t["lm_head.weight.codes"][:-1]}),
            "lm_head.weight.codes is torch.int8 .39, 48., allowed is torch.int8 .40, 48.",
        ),
        (
            lambda t: t.update({"lm_head.bias": t["lm_head.bias"].half()}),
            "lm_head.bias is torch.float16",
        ),
        (
            lambda t: t.update(pos_embed=t["pos_embed"].float()),
            "pos_embed is torch.float32 .*allowed is torch.float16",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    pair: Path, change: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    retensor(pair, change)
    adapter = tiny("rar", torch.float32)
    before = {k: v.clone() for k, v in adapter.model.state_dict().items()}
    with pytest.raises(ExportError, match=said) as caught:
        restore_model(adapter.model, read_export(pair))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in adapter.model.state_dict().items())


def test_an_export_of_another_model_is_refused(pair: Path) -> None:
    with pytest.raises(ExportError, match=r"it has a layer \S+ of .*, the model has none"):
        restore_model(tiny("par", torch.float32).model, read_export(pair))


def test_an_export_that_was_read_can_be_changed_and_written_again(pair: Path) -> None:
    export = read_export(pair)
    save_export(
        Export(export.plain, {k: v + 1 for k, v in export.tensors.items()}),
        pair,
        {"model": "other"},
    )
    again = read_export(pair)
    assert again.plain["about"] == {"model": "other"}
    assert torch.equal(again.tensors["pos_embed"], export.tensors["pos_embed"] + 1)


def test_a_rotation_that_is_none_of_ours_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="^rotation: Identity has no place in an export, allowed are Hadamard's"
    ):
        describe_rotation(nn.Identity())


@pytest.mark.parametrize("fatal", [0, 1])
def test_a_killed_export_leaves_nothing_that_can_be_read(
    pair: Path, monkeypatch: pytest.MonkeyPatch, fatal: int
) -> None:
    """Killed in front of the first or the second rename, over an older export."""
    export = read_export(pair)
    calls = []
    original = files.os.replace

    def killed(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) > fatal:
            raise KeyboardInterrupt
        original(source, target)

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_export(Export(export.plain, {k: v + 1 for k, v in export.tensors.items()}), pair, {})
    # no description, no temporary file
    assert {p.name for p in pair.parent.iterdir()} == {"rar.safetensors"}
    with pytest.raises(ExportError, match="cannot be read"):
        read_export(pair)
