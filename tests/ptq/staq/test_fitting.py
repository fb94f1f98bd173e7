"""A model fitted block by block: exact with its roundings off, the same in a decoding step and on
the full sequence, and each part does what it says."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from ptq.modules import QuantLinear, QuantMatMul
from ptq.numbers.numerics import QParams
from ptq.numbers.quantizers import Clip, DynamicQuantizer, Passthrough
from ptq.pipeline import quantize
from ptq.recipe import Recipe
from ptq.sites import Scope
from ptq.staq.numerators import NumeratorQuantizer
from ptq.staq.positions import TableQuantizer
from ptq.types import Adapter, ConfigError, InputTransform, QuantSpec
from tests.families import FAMILIES, assert_unchanged, calibration, decoded, relative, tiny

WEIGHTS = QuantSpec(6, granularity="out_channel", range="grid")
STAQ = Recipe(
    WEIGHTS,
    QuantSpec(6, range="grid"),
    ("geometric",),
    stwq=True,
    exclude_sinks=True,
    softmax="numerators",
    sink_shift=True,
    per_position=True,
    per_head=True,
    key_weights=True,
    rounder="gptaq",
    bias_correction=True,
    sequential=True,
)
PLAIN = Recipe(replace(WEIGHTS, range="percentile_mse"), QuantSpec(6), stwq=True)
PARTS = {
    "numerators": {"softmax": "numerators"},
    "sink_shift": {"sink_shift": True},
    "geometric": {"transforms": ("geometric",)},
    "per_position": {"per_position": True},
    "per_head": {"per_head": True},
    "key_weights": {"softmax": "numerators", "per_head": True, "key_weights": True},
    "gptaq": {"rounder": "gptaq"},
    "bias_correction": {"bias_correction": True},
    "sequential": {"sequential": True},
    "block_hadamard": {"transforms": ("block_hadamard",)},
}


def with_sinks(family: str, dtype: torch.dtype = torch.float64) -> Adapter:
    """A small model whose first tokens are far larger than the others."""
    adapter = tiny(family, dtype)
    model = adapter.model
    if family == "var":
        model.pos_start *= 20
    elif family == "rar":
        model.cls_token *= 20
    elif family == "par":
        model.cls_embedding["embedding_table"].weight.mul_(20)
    else:
        model.class_emb.weight.mul_(20)
    return adapter


def fitted(family: str, recipe: Recipe, dtype: torch.dtype = torch.float64) -> Adapter:
    adapter = with_sinks(family, dtype)
    quantize(adapter, calibration(family, adapter), recipe, batch=5)
    return adapter


def rounded_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be rounded any more but numerators, whose grid `refine` makes fine."""

    def keep(weight: Tensor, spec: QuantSpec, clip: Clip | None = None) -> tuple[Tensor, QParams]:
        return weight, QParams(weight.new_ones(len(weight)), weight.new_zeros(len(weight)))

    monkeypatch.setattr("ptq.rounding.fake_quantize_weight", keep)
    monkeypatch.setattr("ptq.staq.inputs.static_quantizer", lambda *args: Passthrough())
    monkeypatch.setattr("ptq.staq.operands.static_quantizer", lambda *args: Passthrough())
    monkeypatch.setattr("ptq.staq.positions.simulate_format", lambda x, params, spec: x)


