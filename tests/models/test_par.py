"""PAR and VQ-16 against reference outputs of YuqingWang1029/PAR, and what the design promises of
them."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from models.par import sampler
from models.par.adapter import PARAdapter
from models.par.generator import PARGenerator
from models.par.presets import PRESETS
from models.par.sampler import generate, truncate_logits
from models.par.tokenizer import VQModel
from models.par.transformer import PAR, Layout, feed_forward_width, rotary_table
from ptq.types import NormFold
from tests.reference import Golden, fill, made_up, released_keys

RELEASED = {
    "par_xl_4x": "par-XL-4x",
    "par_xxl_4x": "par-XXL-4x",
    "par_3b_4x": "par-3B-4x",
    "par_3b_16x": "par-3B-16x",
}
UNRELEASED = {"par-B-4x-UNRELEASED": (768, 12, 12), "par-L-4x-UNRELEASED": (1024, 24, 16)}
TINY = {  # golden file: constructor arguments
    "par_tiny_a_4x": dict(
        dim=64,
        n_layer=2,
        n_head=4,
        vocab_size=64,
        block_size=36,
        spe_token_num=3,
        ar_token_num=4,
        num_classes=10,
        multiple_of=32,
    ),
    "par_tiny_b_16x": dict(
        dim=64,
        n_layer=2,
        n_head=2,
        vocab_size=64,
        block_size=64,
        spe_token_num=15,
        ar_token_num=16,
        num_classes=10,
    ),
}
GREEDY = {  # golden entry: guidance scale, interval
    "greedy_cfg": (1.5, -1),
    "greedy_nocfg": (1.0, -1),
    "greedy_interval": (3.0, 1),
}
SMALL_VQ = dict(
    ch_mult=(1, 2), ch=32, num_res_blocks=2, z_channels=32, codebook_size=64, codebook_embed_dim=8
)
SMALL = replace(
    PRESETS["par_xl_4x"],
    transformer=TINY["par_tiny_a_4x"],
    tokenizer=SMALL_VQ,
    image_size=12,
    tokens=36,
    classes=10,
)


def argmax(probs: Tensor, step: int) -> Tensor:
    return probs.argmax(-1)


def multinomial(probs: Tensor, step: int) -> Tensor:
    return torch.multinomial(probs.flatten(0, 1), 1).view(probs.shape[:2])


@pytest.fixture(scope="module", params=TINY)
def reference(request: pytest.FixtureRequest) -> tuple[PAR, Golden]:
    return fill(PAR(**TINY[request.param])), Golden(request.param)


@pytest.fixture(scope="module")
def tiny() -> PAR:
    return fill(PAR(**TINY["par_tiny_a_4x"]))


@pytest.fixture
def guided(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The guided logits of every step, collected while sampling; empty without guidance."""
    steps: list[Tensor] = []
    guide = sampler.guide_logits
    monkeypatch.setattr(
        sampler, "guide_logits", lambda *args: steps.append(guide(*args)) or steps[-1]
    )
    return steps


