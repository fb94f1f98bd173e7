"""QuaRot leaves every model what it is, offline and online, and what must not be rotated offline
does break."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from models.par.adapter import PARAdapter
from models.par.transformer import PAR
from models.var.adapter import VARAdapter
from models.var.transformer import VAR
from ptq import folding
from ptq.inputs import capture_inputs
from ptq.methods.hadamard import HadamardRotation, hadamard_matrix
from ptq.methods.quarot import (
    Entry,
    Exit,
    HadamardSettings,
    RMSNorm,
    rotate_heads,
    rotate_offline,
    rotate_stream,
)
from ptq.methods.svdquant import SVDQuantSettings
from ptq.modules import QuantLinear, QuantMatMul, swap_module
from ptq.options import Options
from ptq.pipeline import apply_transforms, quantize, solve_transforms
from ptq.recipe import KINDS, Recipe
from ptq.sites import Scope
from ptq.types import (
    Adapter,
    HeadRotation,
    InputTransform,
    QuantSpec,
    Rows,
    RowsFold,
    Site,
    StreamRotation,
)
from tests.families import CLASSES, CODES, FAMILIES, calibration, decoded, relative, tiny
from tests.reference import fill, made_up

CHAINS = [("hadamard",), ("smoothquant", "shift", "gps", "hadamard"), ("hadamard", "svd")]
DYNAMIC = QuantSpec(6, granularity="token_dynamic")


def recipe(*chain: str, offline: bool = True, **changes: object) -> Recipe:
    """Everything in scope, every kind of site rotated."""
    settings = Options(
        hadamard=HadamardSettings(KINDS, offline),
        svd=SVDQuantSettings(rank=6, iterations=1, grid=False),
    )
    given = {"scope": Scope(KINDS), "activations": DYNAMIC, "options": settings, **changes}
    return Recipe(
        QuantSpec(6, granularity="out_channel"), transforms=chain or ("hadamard",), **given
    )


@torch.no_grad()
def transformed(adapter: Adapter, family: str, how: Recipe) -> None:
    """What `quantize` does, nothing rounded."""
    chosen = calibration(family, adapter)
    if how.options.hadamard.offline:
        rotate_offline(adapter)
    solution = solve_transforms(
        adapter, chosen.batches(4), len(chosen), how, lambda items, what: items
    )
    apply_transforms(adapter, how, solution)


@torch.no_grad()
def error(before: Adapter, after: Adapter, rows: Rows) -> float:
    """Of the full sequence and of cached decoding, the larger."""
    errors = [relative(after.forward(rows), before.forward(rows))]
    stepwise = decoded(before, rows)
    if stepwise is not None:
        errors.append(relative(decoded(after, rows), stepwise))
    return max(errors)


# --- exactness


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("chain", CHAINS, ids="+".join)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_without_quantizers_the_model_stays_the_same(
    family: str, offline: bool, chain: tuple[str, ...], dtype: torch.dtype, bound: float
) -> None:
    before = tiny(family, dtype)
    after = tiny(family, dtype)
    transformed(after, family, recipe(*chain, offline=offline))
    for site in before.sites:
        old, new = (adapter.model.get_submodule(site.name).weight for adapter in (before, after))
        assert relative(new, old) > 0.1  # a rotation, no identity
    assert error(before, after, calibration(family, before).rows) < bound


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_offline_rotations_alone_leave_the_plain_model_the_same(
    family: str, dtype: torch.dtype, bound: float
) -> None:
    before = tiny(family, dtype)
    after = tiny(family, dtype)
    rotate_offline(after)
    assert error(before, after, calibration(family, before).rows) < bound


def unusual(name: str) -> tuple[str, Adapter]:
    """Shared AdaLN, scores without unit queries, shared value heads; heads of a number or width
    without a matrix."""
    if name == "par_shared_values":
        adapter = PARAdapter(
            fill(PAR(48, 2, 4, CODES, 36, 3, 4, CLASSES, n_kv_head=2, multiple_of=32)).double()
        )
        return "par", adapter
    shape = {"var_three_heads": (60, 3), "var_odd_width": (54, 3)}.get(name, (48, 4))
    changes = {
        "var_shared_adaln": {"shared_aln": True},
        "var_plain_scores": {"attn_l2_norm": False},
    }.get(name, {})
    model = fill(VAR(2, *shape, (1, 2, 3), CODES, 8, CLASSES, **changes)).double()
    adapter = VARAdapter(model, tiny("var").quantizer)
    adapter.prepare()
    return "var", adapter


@pytest.mark.parametrize(
    "name",
    [
        "par_shared_values",
        "var_three_heads",
        "var_odd_width",
        "var_shared_adaln",
        "var_plain_scores",
    ],
)
@pytest.mark.parametrize("offline", [False, True])
def test_unusual_models_stay_the_same_too(name: str, offline: bool) -> None:
    (family, before), (_, after) = unusual(name), unusual(name)
    transformed(after, family, recipe(offline=offline))
    assert error(before, after, calibration(family, before).rows) < 1e-12


# --- what is rotated, and where


def online(adapter: Adapter) -> set[str]:
    """Kinds of sites and products with a rotation at run time; every site of a kind has one, or
    none does."""
    found: dict[str, set[bool]] = {}
    for site in (*adapter.sites, *adapter.matmuls):
        module = adapter.model.get_submodule(site.name)
        holder = module if isinstance(module, QuantMatMul) else module.transform
        found.setdefault(site.kind, set()).add(holder is not None and holder.rotation is not None)
    assert all(
        len(answers) == 1 for kind, answers in found.items() if kind not in ("embed", "diffusion")
    )
    return {kind for kind, answers in found.items() if True in answers}


@pytest.mark.parametrize(
    ("family", "left"),
    [
        ("var", {"adaln", "qkv", "proj", "fc1", "fc2", "head"}),
        ("rar", {"adaln", "qkv", "proj", "fc1", "fc2", "head", "qk"}),
        ("par", {"proj", "fc2", "qk"}),
        ("mar", {"proj", "fc2"}),
    ],
)
def test_online_is_only_what_cannot_be_offline(family: str, left: set[str]) -> None:
    kinds = ("qkv", "proj", "fc1", "fc2", "head", "adaln")
    for offline in (True, False):
        adapter = tiny(family)
        settings = Options(hadamard=HadamardSettings(offline=offline))
        transformed(
            adapter, family, recipe(options=settings, scope=Scope(kinds + ("embed", "diffusion")))
        )
        every = {site.kind for site in adapter.sites if site.kind in kinds} | {"qk"}
        assert online(adapter) == (left if offline else every)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_quantizer_sees_a_full_rotation_of_what_it_saw(family: str) -> None:
    before = tiny(family)
    after = tiny(family)
    how = recipe(offline=True)
    rows = calibration(family, before).rows
    transformed(after, family, how)
    seen = capture_inputs(before, [rows], list(before.sites), False)
    quantized = capture_inputs(
        after, [rows], [replace(site, name=f"{site.name}.input") for site in after.sites], False
    )
    streams = [r for r in before.rotations if isinstance(r, StreamRotation)]
    for site in after.sites:
        x = seen[site.name]
        rotation = HadamardRotation(x.shape[1])
        # past the norm: weight and bias are the reader's
        if any(site.name in stream.readers for stream in streams):
            norm = before.model.get_submodule(site.fold.norm)
            x = (x - (0 if norm.bias is None else norm.bias)) / norm.weight
            rotation = HadamardRotation(x.shape[1], seed=0)
        expected = rotation(x)
        if site.kind == "proj":
            expected = x @ torch.kron(hadamard_matrix(4), hadamard_matrix(12)).double() / 48**0.5
        assert relative(quantized[f"{site.name}.input"], expected) < 1e-12


@pytest.mark.parametrize("family", ["par", "mar"])
@torch.no_grad()
def test_the_residual_stream_is_rotated_and_free_of_norm_weights(family: str) -> None:
    before = tiny(family)
    after = tiny(family)
    rotate_offline(after)
    outputs: list[Tensor] = []
    rows = calibration(family, before).rows
    for adapter in (before, after):
        handle = adapter.model.get_submodule(adapter.last_block).register_forward_hook(
            lambda module, args, out: outputs.append(out)
        )
        adapter.forward(rows)
        handle.remove()
    h, rotated = outputs
    if family == "mar":
        h = h - h.mean(dim=-1, keepdim=True)
    assert relative(rotated, HadamardRotation(48, seed=0)(h)) < 1e-12
    norms = [
        site.fold.norm
        for r in after.rotations
        if isinstance(r, StreamRotation)
        for site in after.sites
        if site.name in r.readers
    ]
    assert len(norms) == (5 if family == "par" else 9)
    for name in norms:
        norm = after.model.get_submodule(name)
        assert bool((norm.weight == 1).all())
        assert norm.bias is None
    # its ends
    assert any(isinstance(m, nn.LayerNorm) for m in after.model.modules()) == (family == "mar")


def test_no_calibration_row_is_run_for_a_rotation() -> None:
    adapter = tiny("rar")
    adapter.forward = Mock(side_effect=AssertionError)
    solve_transforms(adapter, [{}], 1, recipe(), lambda items, what: items)
    with pytest.raises(AssertionError):
        solve_transforms(
            adapter, [{}], 1, recipe("smoothquant", "hadamard"), lambda items, what: items
        )


# --- quantized


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how",
    [
        recipe(activations=replace(DYNAMIC, bits=8, symmetric=True)),
        recipe(activations=replace(DYNAMIC, bits=8, symmetric=True), rounder="gptq"),
        recipe(activations=replace(DYNAMIC, bits=8), offline=False),
        recipe(activations=QuantSpec(8), stwq=True),
    ],
    ids=["quarot", "quarot_gptq", "quarot_paper", "quarot_stwq"],
)
@torch.no_grad()
def test_a_quantized_model_comes_close_to_the_original_and_can_be_copied(
    family: str, how: Recipe
) -> None:
    adapter = tiny(family, torch.float32)
    chosen = calibration(family, adapter)
    expected = adapter.forward(chosen.rows)
    quantize(adapter, chosen, how, batch=4)
    found = adapter.forward(chosen.rows)
    assert 1e-4 < float((found - expected).norm() / expected.norm()) < 0.12
    for model in (copy.deepcopy(adapter.model), pickle.loads(pickle.dumps(adapter.model))):
        adapter.model = model
        assert torch.equal(adapter.forward(chosen.rows), found)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rotated_outlier_channels_cost_less_at_four_bits(family: str) -> None:
    """A channel of proj's input is 100 times as large and its weights small: the same function, but
    for the rounding.
    """
    errors = []
    for chain in (("hadamard",), ()):
        adapter = tiny(family, torch.float64)
        for site in adapter.sites:
            if site.kind == "proj":
                scale = torch.ones(48, dtype=torch.float64)
                scale[5] = 0.01
                folding.apply_transform(
                    adapter.model, site, InputTransform(scale, torch.zeros_like(scale))
                )
        chosen = calibration(family, adapter)
        expected = adapter.forward(chosen.rows)
        how = Recipe(
            QuantSpec(8, granularity="out_channel"),
            QuantSpec(6, granularity="token_dynamic"),
            chain,
            scope=Scope(("proj",), matmuls=False),
        )
        quantize(adapter, chosen, how, batch=12)
        errors.append(float((adapter.forward(chosen.rows) - expected).norm()))
    assert errors[0] < 0.5 * errors[1]


# --- what must not be rotated offline


def rotated_block_error(family: str, modulated: bool) -> float:
    """Of a block in a rotated stream, its LayerNorms without an affine part, with or without
    AdaLN's modulation."""
    adapter = tiny(family)
    block = adapter.model.blocks[0]
    attn = "blocks.0.attn"
    mlp = "blocks.0.ffn" if family == "var" else "blocks.0.mlp"
    qkv = f"{attn}.mat_qkv" if family == "var" else f"{attn}.qkv"
    modulation = block.ada_lin[1] if family == "var" else block.adaLN_modulation[1]
    if not modulated:
        gates = slice(0, 96) if family == "var" else [*range(96, 144), *range(240, 288)]
        modulation.weight.zero_()
        modulation.bias.zero_()
        modulation.bias[gates] = 1
    for name in ("norm1", "norm2") if family == "rar" else ():
        getattr(block, name).weight.fill_(1)
        getattr(block, name).bias.zero_()
    h = made_up("h", (2, 5, 48)).double()
    c = made_up("c", (2, 1, 48)).double()
    positions = torch.arange(5)
    rotation = HadamardRotation(48, seed=0)
    if family == "rar":
        c = c.expand(-1, 5, -1)
    h = h - h.mean(dim=-1, keepdim=True)
    expected = block(h, c, positions)
    expected = expected - expected.mean(dim=-1, keepdim=True)
    identity = InputTransform.identity(48, h)
    for name in (qkv, f"{mlp}.fc1"):
        folding.apply_to_consumers(
            adapter.model, Site(name, "qkv", (name,)), replace(identity, rotation=rotation)
        )
    for name in (f"{attn}.proj", f"{mlp}.fc2"):
        folding.rotate_outputs(adapter.model.get_submodule(name), rotation, centred=True)
    for name in ("ln_wo_grad",) if family == "var" else ("norm1", "norm2"):
        swap_module(block, name, RMSNorm(torch.ones(48, dtype=torch.float64), 1e-6))
    return relative(rotation.inverse(block(rotation(h), c, positions)), expected)


