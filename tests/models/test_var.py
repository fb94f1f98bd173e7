"""VAR and its VQVAE against reference outputs of FoundationVision/VAR, and what the design promises
of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Linear
from models.var.adapter import VARAdapter, fuse_qkv_bias
from models.var.generator import VARGenerator
from models.var.presets import PRESETS
from models.var.sampler import Draw, Noise, generate, guidance_at, truncate_logits
from models.var.tokenizer import VQVAE, MultiScaleQuantizer, nearest_tick
from models.var.transformer import VAR
from ptq.types import AdaLNFold
from tests.reference import GOLDEN, Golden, fill, made_up, made_up_ints, released_keys

TINY = {  # reference file: tag of its inputs, sizes of both modules, transformer, tokenizer
    "var_tiny_a": (
        "var-tiny-a",
        dict(vocab_size=64, z_channels=8, patch_nums=(1, 2, 3, 4)),
        dict(depth=2, embed_dim=64, num_heads=4, num_classes=10),
        dict(ch=32),
    ),
    "var_tiny_b_saln": (
        "var-tiny-b",
        dict(vocab_size=96, z_channels=16, patch_nums=(1, 2, 3, 4, 5, 6)),
        dict(depth=2, embed_dim=64, num_heads=2, num_classes=10, shared_aln=True),
        dict(ch=32),
    ),
    "var_tiny_c_nol2norm": (
        "var-tiny-c",
        dict(vocab_size=50, z_channels=8, patch_nums=(1, 2, 4)),
        dict(depth=3, embed_dim=48, num_heads=3, num_classes=10, mlp_ratio=3, attn_l2_norm=False),
        dict(ch=32, share_quant_resi=1),
    ),
}

pytestmark = pytest.mark.usefixtures("no_grad")


@dataclass
class Reference:
    generator: VARGenerator
    golden: Golden
    tag: str
    tolerance: float = 2e-5

    def __post_init__(self) -> None:
        self.model, self.tokenizer = (
            fill(self.generator.transformer),
            fill(self.generator.tokenizer),
        )


def reference(file: str) -> Reference:
    tag, sizes, transformer, tokenizer = TINY[file]
    preset = replace(
        PRESETS["var_d16"], transformer={**sizes, **transformer}, tokenizer={**sizes, **tokenizer}
    )
    return Reference(VARGenerator(preset), Golden(file), tag)


@pytest.fixture(scope="module", params=TINY)
def tiny(request: pytest.FixtureRequest) -> Reference:
    return reference(request.param)


def official_draws(seed: int) -> tuple[Draw, Noise]:
    """Ids and Gumbel noise from one generator, called as the released sampler does."""
    rng = torch.Generator().manual_seed(seed)
    return (
        lambda p, s: torch.multinomial(p.flatten(0, 1), 1, replacement=True, generator=rng).view(
            p.shape[:2]
        ),
        lambda logits, s: -torch.empty_like(logits).exponential_(generator=rng).log(),
    )


def hooked(
    modules: Iterable[nn.Module], call: Callable[[], object]
) -> list[tuple[nn.Module, tuple, Tensor]]:
    """(module, arguments, output) of `modules` in the order in which `call` runs them."""
    calls: list[tuple[nn.Module, tuple, Tensor]] = []
    handles = [m.register_forward_hook(lambda *seen: calls.append(seen)) for m in modules]
    call()
    for handle in handles:
        handle.remove()
    return calls


def sample_greedily(
    model: VAR, tokenizer: VQVAE, labels: Tensor, cfg: float = 0
) -> tuple[Tensor, Tensor]:
    """Tokens (B, L) and their guided logits (B, L, V)."""
    drawn: list[Tensor] = []
    args = model, tokenizer.quantize, labels, lambda p, s: p.argmax(dim=-1), cfg, 1, 0.0
    scales = [out for _, _, out in hooked([model.head], lambda: drawn.append(generate(*args)[0]))]
    for s, raw in enumerate(scales):
        if cfg:
            t = guidance_at(s, len(scales), cfg)
            scales[s] = (1 + t) * raw[: len(labels)] - t * raw[len(labels) :]
    return drawn[0], torch.cat(scales, dim=1)


def linears(model: nn.Module) -> dict[nn.Module, str]:
    return {m: name for name, m in model.named_modules() if isinstance(m, Linear)}


def close(value: Tensor, expected: Tensor) -> None:
    """Equal within 2e-5 of the absolute maximum."""
    torch.testing.assert_close(value, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def to_unit(images: Tensor) -> Tensor:
    return (images.clamp(-1, 1) + 1) / 2


@pytest.mark.parametrize(
    "name", [name for name, preset in PRESETS.items() if not preset.weights.shipped]
)
def test_state_dicts_match_the_released_files_key_for_key(name: str) -> None:
    with torch.device("meta"):
        model = VARGenerator(PRESETS[name])
    for part, file in (
        ("transformer", name.replace("_", "-")),
        ("tokenizer", "var-vae_ch160v4096z32"),
    ):
        module = getattr(model, part)
        state = {k: list(v.shape) for k, v in module.state_dict().items()}
        assert list(state.items()) == list(released_keys(file).items())
        stored = json.loads((GOLDEN / "keys" / f"{file}.json").read_text())["meta"][
            "persistent_buffers"
        ]
        buffers = {
            k: str(v.dtype).removeprefix("torch.") for k, v in module.named_buffers() if k in state
        }
        assert buffers == stored
    assert model.transformer.length == model.preset.tokens == model.transformer.spans[-1][1]


def test_code_counts_of_another_number_of_scales_do_not_hinder_loading() -> None:
    tokenizer = reference("var_tiny_a").tokenizer
    tokenizer.load_state_dict(
        {**tokenizer.state_dict(), "quantize.ema_vocab_hit_SV": torch.ones(7, 64)}
    )
    assert tokenizer.quantize.ema_vocab_hit_SV.shape == (4, 64)


def run_teacher_forced(r: Reference) -> None:
    inputs = r.tokenizer.quantize.teacher_inputs(r.golden["gt_idx"])
    r.golden.check("tf_input", inputs, r.tolerance)
    *blocks, logits = hooked(
        [*r.model.blocks, r.model.head], lambda: r.model(r.golden["labels"], inputs)
    )
    for i, (_, _, output) in enumerate(blocks):
        if f"tf_block{i}_out" in r.golden:
            r.golden.check(f"tf_block{i}_out", output, r.tolerance)
    r.golden.check("tf_logits", logits[2], r.tolerance)
    r.golden.check("tf_logits_argmax", logits[2].argmax(dim=-1))


def run_tokenizer(r: Reference) -> None:
    features = r.tokenizer.quantize.features(r.golden["gt_idx"])[-1]
    r.golden.check("decode_gt_fhat", features, r.tolerance)
    r.golden.check("decode_gt_img_before_clamp", r.tokenizer.decode_features(features), r.tolerance)
    r.golden.check("decode_gt_img", r.tokenizer.decode(r.golden["gt_idx"]), r.tolerance)
    side = 16 * int(r.golden["patch_nums"][-1])
    images = (made_up(f"{r.tag}:img", (len(r.golden["labels"]), 3, side, side)) * 0.5).clamp(-1, 1)
    r.golden.check("encode_f", r.tokenizer.encode_features(images), r.tolerance)
    ids = r.tokenizer.encode(images)
    r.golden.check("encode_idx", ids)
    r.golden.check("encode_then_decode_img", r.tokenizer.decode(ids), r.tolerance)


def run_greedy(r: Reference) -> None:
    ids, logits = sample_greedily(
        r.model, r.tokenizer, r.golden["labels"], float(r.golden["greedy_cfg"])
    )
    r.golden.check("greedy_idx", ids)
    r.golden.check("greedy_logits", logits, r.tolerance)
    r.golden.check("greedy_img", to_unit(r.tokenizer.decode(ids)), r.tolerance)


def run_seeded(r: Reference) -> None:
    seed, cfg, top_k, top_p = (
        round(x, 4) for x in r.golden["seeded_params_g_seed_cfg_topk_topp"].tolist()
    )
    draw, _ = official_draws(int(seed))
    ids, features = generate(
        r.model, r.tokenizer.quantize, r.golden["labels"], draw, cfg, int(top_k), top_p
    )
    r.golden.check("seeded_idx", ids)
    r.golden.check("seeded_img", to_unit(r.tokenizer.decode_features(features)), r.tolerance)


RUNS = (run_teacher_forced, run_tokenizer, run_greedy, run_seeded)


@pytest.mark.parametrize("run", RUNS)
def test_outputs_equal_the_official_ones(tiny: Reference, run: Callable[[Reference], None]) -> None:
    run(tiny)


def test_more_smooth_sampling() -> None:
    r = reference("var_tiny_a")
    draw, noise = official_draws(7)
    ids, features = generate(
        r.model, r.tokenizer.quantize, r.golden["labels"], draw, 1.5, 8, 0.0, True, noise
    )
    r.golden.check("smooth_idx", ids)
    r.golden.check("smooth_img", to_unit(r.tokenizer.decode_features(features)))


@pytest.mark.slow
def test_var_d16_and_its_full_tokenizer() -> None:
    r = Reference(VARGenerator(PRESETS["var_d16"]), Golden("var_d16"), "var-d16", 1e-4)
    for run in RUNS:
        run(r)


def test_scales_share_convolutions_as_the_ticks_say() -> None:
    # at 2/9 and 7/9 two ticks are equally near but for rounding, which the released weights were
    # trained with
    assert [nearest_tick(s / 9, 4) for s in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [nearest_tick(s / 2, 2) for s in range(3)] == [0, 0, 1]  # equally near: the lower one
    assert [nearest_tick(s / 6, 7) for s in range(7)] == list(range(7))


@pytest.mark.parametrize(
    ("share", "keys"),
    [
        (0, ["0", "1", "2"]),
        (1, ["qresi"]),
        (2, ["qresi_ls.0", "qresi_ls.1"]),
        (4, [f"qresi_ls.{i}" for i in range(4)]),
    ],
)
def test_every_way_of_sharing_convolutions(share: int, keys: list[str]) -> None:
    quantizer = fill(MultiScaleQuantizer(20, 6, (1, 3, 5), share, 0.5, unit_codes=False))
    assert [k for k in quantizer.quant_resi.state_dict() if k.endswith("weight")] == [
        f"{k}.weight" for k in keys
    ]
    ids = made_up_ints("ids", (2, 35), 20)
    maps = quantizer.features(ids)
    assert len({quantizer.phi(s) for s in range(3)}) == min(len(keys), 3)
    h = F.interpolate(
        quantizer.embedding(ids[:, 1:10]).view(2, 3, 3, 6).permute(0, 3, 1, 2),
        (5, 5),
        mode="bicubic",
    )
    expected = (
        maps[0]
        + 0.5 * h
        + 0.5 * F.conv2d(h, quantizer.phi(1).weight, quantizer.phi(1).bias, padding=1)
    )
    torch.testing.assert_close(maps[1], expected)
    assert torch.equal(quantizer.teacher_inputs(ids), quantizer.teacher_inputs(ids[:, :10]))


def test_without_convolutions_coding_takes_the_nearest_codes() -> None:
    quantizer = fill(MultiScaleQuantizer(20, 6, (2,), 4, 0.0, unit_codes=False))
    assert not list(quantizer.quant_resi.parameters())
    ids = made_up_ints("ids", (3, 4), 20)
    assert torch.equal(quantizer(quantizer.features(ids)[-1]), ids)
    assert quantizer.teacher_inputs(ids).shape == (3, 0, 6)
    quantizer.unit_codes = True
    assert torch.equal(quantizer(3 * quantizer.features(ids)[-1]), ids)


def test_cached_scale_by_scale_equals_teacher_forced(tiny: Reference) -> None:
    labels = tiny.golden["labels"]
    ids, cached = sample_greedily(tiny.model, tiny.tokenizer, labels)
    close(cached, tiny.model(labels, tiny.tokenizer.quantize.teacher_inputs(ids)))


def test_the_first_scale_may_be_larger_than_one_token() -> None:
    sizes = dict(vocab_size=30, z_channels=4, patch_nums=(2, 3, 5))
    model = fill(VAR(depth=2, embed_dim=24, num_heads=3, num_classes=4, mlp_ratio=2.7, **sizes))
    tokenizer = fill(VQVAE(ch=32, share_quant_resi=0, ch_mult=(1, 2), num_res_blocks=1, **sizes))
    labels = torch.tensor([1, 3])
    ids, cached = sample_greedily(model, tokenizer, labels)
    close(cached, model(labels, tokenizer.quantize.teacher_inputs(ids)))
    assert (model.start_length, model.blocks[0].ffn.fc1.out_features) == (4, 65)


def test_a_scale_does_not_see_the_next(tiny: Reference) -> None:
    quantizer = tiny.tokenizer.quantize
    spans = tiny.model.spans
    labels = tiny.golden["labels"]
    inputs = quantizer.teacher_inputs(tiny.golden["gt_idx"])
    end = spans[-2][1]
    # inputs begin at position 1
    changed = torch.cat((inputs[:, : end - 1], inputs[:, end - 1 :] + 1), dim=1)
    before = tiny.model(labels, inputs)
    after = tiny.model(labels, changed)
    assert torch.equal(before[:, :end], after[:, :end])
    assert not torch.equal(before[:, end:], after[:, end:])
    close(tiny.model(labels, inputs[:, : end - 1]), before[:, :end])


def test_explicit_products_equal_the_fused_attention(tiny: Reference) -> None:
    args = tiny.golden["labels"], tiny.tokenizer.quantize.teacher_inputs(tiny.golden["gt_idx"])
    fused = tiny.model(*args)
    for block in tiny.model.blocks:
        block.attn.qk.fused = False
    explicit = tiny.model(*args)
    for block in tiny.model.blocks:
        block.attn.qk.fused = True
    close(explicit, fused)


def test_layers_are_told_absolute_positions(tiny: Reference) -> None:
    names = linears(tiny.model)
    calls = hooked(
        names, lambda: sample_greedily(tiny.model, tiny.tokenizer, tiny.golden["labels"], 1.5)
    )
    for module, name in names.items():
        seen = torch.cat([args[1] for m, args, _ in calls if m is module]).tolist()
        # the class vector of AdaLN has no position, and is projected once for all scales
        assert seen == ([0] if "ada_lin" in name else list(range(tiny.model.length)))


TWINS = [name for name, preset in PRESETS.items() if preset.dataset == "fashion_mnist"]


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_small_and_do_what_the_released_models_do(name: str) -> None:
    generator = VARGenerator(PRESETS[name])
    model = fill(generator.transformer)
    tokenizer = fill(generator.tokenizer)
    assert sum(p.numel() for p in model.parameters()) == 2_938_622 <= 3_300_000
    assert sum(p.numel() for p in tokenizer.parameters()) == 454_131 <= 550_000
    assert model.length == generator.preset.tokens == 130
    keys = released_keys("var-d16")
    assert {k for k in model.state_dict() if "blocks" not in k} == {
        k for k in keys if "blocks" not in k
    }
    assert {k for k in model.state_dict() if "blocks.5." in k} == {
        k for k in keys if "blocks.5." in k
    }
    labels = torch.tensor([3, 9])
    index = torch.tensor([4, 7])
    order = [1, 0]
    ids, cached = sample_greedily(model, tokenizer, labels)
    close(cached, model(labels, tokenizer.quantize.teacher_inputs(ids)))
    settings = generator.preset.samplers["official"]
    tokens = generator.sample(labels, 1, index, settings)
    assert torch.equal(tokens[order], generator.sample(labels[order], 1, index[order], settings))
    images = generator.decode(tokens)
    assert images.shape == (2, 3, 32, 32)
    assert generator.encode(images).shape == (2, 130)


def test_truncation_keeps_the_likely_tokens() -> None:
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()[None, None, [3, 0, 4, 2, 1]]

    def kept(top_k: int, top_p: float) -> list[int]:
        return truncate_logits(logits, top_k, top_p).isfinite().nonzero()[:, -1].tolist()

    assert kept(0, 0.0) == kept(9, 0.0) == [0, 1, 2, 3, 4]
    assert kept(2, 0.0) == [1, 4]
    assert kept(0, 0.6) == [1, 4]
    assert kept(0, 1e-6) == [1]
    assert kept(2, 0.7) == [1]  # 0.2 is 2/7 of what top_k left, and the tail may hold 0.3


def test_an_image_depends_on_its_seed_and_index_alone() -> None:
    generator = reference("var_tiny_a").generator
    settings = PRESETS["var_d16"].samplers["official"]
    labels = torch.tensor([3, 1, 4, 1])
    index = torch.tensor([5, 9, 2, 6])
    order = [2, 0, 3, 1]
    together = generator.sample(labels, 7, index, settings)
    assert torch.equal(together[order], generator.sample(labels[order], 7, index[order], settings))
    assert not torch.equal(together[1], together[3])  # same class, other index
    assert not torch.equal(together, generator.sample(labels, 8, index, settings))
    smooth = {**settings, "more_smooth": True}
    images = generator.sample_images(labels, 7, index, smooth)
    torch.testing.assert_close(
        images[order], generator.sample_images(labels[order], 7, index[order], smooth)
    )
    with pytest.raises(ValueError, match="more_smooth"):
        generator.sample(labels, 7, index, smooth)


def test_generator_interface() -> None:
    generator = reference("var_tiny_a").generator
    labels = torch.tensor([3, 1])
    index = torch.tensor([0, 1])
    settings = generator.preset.samplers["ptq4arvg"]
    tokens = generator.sample(labels, 0, index, settings)
    images = generator.decode(tokens)
    assert images.shape == (2, 3, 64, 64)
    assert 0 <= images.min() < images.max() <= 1
    torch.testing.assert_close(generator.sample_images(labels, 0, index, settings), images)
    assert generator.encode(images).shape == tokens.shape == (2, 30)
    torch.testing.assert_close(generator.log_probs(tokens, labels).exp().sum(-1), torch.ones(2, 30))
    assert torch.equal(generator.targets(tokens), tokens)


def test_sites_are_the_linears_in_forward_order(tiny: Reference) -> None:
    adapter = VARAdapter(tiny.model, tiny.tokenizer.quantize)
    names = linears(tiny.model)
    cond, uncond = adapter.rows(tiny.golden["gt_idx"], tiny.golden["labels"])
    calls = hooked(names, lambda: adapter.forward(cond))
    assert [(s.name, s.consumers) for s in adapter.sites] == [
        (names[m], (names[m],)) for m, _, _ in calls
    ]
    tiny.golden.check("tf_logits", calls[-1][2])
    assert not torch.equal(adapter.forward(uncond), calls[-1][2])
    kinds = {s.kind: s for s in adapter.sites}
    assert (
        kinds["qkv"].segments.starts
        == kinds["fc1"].segments.starts
        == tuple(b for b, _ in tiny.model.spans)
    )
    assert kinds["proj"].segments.index(torch.arange(4)).tolist() == [0, 1, 1, 1]
    assert len(kinds["adaln"].segments) == len(kinds["head"].segments) == 1
    assert {m.name for m in adapter.matmuls} | {adapter.last_block} <= {
        name for name, _ in tiny.model.named_modules()
    }


@pytest.mark.parametrize("file", TINY)
def test_folds_and_the_fused_bias_leave_the_function_as_it_was(file: str) -> None:
    """In fp64: x' = (x - shift) / scale by the fold, undone in the consumer's weight and bias."""
    r = reference(file)
    model = r.model.double()
    adapter = VARAdapter(r.model, r.tokenizer.double().quantize)
    rows, _ = adapter.rows(r.golden["gt_idx"], r.golden["labels"])
    before = adapter.forward(rows)
    modules = dict(model.named_modules())
    fuse_qkv_bias(model)
    fuse_qkv_bias(model)
    folds = [s for s in adapter.sites if isinstance(s.fold, AdaLNFold)]
    # a shared projection can fold nothing of a block
    own = 0 if model.shared_ada_lin else len(model.blocks)
    assert [s.kind for s in folds] == [*["qkv", "fc1"] * own, "head"]
    for site in folds:
        scale, shift = (
            made_up(site.name + end, (model.head.in_features,)).double()
            for end in (":scale", ":shift")
        )
        scale = scale.exp()
        projection = modules[site.fold.linear]
        consumer = modules[site.name]
        for first, end in (site.fold.scale_rows, site.fold.shift_rows):
            projection.weight[first:end] /= scale[:, None]
            projection.bias[first:end] /= scale
        projection.bias[slice(*site.fold.shift_rows)] -= shift / scale
        model.get_buffer(site.fold.kappa).div_(scale)
        consumer.bias += consumer.weight @ shift
        consumer.weight *= scale
    error = (adapter.forward(rows) - before).abs().max() / before.abs().max()
    assert error < 1e-12
    assert all(not block.attn.qkv_bias().any() for block in model.blocks)


def test_enlarging_by_a_product_is_the_bicubic_one() -> None:
    quantizer = MultiScaleQuantizer(8, 5, (1, 2, 3, 7), 4, 0.5, False)
    for scale, side in enumerate(quantizer.patch_nums):
        codes = torch.randn(2, side * side, 5)
        close(quantizer.lift(codes, scale, exact=False), quantizer.lift(codes, scale))