def check_state(module: torch.nn.Module, file: str) -> None:
    state = {k: list(v.shape) for k, v in module.state_dict().items()}
    assert list(state.items()) == list(released_keys(file).items())
    assert {v.dtype for v in module.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("name", RELEASED)
def test_state_dicts_match_the_released_files_key_for_key(name: str) -> None:
    with torch.device("meta"):
        model = PARGenerator(PRESETS[name])
    check_state(model.transformer, RELEASED[name])
    check_state(model.tokenizer, "par-vq_ds16_c2i")
    assert [k for k, _ in model.transformer.named_buffers()] == []
    assert [k for k, _ in model.tokenizer.named_buffers()] == ["quantize.codebook_used"]


@pytest.mark.parametrize("file", UNRELEASED)
def test_state_dicts_match_the_unreleased_sizes(file: str) -> None:
    with torch.device("meta"):
        check_state(PAR(*UNRELEASED[file], 16384, 576, 3, 4, 1000), file)


def check_mask(golden: Golden, entry: str, layout: Layout) -> None:
    length = int(golden[f"{entry}_shape"][-1])
    mask = layout.visible(torch.arange(length))
    golden.check(f"{entry}_rowsum", mask.sum(1))
    golden.check(f"{entry}_packbits", torch.from_numpy(np.packbits(mask.numpy())))


def run_teacher_forced(model: PAR, golden: Golden, tolerance: float) -> None:
    """Masks, rotations, blocks, and logits of the whole sequence."""
    check_mask(golden, "group_mask", model.layout)
    check_mask(golden, "cache_causal_mask", model.layout)
    positions = torch.arange(int(golden["group_mask_shape"][0]))
    golden.check(
        "freqs_cis", rotary_table(model.layout, positions, model.head_dim, model.rope_base), 1e-6
    )
    outputs: list[Tensor] = []
    handles = [b.register_forward_hook(lambda m, a, out: outputs.append(out)) for b in model.layers]
    logits = model(golden["tf_ids"], golden["cond"])
    for handle in handles:
        handle.remove()
    entries = [i for i in range(len(outputs)) if f"tf_layer{i}_out" in golden]
    assert entries
    for i in entries:
        golden.check(f"tf_layer{i}_out", outputs[i], tolerance)
    golden.check("tf_logits", logits, tolerance)
    golden.check("tf_logits_argmax", logits.argmax(-1))


def run_tokenizer(model: VQModel, golden: Golden, images: Tensor, tolerance: float) -> None:
    golden.check("vq_decode", model.decode(golden["vq_codes"]), tolerance)
    golden.check("vq_encode_h", model.features(images), tolerance)
    ids = model.encode(images)
    golden.check("vq_encode_idx", ids.flatten())
    golden.check("vq_encode_quant", model.codes(ids), tolerance)


@torch.no_grad()
def test_teacher_forced_logits_blocks_and_masks(reference: tuple[PAR, Golden]) -> None:
    run_teacher_forced(*reference, 2e-5)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("entry", GREEDY)
def test_greedy_tokens_with_and_without_cache(
    reference: tuple[PAR, Golden], guided: list[Tensor], entry: str, cached: bool
) -> None:
    model, golden = reference
    scale, interval = GREEDY[entry]
    ids = generate(model, golden["cond"], argmax, scale, interval, top_k=1, cached=cached)
    golden.check(f"{entry}_seq", ids)
    golden.check(f"{entry}_seq_raster", model.layout.to_raster(ids))
    assert torch.equal(model.layout.from_raster(model.layout.to_raster(ids)), ids)
    if guided:
        golden.check(f"{entry}_logits_after_cfg", torch.cat(guided, dim=1))
    else:  # the decoder's logits are those of the teacher-forced tokens
        with torch.no_grad():
            logits = model(ids, golden["cond"])[:, : model.layout.tokens]
        golden.check(f"{entry}_logits_after_cfg", logits)


def test_seeded_sampling_follows_the_official_call_order(
    reference: tuple[PAR, Golden], guided: list[Tensor]
) -> None:
    model, golden = reference
    torch.manual_seed(3)
    ids = generate(model, golden["cond"], multinomial, 1.5, temperature=0.9, top_k=20, top_p=0.95)
    golden.check("seeded_seq", ids)
    golden.check("seeded_seq_raster", model.layout.to_raster(ids))
    golden.check("seeded_logits_after_cfg", torch.cat(guided, dim=1))


@torch.no_grad()
def test_tokenizer() -> None:
    images = made_up("par-tiny-a:img", (2, 3, 12, 12)) * 0.5
    run_tokenizer(fill(VQModel(**SMALL_VQ)), Golden("par_tiny_a_4x"), images.clamp(-1, 1), 2e-5)


@torch.no_grad()
@pytest.mark.parametrize(("parallel", "kv_heads"), [(4, None), (4, 2), (9, None), (1, 1)])
def test_cached_equals_teacher_forced(parallel: int, kv_heads: int | None) -> None:
    model = fill(
        PAR(64, 2, 4, 32, 36, parallel - 1, parallel, 5, n_kv_head=kv_heads, multiple_of=32)
    )
    labels = torch.tensor([1, 5])
    seen = []
    ids = generate(model, labels, lambda p, step: seen.append(p) or p.argmax(-1), 1.0)
    expected = model(ids[:, :-parallel], labels).softmax(-1)  # what a decoder feeds
    torch.testing.assert_close(torch.cat(seen, dim=1), expected, atol=2e-6, rtol=0)


@torch.no_grad()
def test_explicit_attention_equals_fused(tiny: PAR) -> None:
    explicit = copy.deepcopy(tiny)
    ids = torch.arange(32)[None]
    labels = torch.tensor([4])
    for layer in explicit.layers:
        layer.attention.qk.fused = False
    torch.testing.assert_close(explicit(ids, labels), tiny(ids, labels), atol=2e-5, rtol=0)


def test_tokens_that_do_not_divide_into_groups_are_refused(tiny: PAR) -> None:
    with pytest.raises(ValueError, match="30 is not 4 single tokens plus groups of 4"):
        generate(tiny, torch.tensor([1]), argmax, 1.0, max_new_tokens=30)
    with pytest.raises(ValueError, match="block_size: 36"):
        PAR(64, 2, 4, 64, 36, 15, 16, 10)


def test_top_k_and_top_p_keep_the_most_likely() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    kept = [
        truncate_logits(logits, k, p).isfinite().tolist()
        for k, p in ((2, 1.0), (0, 0.5), (0, 0.39), (3, 0.75))
    ]
    assert kept == [
        [False, True, False, True],
        [False, True, False, True],
        [False, True, False, False],
        [False, True, False, True],
    ]


@pytest.fixture(scope="module")
def small() -> PARGenerator:
    model = PARGenerator(SMALL)
    fill(model.transformer), fill(model.tokenizer)
    return model


def test_an_image_depends_on_its_seed_and_index_alone(small: PARGenerator) -> None:
    labels = torch.tensor([3, 1, 4, 1])
    index = torch.tensor([5, 9, 2, 6])
    settings = small.preset.samplers["official"]
    together = small.sample(labels, 7, index, settings)
    shuffled = small.sample(labels[[2, 0, 3, 1]], 7, index[[2, 0, 3, 1]], settings)
    assert torch.equal(together[[2, 0, 3, 1]], shuffled)
    assert not torch.equal(together[1], together[3])  # same class, other index


def test_generator_decodes_encodes_and_scores(small: PARGenerator) -> None:
    tokens = torch.arange(72).view(2, 36) % 64
    labels = torch.tensor([2, 8])
    images = small.decode(tokens)
    assert images.shape == (2, 3, 12, 12)
    assert small.decode(tokens, size=8).shape == (2, 3, 8, 8)
    raster = small.tokenizer.encode(images * 2 - 1)
    assert torch.equal(small.encode(images), small.transformer.layout.from_raster(raster))
    scores = small.log_probs(tokens, labels)
    assert scores.shape == (*small.targets(tokens).shape, 64)
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(2, 36))