@pytest.mark.parametrize("family", ["var", "rar"])
@torch.no_grad()
def test_a_residual_rotation_is_broken_by_adaln_and_by_nothing_else(family: str) -> None:
    assert rotated_block_error(family, modulated=False) < 1e-12
    assert rotated_block_error(family, modulated=True) > 0.1


@pytest.mark.parametrize(
    ("family", "exact"), [("var", True), ("mar", True), ("rar", False), ("par", False)]
)
@torch.no_grad()
def test_queries_and_keys_are_rotated_offline_only_where_adapters_say(
    family: str, exact: bool
) -> None:
    before = tiny(family)
    after = tiny(family)
    product = next(p.name for p in after.matmuls if p.kind == "qk")
    assert (
        any(isinstance(r, HeadRotation) and r.reader == product for r in after.rotations) == exact
    )
    qkv = next(site.name for site in after.sites if site.kind == "qkv")
    rotate_heads(after, HeadRotation(qkv, (0, 96), 12, product), HadamardRotation(12))
    wrong = error(before, after, calibration(family, before).rows)
    assert wrong < 1e-12 if exact else wrong > 1e-2


@pytest.mark.parametrize("norm", ["unit", "none"])
@torch.no_grad()
def test_a_scale_of_queries_undone_in_the_keys_is_broken_by_unit_vectors(norm: str) -> None:
    name = "var_plain_scores" if norm == "none" else "var_of_its_own"
    (_, before), (_, after) = unusual(name), unusual(name)
    linear = after.model.blocks[0].attn.mat_qkv
    scale = made_up("scale", (48,)).double().exp()
    for rows, factor in ((slice(0, 48), scale), (slice(48, 96), 1 / scale)):
        linear.weight[rows] *= factor[:, None]
        linear.bias[rows] *= factor
    wrong = error(before, after, calibration("var", before).rows)
    assert wrong < 1e-12 if norm == "none" else wrong > 1e-2