def refine(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, NumeratorQuantizer):
            module.levels = 2**50


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_rounding_the_whole_method_changes_nothing(
    family: str, sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scale, mean shift, sink shift, key weights, numerators and corrected biases, all at once."""
    before = with_sinks(family)
    rows = calibration(family, before).rows
    reference = before.forward(rows)
    rounded_nowhere(monkeypatch)
    if sequential:  # numerators are coarse while the model is fitted, which biases would see
        monkeypatch.setattr("ptq.staq.operands.NumeratorQuantizer", fine_numerators)
    recipe = replace(STAQ, rounder="nearest", sequential=sequential)
    adapter = fitted(family, recipe)
    refine(adapter.model)
    shifted = [m for m in adapter.model.modules() if getattr(m, "sink_shift", None) is not None]
    assert len(shifted) == {"par": 4 * 2, "mar": 3 * 4}.get(family, 3 * 2)
    assert all(bool(m.sink_shift.mean.any()) for m in shifted)
    assert_unchanged(adapter, rows, reference, 1e-12)


def fine_numerators(levels: int, *args: object) -> NumeratorQuantizer:
    return NumeratorQuantizer(2**50, *args)


@pytest.mark.parametrize("family", ["var", "rar", "par"])
@torch.no_grad()
def test_a_decoding_step_is_the_full_sequence(family: str) -> None:
    adapter = fitted(family, STAQ)
    rows = calibration(family, adapter).rows
    assert relative(decoded(adapter, rows), adapter.forward(rows)) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_whole_is_closer_to_full_precision_than_ptq4arvg(family: str) -> None:
    before = with_sinks(family)
    chosen = calibration(family, before, images=24)
    reference = before.forward(chosen.rows)
    specs = (replace(WEIGHTS, range="percentile_mse"), QuantSpec(6))
    theirs = Recipe(*specs, ("smoothquant", "shift", "gps"), stwq=True, exclude_sinks=True)
    errors = []
    for recipe in (STAQ, theirs):
        adapter = with_sinks(family)
        quantize(adapter, chosen, recipe, batch=16)
        errors.append(float((adapter.forward(chosen.rows) - reference).square().mean()))
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_part_can_be_added_to_another_recipe(family: str, part: str) -> None:
    adapter = fitted(family, replace(PLAIN, **PARTS[part]), torch.float32)
    rows = calibration(family, adapter).rows
    assert bool(adapter.forward(rows).isfinite().all())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how",
    [
        {"activations": QuantSpec(6, granularity="token_dynamic"), "stwq": False},
        {"transforms": ("smoothquant", "svd"), "exclude_sinks": True},
        {"transforms": ("repq",), "stwq": False},
        {"transforms": ("geometric", "hadamard")},
        {"rounder": "gptq"},
        {"softmax": "log_sqrt2"},
        {"softmax": "none"},
        {"scope": Scope(("fc1", "fc2"), False)},
    ],
    ids=lambda how: "+".join(how),
)
@torch.no_grad()
def test_parts_go_with_other_methods(family: str, how: dict[str, object]) -> None:
    recipe = replace(
        PLAIN, **{"sink_shift": True, "bias_correction": True, "sequential": True, **how}
    )
    adapter = fitted(family, recipe, torch.float32)
    rows = calibration(family, adapter).rows
    assert bool(adapter.forward(rows).isfinite().all())


@torch.no_grad()
def test_with_no_part_but_the_order_the_streaming_pipeline_gives_the_same() -> None:
    """Where nothing that is rounded feeds anything else, the fitted model is the streamed one."""
    recipe = replace(PLAIN, scope=Scope(("adaln",), False))
    found = fitted("rar", replace(recipe, sink_shift=True)).model  # there are no sinks in scope
    streamed = fitted("rar", recipe).model
    assert len(list(found.buffers())) == len(list(streamed.buffers()))
    for (name, value), own in zip(streamed.named_buffers(), found.buffers()):
        assert torch.equal(own, value), name


def keep_output(kept: list[Tensor], module: nn.Module, args: tuple, output: Tensor) -> None:
    kept.append(output)


@torch.no_grad()
def test_corrected_biases_keep_the_mean_output() -> None:
    recipe = replace(PLAIN, bias_correction=True, weights=replace(PLAIN.weights, bits=3))
    recipe = replace(recipe, sink_shift=True)
    before = with_sinks("rar")
    chosen = calibration("rar", before)
    means = []
    for how in (None, replace(recipe, bias_correction=False), recipe):
        adapter = with_sinks("rar")
        if how is not None:
            quantize(adapter, chosen, replace(how, scope=Scope(("fc1",), False)), batch=5)
        linear = adapter.model.get_submodule("blocks.0.mlp.fc1")
        outputs: list[Tensor] = []
        handle = linear.register_forward_hook(partial(keep_output, outputs))
        adapter.forward(chosen.rows)
        handle.remove()
        output = torch.cat(outputs)  # (B, T, O)
        means.append(torch.stack([output[:, :2].mean(dim=(0, 1)), output[:, 2:].mean(dim=(0, 1))]))
    exact, plain, corrected = means
    assert float((plain - exact).abs().amax(dim=1).min()) > 0.01
    assert float((corrected - exact).abs().max()) < 1e-12


@torch.no_grad()
def test_what_is_recorded_leaves_no_recorder_behind() -> None:
    for family in FAMILIES:
        adapter = fitted(family, STAQ)
        for module in adapter.model.modules():
            assert type(module).__name__ not in ("Recorder", "Station")
            if isinstance(module, QuantLinear):
                assert isinstance(module.input, TableQuantizer)
            elif isinstance(module, QuantMatMul):
                assert isinstance(module.b, TableQuantizer)


@torch.no_grad()
def test_dynamic_operands_stay_dynamic() -> None:
    how = replace(PLAIN, activations=QuantSpec(6, granularity="token_dynamic"), stwq=False)
    adapter = fitted("rar", replace(how, bias_correction=True, softmax="numerators"))
    attention = adapter.model.blocks[0].attn
    assert isinstance(attention.qk.a, DynamicQuantizer)
    assert isinstance(attention.pv.a, NumeratorQuantizer)
    assert isinstance(attention.qkv.input, DynamicQuantizer)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"key_weights": True, "per_head": True}, "method.key_weights: true needs method.softmax"),
        (
            {"key_weights": True, "softmax": "numerators"},
            "method.key_weights: true needs method.per",
        ),
        ({"per_position": True, "stwq": False}, "method.per_position: true needs method.stwq=true"),
        (
            {
                "per_head": True,
                "stwq": False,
                "activations": QuantSpec(6, granularity="token_dynamic"),
            },
            "method.per_head: true needs static activations",
        ),
    ],
)
def test_parts_without_what_they_need_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PLAIN, **wrong)


@torch.no_grad()
def test_the_scale_is_folded_where_it_can_be_and_runs_at_gelus_output() -> None:
    online = {}
    for family in FAMILIES:
        adapter = fitted(family, replace(PLAIN, transforms=("geometric",)))
        online[family] = {
            site.kind
            for site in adapter.sites
            if getattr(adapter.model.get_submodule(site.name), "transform", None) is not None
        }
    assert online == {"var": {"fc2"}, "rar": {"fc2"}, "par": set(), "mar": {"fc2"}}


@torch.no_grad()
def test_a_block_of_eight_is_rotated_behind_a_gate_alone() -> None:
    for family in FAMILIES:
        before = with_sinks(family)
        rows = calibration(family, before).rows
        reference = before.forward(rows)
        adapter = fitted(
            family, replace(PLAIN, transforms=("block_hadamard",), scope=Scope(("fc2",), False))
        )
        rotated = [
            module
            for module in adapter.model.modules()
            if isinstance(module, QuantLinear) and module.transform is not None
        ]
        assert len(rotated) == (2 if family == "par" else 0)
        assert relative(adapter.forward(rows), reference) < 0.2
    assert InputTransform.identity(8, torch.ones(1)).is_diagonal_identity()