@torch.no_grad()
def test_linears_and_products_get_the_positions_of_their_tokens(tiny: PAR) -> None:
    calls: list[Tensor] = []
    linear = tiny.layers[1].feed_forward.w2
    product = tiny.layers[1].attention.pv
    product.fused = False
    handles = [
        linear.register_forward_pre_hook(lambda m, args: calls.append(args[1])),
        product.register_forward_pre_hook(lambda m, args: calls.append(args[2])),
    ]
    generate(tiny, torch.tensor([1]), argmax, 1.5)
    expected = [torch.arange(*step) for step in ((0, 1), (1, 2), (2, 3), (3, 4), (4, 8), (8, 12))]
    for handle in handles:
        handle.remove()
    product.fused = True
    assert [c.tolist() for c in calls[:12]] == [e.tolist() for e in expected for _ in range(2)]


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [name for name, preset in PRESETS.items() if preset.weights.shipped]
)
def test_twins_are_small_and_do_what_the_released_models_do(name: str) -> None:
    twin = PARGenerator(PRESETS[name])
    model = fill(twin.transformer)
    tokenizer = fill(twin.tokenizer)
    assert sum(p.numel() for p in model.parameters()) == 2_856_000 <= 3_300_000
    assert sum(p.numel() for p in tokenizer.parameters()) == 445_899 <= 550_000
    keys = set(released_keys("par-XL-4x"))
    assert {k for k in keys if not k.startswith("layers.") or int(k.split(".")[1]) < 6} == set(
        model.state_dict()
    )
    assert model.layout.tokens == twin.preset.tokens == 64
    assert (model.layout.ar, model.layout.spe, twin.adapter.sinks) == (4, 3, 8)
    labels = torch.tensor([3, 9])
    index = torch.tensor([4, 7])
    seen = []
    ids = generate(model, labels, lambda p, step: seen.append(p) or p.argmax(-1), 1.0)
    assert len(seen) == 4 + 60 // 4
    torch.testing.assert_close(
        torch.cat(seen, dim=1).log(), twin.log_probs(ids, labels), atol=2e-5, rtol=2e-5
    )
    settings = twin.preset.samplers["official"]
    tokens = twin.sample(labels, 1, index, settings)
    assert torch.equal(tokens.flip(0), twin.sample(labels.flip(0), 1, index.flip(0), settings))
    images = twin.decode(tokens)
    assert images.shape == (2, 3, 32, 32)
    assert twin.encode(images).shape == (2, 64)


def test_adapter_groups_tokens_by_how_they_are_generated() -> None:
    with torch.device("meta"):
        four, sixteen = (PARGenerator(PRESETS[n]).adapter for n in ("par_xl_4x", "par_3b_16x"))
    assert (four.sinks, sixteen.sinks) == (8, 32)
    assert four.sites[0].segments.starts == (0, 1, 2, 3, 4, 8)
    assert sixteen.sites[0].segments.starts == (*range(17), 32)
    assert [s.kind for s in four.sites[:5]] == ["qkv", "proj", "fc1", "fc2", "qkv"]
    assert four.sites[2].consumers == ("layers.0.feed_forward.w1", "layers.0.feed_forward.w3")
    assert four.sites[-1].name == "output"
    assert four.last_block == "layers.35"
    for adapter in (four, sixteen):
        modules = dict(adapter.model.named_modules())
        assert {c for s in adapter.sites for c in s.consumers} | {
            s.fold.norm if isinstance(s.fold, NormFold) else s.fold.linear
            for s in adapter.sites
            if s.fold
        } | {m.name for m in adapter.matmuls} <= set(modules)