@pytest.mark.parametrize(
    ("family", "exact"), [("var", False), ("rar", False), ("mar", False), ("par", True)]
)
@torch.no_grad()
def test_a_scale_passes_a_gated_product_but_no_gelu(family: str, exact: bool) -> None:
    before = tiny(family)
    after = tiny(family)
    first, second = (next(s for s in after.sites if s.kind == kind) for kind in ("fc1", "fc2"))
    width = after.model.get_submodule(second.name).in_features
    scale = made_up("scale", (width,)).double().exp()
    fold = second.fold or RowsFold(first.name, (0, width))
    folding.apply_transform(
        after.model, replace(second, fold=fold), InputTransform(scale, torch.zeros_like(scale))
    )
    wrong = error(before, after, calibration(family, before).rows)
    assert wrong < 1e-12 if exact else wrong > 1e-2


@pytest.mark.parametrize("left_out", ["entry", "exit", "centred", "tables"])
@torch.no_grad()
def test_every_part_of_mars_stream_rotation_is_needed(left_out: str) -> None:
    before = tiny("mar")
    after = tiny("mar")
    for stream in after.rotations:
        if isinstance(stream, StreamRotation):
            missing = {"entry": None, "exit": None, "centred": False, "tables": ()}[left_out]
            rotate_stream(
                after, replace(stream, **{left_out: missing}), HadamardRotation(48, seed=0)
            )
    assert error(before, after, calibration("mar", before).rows) > 1e-2


def test_mars_stream_is_rotated_once_at_its_start_and_once_at_its_end() -> None:
    adapter = tiny("mar")
    rotate_offline(adapter)
    assert isinstance(adapter.model.z_proj_ln, Entry)
    assert isinstance(adapter.model.decoder_norm, Exit)
    kinds = [type(m) for m in adapter.model.modules()]
    assert (
        kinds.count(Entry),
        kinds.count(Exit),
        kinds.count(RMSNorm),
        kinds.count(QuantLinear),
    ) == (1, 1, 9, 0)
