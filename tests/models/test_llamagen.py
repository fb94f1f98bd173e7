"""LlamaGen against reference outputs of FoundationVision/LlamaGen, and what the design promises of
it: cached equals full, transforms fold exactly, integers equal fake quantization."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import models
from experiments.config.compose import configure
from experiments.config.recipe import build_recipe
from models.llamagen.generator import LlamaGenGenerator
from models.llamagen.presets import PRESETS
from models.llamagen.transformer import LlamaGen
from models.par import sampler
from models.par.sampler import generate
from models.par.transformer import rotary_table
from ptq.methods.quarot import rotate_offline
from ptq.pipeline import apply_transforms, quantize, solve_transforms
from tests.families import calibration, decoded, relative, tiny
from tests.reference import Golden, fill

GREEDY = {"greedy_cfg": (1.5, -1), "greedy_nocfg": (1.0, -1), "greedy_interval": (3.0, 4)}
TINY = dict(dim=64, n_layer=2, n_head=4, vocab_size=64, block_size=36, num_classes=10)
PARAMETERS = {  # in millions, of the README
    "llamagen_b_256": 111,
    "llamagen_l_384": 343,
    "llamagen_xl_384": 775,
    "llamagen_xxl_384": 1411,
    "llamagen_3b_384": 3097,
}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("llamagen_tiny")


def small(kv_heads: int | None = None) -> LlamaGen:
    return fill(LlamaGen(**TINY, n_kv_head=kv_heads, multiple_of=32))


def argmax(probs: Tensor, step: int) -> Tensor:
    return probs.argmax(-1)


def multinomial(probs: Tensor, step: int) -> Tensor:
    return torch.multinomial(probs.flatten(0, 1), 1).view(probs.shape[:2])


# --- the official code

# state dicts of all presets: tests/models/test_registry.py


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_those_of_the_readme(name: str) -> None:
    model = models.outline(name).transformer
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == PARAMETERS[name]


@torch.no_grad()
@pytest.mark.parametrize(("entry", "kv_heads"), [("", None), ("gqa_", 2)])
def test_teacher_forced_logits(golden: Golden, entry: str, kv_heads: int | None) -> None:
    model = small(kv_heads)
    rotation = rotary_table(model.layout, torch.arange(36), model.head_dim, model.rope_base)
    golden.check("freqs_cis", rotation, 1e-6)
    outputs: list[Tensor] = []
    model.layers[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = model(golden["ids"][:, :-1], golden["cond"])
    golden.check(f"{entry}tf_layer0_out", outputs[0])
    golden.check(f"{entry}tf_logits", logits)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("entry", GREEDY)
def test_greedy_tokens_with_and_without_cache(
    golden: Golden, entry: str, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Tensor] = []
    guide = sampler.guide_logits
    monkeypatch.setattr(
        sampler, "guide_logits", lambda *args: steps.append(guide(*args)) or steps[-1]
    )
    scale, interval = GREEDY[entry]
    ids = generate(small(), golden["cond"], argmax, scale, interval, top_k=1, cached=cached)
    golden.check(f"{entry}_seq", ids)
    if scale > 1:
        golden.check(f"{entry}_logits", torch.cat(steps, dim=1)[:1])


def test_seeded_sampling_follows_the_official_call_order(golden: Golden) -> None:
    model = small()
    given = dict(cfg_scale=1.5, temperature=0.9, top_k=20, top_p=0.95)
    torch.manual_seed(3)
    golden.check("seeded_seq", generate(model, golden["cond"], multinomial, **given))


# --- the generator


def test_images_come_in_raster_order_and_depend_on_their_index_alone() -> None:
    tokenizer = dict(
        ch_mult=(1, 2),
        ch=32,
        num_res_blocks=2,
        z_channels=32,
        codebook_size=64,
        codebook_embed_dim=8,
    )
    preset = replace(
        PRESETS["llamagen_b_256"],
        transformer=TINY,
        tokenizer=tokenizer,
        image_size=12,
        tokens=36,
        classes=10,
    )
    model = LlamaGenGenerator(preset)
    fill(model.transformer)
    fill(model.tokenizer)
    settings = dict(preset.samplers["official"])
    labels = torch.tensor([3, 7, 1])
    tokens = model.sample(labels, 0, torch.arange(3), settings)
    alone = model.sample(labels[1:2], 0, torch.tensor([1]), settings)
    assert torch.equal(tokens[1:2], alone)
    assert model.decode(tokens).shape == (3, 3, 12, 12)
    assert torch.equal(model.transformer.layout.to_raster(tokens), tokens)
    # what sampling feeds is what teacher forcing scores
    log_probs = model.log_probs(tokens, labels)
    assert log_probs.shape == (3, 36, 64)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3, 36))


# --- quantization


@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_sequence() -> None:
    adapter = tiny("llamagen")
    rows = calibration("llamagen", adapter).rows
    assert relative(decoded(adapter, rows), adapter.forward(rows)) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("method", ["ptq4arvg", "repq", "quarot", "staq"])
def test_transforms_leave_the_function_unchanged(method: str) -> None:
    adapter = tiny("llamagen")
    rows = calibration("llamagen", adapter)
    recipe = build_recipe(configure(["model=llamagen_b_256", f"method={method}", "quant=w6a6"]))
    before = adapter.forward(rows.rows)
    if recipe.rotates:
        rotate_offline(adapter)
    batches = rows.batches(4)
    solution = solve_transforms(adapter, batches, len(rows), recipe, lambda items, what: items)
    apply_transforms(adapter, recipe, solution)
    assert relative(adapter.forward(rows.rows), before) < 1e-12
    assert solution.transforms


@torch.no_grad()
def test_the_class_token_has_parameters_of_its_own_and_decoding_sees_them() -> None:
    adapter = tiny("llamagen")
    rows = calibration("llamagen", adapter)
    exact = copy.deepcopy(adapter).forward(rows.rows)
    recipe = build_recipe(configure(["model=llamagen_b_256", "method=ptq4arvg", "quant=w8a8"]))
    report = quantize(adapter, rows, recipe)
    scale = report.tensors["layers.0.attention.wqkv.input.scale"]
    assert scale.shape == (2,)
    full = adapter.forward(rows.rows)
    assert 0 < relative(full, exact) < 0.1
    assert relative(decoded(adapter, rows.rows), full) < 1e-12