@torch.no_grad()
def test_adapter_feeds_what_a_decoder_feeds(small: PARGenerator) -> None:
    tokens = torch.arange(72).view(2, 36) % 64
    labels = torch.tensor([2, 8])
    conditional, unconditional = small.adapter.rows(tokens, labels)
    assert conditional["ids"].shape == (2, 32)
    assert unconditional["labels"].tolist() == [10, 10]
    visited: list[str] = []
    names = {m: n for n, m in small.transformer.named_modules()}
    first = {s.consumers[0] for s in small.adapter.sites}
    handles = [
        m.register_forward_pre_hook(lambda m, a: visited.append(names[m]))
        for m, n in names.items()
        if n in first
    ]
    assert small.adapter.forward(conditional).shape == (2, 36, 64)
    for handle in handles:
        handle.remove()
    assert visited == [s.name for s in small.adapter.sites]


@torch.no_grad()
def test_scale_and_shift_fold_exactly_into_the_norms(tiny: PAR) -> None:
    plain = copy.deepcopy(tiny).double()
    folded = copy.deepcopy(plain)
    modules = dict(folded.named_modules())
    for n, site in enumerate(PARAdapter(folded).sites):
        if not isinstance(site.fold, NormFold):
            continue
        norm = modules[site.fold.norm]
        scale = made_up(f"scale{n}", norm.weight.shape).double().exp()
        shift = made_up(f"shift{n}", norm.weight.shape).double()
        norm.weight /= scale  # x' = (x - shift) / scale
        norm.bias = -shift / scale
        for name in site.consumers:  # b' = W shift, W' = W diag(scale)
            linear = modules[name]
            linear.bias = torch.nn.Parameter(linear.weight @ shift)
            linear.weight *= scale
    assert not any(k.endswith("norm.bias") for k in folded.state_dict())
    ids = torch.arange(32)[None]
    labels = torch.tensor([4])
    torch.testing.assert_close(folded(ids, labels), plain(ids, labels), atol=1e-12, rtol=1e-12)


@pytest.mark.slow
@torch.no_grad()
def test_gpt_b_and_the_full_tokenizer(guided: list[Tensor]) -> None:
    golden = Golden("par_GPT-B_4x")
    model = fill(PAR(768, 12, 12, 16384, 576, 3, 4, 1000))
    run_teacher_forced(model, golden, 1e-4)
    ids = generate(model, golden["cond"], argmax, 1.5, top_k=1)
    golden.check("greedy_cfg_seq", ids)
    golden.check("greedy_cfg_seq_raster", model.layout.to_raster(ids))
    golden.check("greedy_cfg_logits_after_cfg", torch.cat(guided, dim=1), 1e-4)
    images = made_up("par-B-4x:img", (1, 3, 384, 384)) * 0.5
    run_tokenizer(
        fill(VQModel(**PRESETS["par_xl_4x"].tokenizer)), golden, images.clamp(-1, 1), 1e-4
    )


@pytest.mark.slow
@torch.no_grad()
def test_par_xl_4x(guided: list[Tensor]) -> None:
    golden = Golden("par_XL_4x")
    model = fill(PAR(**PRESETS["par_xl_4x"].transformer))
    run_teacher_forced(model, golden, 1e-4)
    ids = generate(model, golden["cond"], argmax, 1.5, top_k=1, max_new_tokens=36)
    golden.check("greedy_cfg_first36_seq", ids)
    golden.check("greedy_cfg_first36_logits_after_cfg", torch.cat(guided, dim=1), 1e-4)


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [
        (1280, 256, None, 3584),  # PAR-XL
        (3200, 256, None, 8704),  # PAR-3B
        (1280, 256, 1.0, 3584),
        (1280, 256, 1.3, 4608),  # 1.3 * 3413 = 4436.9, of which 18 * 256 is the next multiple
        (64, 32, 0.5, 96),  # 0.5 * 170 = 85
        (64, 32, 1.5, 256),  # 255
    ],
)
def test_the_feed_forward_width_is_llamas(
    dim: int, multiple_of: int, multiplier: float | None, width: int
) -> None:
    assert feed_forward_width(dim, multiple_of, multiplier) == width


@pytest.mark.parametrize("multiplier", [None, 1.5])
def test_a_model_takes_the_multiplier_of_its_feed_forward_width(multiplier: float | None) -> None:
    model = PAR(64, 1, 4, 64, 36, 3, 4, 10, multiple_of=32, ffn_dim_multiplier=multiplier)
    assert model.layers[0].feed_forward.w1.out_features == (192 if multiplier is None else 256)
