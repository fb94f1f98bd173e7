"""What the design promises of MAR: sampling, densities, and how it is described for
quantization."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.layers import Linear
from models.mar.diffusion import cosine_diffusion, gaussian_kl
from models.mar.generator import MARGenerator
from models.mar.presets import PRESETS
from models.preset import Preset
from ptq import folding
from ptq.types import InputTransform
from tests.models.mar_cases import TINY_A
from tests.reference import fill, made_up

LABELS = torch.tensor([3, 1, 4, 1, 9, 2])

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def generator() -> MARGenerator:
    preset = Preset(
        name="mar_test",
        family="mar",
        transformer=TINY_A.mar,
        tokenizer=TINY_A.vae | {"ch_mult": (1, 1, 1, 2, 2)},
        weights=PRESETS["mar_b"].weights,
        tokenizer_weights=PRESETS["mar_b"].tokenizer_weights,
        samplers={},
        image_size=64,
        tokens=16,
        classes=10,
    )
    model = MARGenerator(preset)
    fill(model.transformer), fill(model.tokenizer)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return made_up("test:tokens", (6, 16, 4))


def test_an_image_depends_on_its_seed_and_index_alone(generator: MARGenerator) -> None:
    index = torch.tensor([5, 9, 2, 6, 2**33, 1])
    other = torch.tensor([2, 0, 3, 1, 5, 4])
    settings = dict(num_iter=5, cfg=2.0, diffusion_steps="5")
    together = generator.sample(LABELS, 7, index, settings)
    assert torch.equal(together[other], generator.sample(LABELS[other], 7, index[other], settings))
    assert not torch.equal(together[1], together[3])  # same class, other index
    assert not torch.equal(together, generator.sample(LABELS, 8, index, settings))


def test_sampling_under_autocast_keeps_tokens_in_full_precision(generator: MARGenerator) -> None:
    settings = dict(num_iter=3, cfg=2.0, diffusion_steps="5")
    exact = generator.sample(LABELS, 0, torch.arange(6), settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = generator.sample(LABELS, 0, torch.arange(6), settings)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.2 * exact.abs().max()


def test_noise_is_fresh_in_every_iteration_and_diffusion_step(
    generator: MARGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(
        "models.decoding.philox.normal",
        lambda seed, index, step, n: steps.append(step) or torch.zeros(len(index), n),
    )
    generator.sample(LABELS, 0, torch.arange(6), dict(num_iter=4, cfg=1.0, diffusion_steps="1000"))
    assert len(steps) == len(set(steps)) == 4 * 1001
    assert 0 not in steps  # the orders'


def test_images_to_tokens_and_back(generator: MARGenerator) -> None:
    images = made_up("test:images", (2, 3, 64, 64)).clamp(0, 1)
    tokens = generator.encode(images)
    assert tokens.shape == (2, 16, 4)
    latents = generator.transformer.unpatchify(tokens) / 0.2325  # the authors' scale
    torch.testing.assert_close(latents, generator.tokenizer.encode(2 * images - 1).mean)
    decoded = generator.decode(tokens)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1


def test_explicit_attention_equals_fused(generator: MARGenerator, tokens: Tensor) -> None:
    model = generator.transformer
    mask = TINY_A.golden["mask"].bool()[:1].expand(6, -1)
    fused = model(tokens, mask, LABELS)
    for block in (*model.encoder_blocks, *model.decoder_blocks):
        block.attn.qk.fused = False
    torch.testing.assert_close(model(tokens, mask, LABELS), fused)


def test_rows_that_hide_different_numbers_of_tokens_run_as_if_alone(
    generator: MARGenerator, tokens: Tensor
) -> None:
    model = generator.transformer
    mask = torch.arange(16) < torch.tensor([16, 3, 9, 3, 1, 15])[:, None]
    alone = [model(tokens[i : i + 1], mask[i : i + 1], LABELS[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(model(tokens, mask, LABELS), torch.cat(alone))


def test_hidden_tokens_do_not_leak(generator: MARGenerator, tokens: Tensor) -> None:
    mask = torch.arange(16).expand(6, -1) % 3 == 0
    hidden_changed = tokens.masked_fill(mask[..., None], 100.0)
    assert torch.equal(
        generator.transformer(tokens, mask, LABELS),
        generator.transformer(hidden_changed, mask, LABELS),
    )


def test_positions_are_slots_with_the_buffer_first(generator: MARGenerator, tokens: Tensor) -> None:
    model = generator.transformer
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args}))
    model(tokens, torch.arange(16).expand(6, -1) < 11, LABELS)  # 4 buffer tokens and 5 visible ones
    for name, (x, *rest) in seen.items():
        first = 4 if name == "z_proj" else 0
        assert torch.equal(rest[0], torch.arange(first, first + x.shape[1])), name
    assert seen["encoder_blocks.1.mlp.fc2"][0].shape[1] == 9
    assert seen["decoder_blocks.1.mlp.fc2"][0].shape[1] == 20


def test_nll_is_the_diffusion_loss_of_the_hidden_tokens(
    generator: MARGenerator, tokens: Tensor
) -> None:
    draws = generator.draws(3, torch.arange(6))
    model = generator.transformer
    diffusion = cosine_diffusion()
    nll = generator.density(tokens, LABELS, draws).loss
    z = model(tokens, draws.mask, LABELS)
    for i, j in draws.mask.nonzero()[::7].tolist():
        clean = tokens[i, j][None]
        t = draws.t[i, j][None]
        noise = draws.noise[i, j][None]
        x = diffusion.q_sample(clean, t, noise)
        error, bound = diffusion.losses(model.diffloss.net(x, t, z[i, j][None]), clean, x, t, noise)
        torch.testing.assert_close(nll[i, j], (error + bound)[0], rtol=1e-4, atol=1e-4)
    assert nll[~draws.mask].abs().max() == 0


def test_loss_of_several_noises_is_that_of_each(generator: MARGenerator, tokens: Tensor) -> None:
    model = generator.transformer
    draws = [generator.draws(s, torch.arange(6)) for s in range(3)]
    mask = draws[0].mask
    t = torch.stack([d.t for d in draws])
    noise = torch.stack([d.noise for d in draws])
    together = model.loss(tokens, mask, LABELS, t, noise)
    apart = torch.stack([model.loss(tokens, mask, LABELS, d.t, d.noise) for d in draws])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_loss_trains_every_parameter_and_the_bound_only_the_variance(
    generator: MARGenerator, tokens: Tensor
) -> None:
    draws = generator.draws(0, torch.arange(6))
    with torch.enable_grad():
        labels = torch.tensor([0, 1, 2, 3, 4, 10])
        generator.transformer.loss(
            tokens, draws.mask, labels, draws.t, draws.noise
        ).sum().backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all()
            for p in generator.transformer.parameters()
        )
        output = torch.randn(5, 8, requires_grad=True)
        t = torch.tensor([0, 1, 10, 500, 900])
        x = torch.randn(5, 4)
        cosine_diffusion().losses(output, x, x, t, x)[1].sum().backward()
        assert output.grad[:, :4].abs().max() == 0
        assert output.grad[:, 4:].abs().min() > 0


def test_loss_and_transitions_come_of_one_pass(generator: MARGenerator, tokens: Tensor) -> None:
    passes: list[Tensor] = []
    generator.transformer.register_forward_hook(lambda model, given, output: passes.append(output))
    density = generator.density(tokens, LABELS, generator.draws(3, torch.arange(6)))
    assert len(passes) == 1
    assert density.loss.shape == tokens.shape[:2]


def test_transitions_give_the_kl_between_two_models(
    generator: MARGenerator, tokens: Tensor
) -> None:
    draws = generator.draws(3, torch.arange(6))
    p = generator.density(tokens, LABELS, draws).transitions
    assert p.mean.shape == (int(draws.mask.sum()), 4)
    assert gaussian_kl(p, p).abs().max() == 0
    generator.transformer.diffloss.net.final_layer.linear.weight.mul_(1.01)
    q = generator.density(tokens, LABELS, draws).transitions
    kl = gaussian_kl(p, q).sum(-1)
    assert kl.min() >= 0
    assert kl.mean() > 0


def test_draws_hide_as_many_tokens_as_training_does(generator: MARGenerator) -> None:
    draws = generator.draws(0, torch.arange(4000))
    share = draws.mask.double().mean(dim=1)
    assert share.min() >= 0.7
    assert share.max() == 1
    # mean of the truncated normal, and rounding up
    assert abs(share.mean() - (0.874 + 0.5 / 16)) < 0.01
    assert (draws.t.min(), draws.t.max()) == (0, 999)
    one = generator.draws(0, torch.tensor([17]))
    assert torch.equal(one.mask[0], draws.mask[17])
    assert torch.equal(one.noise[0], draws.noise[17])


def test_adapter_lists_every_linear_once_in_forward_order(
    generator: MARGenerator, tokens: Tensor
) -> None:
    adapter = generator.adapter
    model = generator.transformer
    linears = {name for name, m in model.named_modules() if isinstance(m, Linear)}
    consumers = [name for site in adapter.sites for name in site.consumers]
    assert sorted(consumers) == sorted(linears)
    reached: list[str] = []
    for name in linears:
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, name=name: reached.append(name)
        )
    adapter.forward(adapter.rows(tokens, LABELS)[0])
    first = list(dict.fromkeys(reached))
    assert [name for name in first if name in {s.name for s in adapter.sites}] == [
        s.name for s in adapter.sites
    ]
    assert {s.kind for s in adapter.sites} == {"qkv", "proj", "fc1", "fc2", "embed", "diffusion"}
    for site in adapter.sites:
        in_blocks = site.kind in ("qkv", "proj", "fc1", "fc2") or site.name == "decoder_embed"
        assert (len(site.segments), site.sinks) == ((5, 4) if in_blocks else (1, 0)), site.name
    assert len(adapter.matmuls) == 2 * 4


def test_folding_into_every_site_that_can_absorb_changes_nothing(
    generator: MARGenerator, tokens: Tensor
) -> None:
    adapter = generator.adapter
    model = generator.transformer.double()
    rows = adapter.rows(tokens.double(), LABELS)[0]
    before = adapter.forward(rows)
    sites = [site for site in adapter.sites if site.fold is not None]
    # qkv, proj, fc1 of each block, decoder_embed, diffusion blocks and final layer
    assert len(sites) == 3 * 4 + 1 + 3
    for site in sites:
        channels = model.get_submodule(site.name).in_features
        scale = made_up(site.name + ":scale", (channels,)).double().exp()
        shift = made_up(site.name, (channels,))
        folding.apply_transform(model, site, InputTransform(scale, shift.double()))
    torch.testing.assert_close(
        adapter.forward(rows), before, rtol=1e-12, atol=1e-12 * float(before.abs().max())
    )


def test_calibration_rows_go_through_the_sampling_run(generator: MARGenerator) -> None:
    adapter = generator.adapter
    many = made_up("test:many", (64, 16, 4))
    labels = torch.arange(64) % 10
    cond, uncond = adapter.rows(many, labels)
    visible = (~cond["mask"]).sum(dim=1)
    for half in (visible[:32], visible[32:]):  # any stretch of rows holds early and late states
        assert (half.min(), half.max()) == (0, 15)
    assert torch.equal(cond["labels"], labels)
    assert (uncond["labels"] == 10).all()
    assert all(torch.equal(cond[k], uncond[k]) for k in cond if k != "labels")
    output = adapter.forward(cond)
    assert output.shape == (64, 16, 8)
    assert torch.equal(output.abs().sum(dim=-1) > 0, cond["mask"])
    half = adapter.forward({k: v[32:] for k, v in cond.items()})
    torch.testing.assert_close(half, output[32:])
