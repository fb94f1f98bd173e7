"""MAR and KL-16 against reference outputs of LTH14/mar, and what the design promises of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pytest
import torch
from torch import Tensor

from models.layers import Linear
from models.mar.diffloss import timestep_embedding
from models.mar.diffusion import cosine_diffusion, gaussian_kl, spaced_timesteps
from models.mar.generator import MARGenerator
from models.mar.presets import PRESETS
from models.mar.sampler import generate, guidance_at, mask_lengths
from models.mar.tokenizer import AutoencoderKL
from models.mar.transformer import MAR
from models.preset import Preset
from ptq import folding
from ptq.types import InputTransform
from tests.reference import Golden, fill, made_up, released_keys


@dataclass(frozen=True)
class Case:
    """One file of reference outputs: how its models were built, and its sampling sets by name.

    A set is (seed, iterations, guidance scale, schedule, temperature, labels or none).
    """

    file: str
    tag: str
    mar: dict
    steps: str
    sets: dict
    latents: tuple[int, ...]
    vae: dict | None = None
    image: tuple[int, ...] = ()
    tolerance: float = 2e-5

    @cached_property
    def golden(self) -> Golden:
        return Golden(self.file)

    @cached_property
    def model(self) -> MAR:
        return fill(MAR(**self.mar))

    @cached_property
    def z(self) -> Tensor:
        """The diffusion head's conditions for the stored mask."""
        return self.model(self.tokens, self.golden["mask"].bool(), self.golden["labels"])

    @property
    def tokens(self) -> Tensor:
        return self.model.patchify(made_up(f"{self.tag}:latent", self.latents))

    def made_up(self, name: str, rows: int) -> Tensor:
        return made_up(f"{self.tag}:{name}", (rows, self.model.token_embed_dim))

    def check(self, name: str, value: Tensor) -> None:
        self.golden.check(name, value, self.tolerance)


TINY_A = Case(
    "mar_tiny_a", "mar-tiny-a",
    dict(
        img_size=64, vae_stride=16, patch_size=1, encoder_embed_dim=48, encoder_depth=2, encoder_num_heads=4,
        decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4, vae_embed_dim=4, class_num=10, buffer_size=4,
        diffloss_d=2, diffloss_w=40,
    ),
    "10",
    {
        "cfg1": (5, 4, 1.0, "linear", 0.95, True), "cfg_linear": (6, 4, 2.9, "linear", 1.0, True),
        "cfg_const": (7, 3, 2.0, "constant", 1.0, True), "nolabel": (8, 4, 1.0, "linear", 1.0, False),
        "temp0": (9, 4, 2.9, "linear", 0.0, True),
    },
    (2, 4, 4, 4), dict(embed_dim=4, ch_mult=(1, 2, 2), ch=32, resolution=64), (2, 3, 32, 32),
)
TINY_B = Case(
    "mar_tiny_b_patch2", "mar-tiny-b",
    dict(
        img_size=128, vae_stride=16, patch_size=2, encoder_embed_dim=64, encoder_depth=1, encoder_num_heads=2,
        decoder_embed_dim=48, decoder_depth=3, decoder_num_heads=3, vae_embed_dim=4, class_num=5, buffer_size=3,
        diffloss_d=3, diffloss_w=32, mlp_ratio=3,
    ),
    "25", {"cfg1": (5, 4, 1.0, "linear", 0.95, True), "temp0": (9, 4, 2.9, "linear", 0.0, True)}, (1, 4, 8, 8),
)
MAR_B = Case(
    "mar_b", "mar-b", dict(PRESETS["mar_b"].transformer), "100", {}, (1, 16, 16, 16),
    dict(PRESETS["mar_b"].tokenizer), (1, 3, 256, 256), tolerance=1e-4,
)
MAR_B_10 = replace(
    MAR_B, file="mar_b_sample10", tag="mar-b-s10", steps="10", vae=None,
    sets={"cfg_linear": (3, 8, 2.9, "linear", 1.0, True), "temp0": (4, 4, 1.0, "linear", 0.0, True)},
)
CASES = [
    pytest.param(TINY_A, id="tiny_a"), pytest.param(TINY_B, id="tiny_b"),
    pytest.param(MAR_B, id="mar_b", marks=pytest.mark.slow),
    pytest.param(MAR_B_10, id="mar_b_sample10", marks=pytest.mark.slow),
]
SETS = [
    pytest.param(p.values[0], name, id=f"{p.id}-{name}", marks=p.marks) for p in CASES for name in p.values[0].sets
]


@pytest.fixture(autouse=True)
def _no_grad() -> None:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", PRESETS)
def test_state_dicts_match_the_released_files_key_for_key(name: str) -> None:
    with torch.device("meta"):
        model = MARGenerator(PRESETS[name])
    for part, file in {"transformer": name.replace("_", "-"), "tokenizer": "mar-kl16"}.items():
        state = {k: list(v.shape) for k, v in getattr(model, part).state_dict().items()}
        assert list(state.items()) == list(released_keys(file).items())


@pytest.mark.parametrize("case", CASES)
def test_encoder_and_decoder(case: Case) -> None:
    golden, model, tokens = case.golden, case.model, case.tokens
    case.check("patchify", tokens)
    assert torch.equal(model.patchify(model.unpatchify(tokens)), tokens)
    mask = golden["orders"].argsort(dim=1) < golden["num_masked"]
    assert torch.equal(mask, golden["mask"].bool())

    outputs: list[Tensor] = []
    blocks = [*model.encoder_blocks, *model.decoder_blocks]
    handles = [b.register_forward_hook(lambda m, a, out: outputs.append(out)) for b in blocks]
    encoded = model.encode(tokens, mask, golden["labels"])
    case.check("encoder_out", encoded)
    case.check("decoder_z", model.decode(model.pad(encoded, mask)))
    for handle in handles:
        handle.remove()
    names = {f"block{i}_out(enc0..{len(model.encoder_blocks) - 1},then dec)": out for i, out in enumerate(outputs)}
    checked = [case.check(name, out) for name, out in names.items() if name in golden]
    assert len(checked) == min(len(blocks), 4)

    nothing, no_class = torch.ones_like(mask), torch.full_like(golden["labels"], model.num_classes)
    encoded = model.encode(tokens, nothing, no_class)
    case.check("encoder_out_allmasked_fake", encoded)
    case.check("decoder_z_allmasked_fake", model.decode(model.pad(encoded, nothing)))


@pytest.mark.parametrize("case", CASES)
def test_denoising_network_and_training_losses(case: Case) -> None:
    golden, net, t = case.golden, case.model.diffloss.net, case.golden["net_t"]
    z, x = case.z.flatten(0, 1)[:8], case.made_up("xt", 8)
    golden.check("timestep_embedding_256", timestep_embedding(t), 5e-5)  # see its docstring
    case.check("time_embed", net.time_embed(t))
    case.check("net_out", net(x, t, z))
    case.check("net_out_cfg2.9", net.guided(x[:4], t, z, 2.9))

    diffusion, clean, noise = cosine_diffusion(), case.made_up("tgt", 8), case.made_up("noise", 8)
    noised = diffusion.q_sample(clean, t, noise)
    case.check("q_sample", noised)
    error, bound = diffusion.losses(net(noised, t, z), clean, noised, t, noise)
    case.check("train_mse", error)
    case.check("train_vb", bound)
    case.check("train_loss", error + bound)

    generation, t = cosine_diffusion(case.steps), golden["pmv_gen_index_t"]
    p = generation.p_mean_variance(net(x, generation.timestep_map[t], z), x, t)
    values = (("mean", p.mean), ("variance", p.log_variance.exp()), ("log_variance", p.log_variance),
              ("pred_xstart", p.x_start))
    for name, value in values:
        case.check(f"pmv_{name}", value)


def chain(case: Case, x: Tensor, z: Tensor, first: int, temperature: float, scale: float | None = None) -> Tensor:
    """The released chain from step `first` down; guided, both halves of x go through it, each with its own noise."""
    diffusion, net = cosine_diffusion(case.steps), case.model.diffloss.net
    for step in range(first, -1, -1):
        t = torch.full((len(x),), step)
        original = diffusion.timestep_map[t]
        output = net(x, original, z) if scale is None else net.guided(x[:len(x) // 2], original, z, scale)
        x = diffusion.p_sample(output, x, t, torch.randn(x.shape), temperature)
    return x


def official_noise(diffusion_steps: int, rows: int, dim: int, guided: bool) -> Callable[[int], Tensor]:
    """The released draws of one chain: noise of the null class is drawn as well, except for the start."""
    def noise(step: int) -> Tensor:
        return torch.randn(2 * rows if guided and step < diffusion_steps else rows, dim)[:rows]
    return noise


@pytest.mark.parametrize("case", CASES)
def test_diffusion_chains(case: Case) -> None:
    z, low, head = case.z.flatten(0, 1)[:4], case.made_up("xlow", 4), case.model.diffloss
    diffusion, dim = cosine_diffusion(case.steps), case.model.token_embed_dim
    case.check("ddpm_temp0_loop", chain(case, case.made_up("xT", 4), z, diffusion.steps - 1, 0.0))
    for name, seed, temperature, scale in (
        ("temp0", 0, 0.0, None), ("seed21_temp0.95", 21, 0.95, None), ("seed22_temp1_cfg3", 22, 1.0, 3.0)
    ):
        torch.manual_seed(seed)
        first = int(case.golden[f"lowstart_{name}_first_t"])
        case.check(f"lowstart_{name}", chain(case, low, z, first, temperature, scale))

    torch.manual_seed(77)
    sampled = head.sample(z, official_noise(diffusion.steps, 4, dim, False), diffusion)
    case.check("diffloss_sample_seed77_temp1_cfg1", sampled)
    torch.manual_seed(77)
    sampled = head.sample(z[:2], official_noise(diffusion.steps, 2, dim, True), diffusion, 0.95, 3.0, z[2:])
    check_first_half(case, "diffloss_sample_seed77_temp0.95_cfg3", sampled)


def check_first_half(case: Case, name: str, value: Tensor) -> None:
    """Guided samples: the released code also returns rows of the null class, which nothing uses."""
    reference = case.golden[name][:len(value)]
    assert (value - reference).abs().max() <= case.tolerance * case.golden[f"{name}@stats"][2]


@pytest.mark.parametrize(("case", "name"), SETS)
def test_sampling_sets(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed, num_iter, cfg, schedule, temperature, labelled = case.sets[name]
    golden, model, guided = case.golden, case.model, cfg != 1.0
    batch, length, dim = case.latents[0], model.seq_len, model.token_embed_dim
    steps = cosine_diffusion(case.steps).steps
    numbers = np.random.RandomState(seed)
    orders = np.tile(np.arange(length), (batch, 1))
    for order in orders:
        numbers.shuffle(order)
    torch.manual_seed(seed)

    calls: list[tuple[Tensor, Tensor, float]] = []
    released = model.diffloss.sample

    def recorded(z: Tensor, *args: object) -> Tensor:
        out, scale, uncond = released(z, *args), args[-2], args[-1]
        calls.append((z if uncond is None else torch.cat((z, uncond)), out, scale))
        return out

    monkeypatch.setattr(model.diffloss, "sample", recorded)
    labels = golden["labels"] if labelled else torch.full((batch,), model.num_classes)
    tokens = generate(
        model, labels, torch.from_numpy(orders),
        lambda iteration, step, n: official_noise(steps, batch * n, dim, guided)(step),
        num_iter, cfg, schedule, temperature, case.steps,
    )
    lengths = mask_lengths(length, num_iter)
    golden.check(f"{name}_orders", torch.from_numpy(orders))
    golden.check(f"{name}_mask_len", torch.tensor(lengths).float(), 0)
    golden.check(f"{name}_mask_next_rowsum", torch.tensor(lengths)[:, None].repeat(1, batch))
    golden.check(f"{name}_npred_rows", torch.tensor([len(z) for z, *_ in calls]))
    golden.check(f"{name}_cfg_iter", torch.tensor([scale for *_, scale in calls]), 1e-6)
    case.check(f"{name}_z_step0", calls[0][0])
    check_first_half(case, f"{name}_o_step0", calls[0][1])
    case.check(f"{name}_z_laststep", calls[-1][0])
    case.check(f"{name}_tokens", model.unpatchify(tokens))


def test_guidance_twins_of_the_calibration_rows() -> None:
    golden = Golden("ptq_mar_pipeline")
    model = fill(MAR(**TINY_A.mar | dict(decoder_embed_dim=48, buffer_size=64, diffloss_d=1, diffloss_w=32)))
    labels = torch.cat((golden["cali_labels"], torch.full((4,), model.num_classes)))
    golden.check("fp_z", model(golden["cali_tokens"], golden["cali_mask"].bool(), labels))


@pytest.mark.parametrize("case", [CASES[0], CASES[2]])
def test_tokenizer(case: Case) -> None:
    golden, vae = case.golden, fill(AutoencoderKL(**case.vae))
    images = (made_up(f"{case.tag}:img", case.image) * 0.5).clamp(-1, 1)
    posterior = vae.encode(images)
    case.check("vae_moments", vae.moments(images))
    case.check("vae_mean", posterior.mean)
    case.check("vae_mode", posterior.mean)
    case.check("vae_logvar_clamped", posterior.logvar)
    case.check("vae_kl", posterior.kl())
    torch.manual_seed(1234)
    case.check("vae_sample_seed1234", posterior.sample(torch.randn(posterior.mean.shape)))
    case.check("vae_decode", vae.decode(made_up(f"{case.tag}:z", tuple(golden["vae_mean@shape"].tolist()))))


def test_diffusion_tables() -> None:
    data = Golden("mar_diffusion_tables").data
    for entry in data.files:
        respacing, table = entry.split(":")
        mine = getattr(cosine_diffusion("" if respacing == "full1000" else respacing), table).numpy()
        np.testing.assert_allclose(mine, data[entry], rtol=1e-12, atol=1e-300, err_msg=entry)


def test_mask_schedules() -> None:
    golden = Golden("mar_tiny_a")
    schedules = [e.split("_iter") for e in golden.data.files if e.startswith("mask_len_seq")]
    assert len(schedules) == 5
    for prefix, iterations in schedules:
        length = int(prefix.removeprefix("mask_len_seq"))
        golden.check(f"{prefix}_iter{iterations}", torch.tensor(mask_lengths(length, int(iterations))))
    assert mask_lengths(4, 8) == [3, 2, 1, 1, 1, 1, 1, 1]  # more iterations than tokens: some are idle


@pytest.mark.parametrize("respacing", ["ddim300", "ddim", "0", "2000", "10,", "many", "500,600"])
def test_respacings_that_cannot_be_are_refused(respacing: str) -> None:
    with pytest.raises(ValueError, match="diffusion_steps"):
        spaced_timesteps(respacing)


def test_unknown_guidance_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cfg_schedule: 'cosine' is not one of linear, constant"):
        guidance_at(3, 16, 2.0, "cosine")


def test_one_diffusion_step_is_the_predicted_token() -> None:
    diffusion, x, output = cosine_diffusion("1"), torch.randn(3, 4), torch.randn(3, 8)
    t = torch.zeros(3, dtype=torch.long)
    p = diffusion.p_mean_variance(output, x, t)
    torch.testing.assert_close(diffusion.p_sample(output, x, t, torch.randn(3, 4)), p.x_start)


@pytest.fixture
def generator() -> MARGenerator:
    preset = Preset(
        name="mar_test", family="mar", transformer=TINY_A.mar, tokenizer=TINY_A.vae | {"ch_mult": (1, 1, 1, 2, 2)},
        weights=PRESETS["mar_b"].weights, tokenizer_weights=PRESETS["mar_b"].tokenizer_weights,
        samplers={}, image_size=64, tokens=16, classes=10,
    )
    model = MARGenerator(preset)
    fill(model.transformer), fill(model.tokenizer)
    return model


LABELS = torch.tensor([3, 1, 4, 1, 9, 2])


@pytest.fixture
def tokens() -> Tensor:
    return made_up("test:tokens", (6, 16, 4))


def test_an_image_depends_on_its_seed_and_index_alone(generator: MARGenerator) -> None:
    index, other = torch.tensor([5, 9, 2, 6, 2**33, 1]), torch.tensor([2, 0, 3, 1, 5, 4])
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
        "models.random.normal", lambda seed, index, step, n: steps.append(step) or torch.zeros(len(index), n)
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
    model, mask = generator.transformer, TINY_A.golden["mask"].bool()[:1].expand(6, -1)
    fused = model(tokens, mask, LABELS)
    for block in (*model.encoder_blocks, *model.decoder_blocks):
        block.attn.qk.fused = False
    torch.testing.assert_close(model(tokens, mask, LABELS), fused)


def test_rows_that_hide_different_numbers_of_tokens_run_as_if_alone(generator: MARGenerator, tokens: Tensor) -> None:
    model, mask = generator.transformer, torch.arange(16) < torch.tensor([16, 3, 9, 3, 1, 15])[:, None]
    alone = [model(tokens[i:i + 1], mask[i:i + 1], LABELS[i:i + 1]) for i in range(6)]
    torch.testing.assert_close(model(tokens, mask, LABELS), torch.cat(alone))


def test_hidden_tokens_do_not_leak(generator: MARGenerator, tokens: Tensor) -> None:
    mask = torch.arange(16).expand(6, -1) % 3 == 0
    hidden_changed = tokens.masked_fill(mask[..., None], 100.0)
    assert torch.equal(generator.transformer(tokens, mask, LABELS), generator.transformer(hidden_changed, mask, LABELS))


def test_positions_are_slots_with_the_buffer_first(generator: MARGenerator, tokens: Tensor) -> None:
    model, seen = generator.transformer, {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args}))
    model(tokens, torch.arange(16).expand(6, -1) < 11, LABELS)  # 4 buffer tokens and 5 visible ones
    for name, (x, *rest) in seen.items():
        first = 4 if name == "z_proj" else 0
        assert torch.equal(rest[0], torch.arange(first, first + x.shape[1])), name
    assert seen["encoder_blocks.1.mlp.fc2"][0].shape[1] == 9
    assert seen["decoder_blocks.1.mlp.fc2"][0].shape[1] == 20


def test_nll_is_the_diffusion_loss_of_the_hidden_tokens(generator: MARGenerator, tokens: Tensor) -> None:
    draws, model, diffusion = generator.draws(3, torch.arange(6)), generator.transformer, cosine_diffusion()
    nll = generator.nll(tokens, LABELS, draws)
    z = model(tokens, draws.mask, LABELS)
    for i, j in draws.mask.nonzero()[::7].tolist():
        clean, t, noise = tokens[i, j][None], draws.t[i, j][None], draws.noise[i, j][None]
        x = diffusion.q_sample(clean, t, noise)
        error, bound = diffusion.losses(model.diffloss.net(x, t, z[i, j][None]), clean, x, t, noise)
        torch.testing.assert_close(nll[i, j], (error + bound)[0], rtol=1e-4, atol=1e-4)
    assert nll[~draws.mask].abs().max() == 0


def test_loss_of_several_noises_is_that_of_each(generator: MARGenerator, tokens: Tensor) -> None:
    model, draws = generator.transformer, [generator.draws(s, torch.arange(6)) for s in range(3)]
    mask, t, noise = draws[0].mask, torch.stack([d.t for d in draws]), torch.stack([d.noise for d in draws])
    together = model.loss(tokens, mask, LABELS, t, noise)
    apart = torch.stack([model.loss(tokens, mask, LABELS, d.t, d.noise) for d in draws])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_loss_trains_every_parameter_and_the_bound_only_the_variance(generator: MARGenerator, tokens: Tensor) -> None:
    draws = generator.draws(0, torch.arange(6))
    with torch.enable_grad():
        labels = torch.tensor([0, 1, 2, 3, 4, 10])
        generator.transformer.loss(tokens, draws.mask, labels, draws.t, draws.noise).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.transformer.parameters())
        output = torch.randn(5, 8, requires_grad=True)
        t, x = torch.tensor([0, 1, 10, 500, 900]), torch.randn(5, 4)
        cosine_diffusion().losses(output, x, x, t, x)[1].sum().backward()
        assert output.grad[:, :4].abs().max() == 0
        assert output.grad[:, 4:].abs().min() > 0


def test_transitions_give_the_kl_between_two_models(generator: MARGenerator, tokens: Tensor) -> None:
    draws = generator.draws(3, torch.arange(6))
    p = generator.transitions(tokens, LABELS, draws)
    assert p.mean.shape == (int(draws.mask.sum()), 4)
    assert gaussian_kl(p, p).abs().max() == 0
    generator.transformer.diffloss.net.final_layer.linear.weight.mul_(1.01)
    kl = gaussian_kl(p, generator.transitions(tokens, LABELS, draws)).sum(-1)
    assert kl.min() >= 0
    assert kl.mean() > 0


def test_gaussian_kl_is_that_of_torch() -> None:
    mean, log_variance = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    diffusion, t = cosine_diffusion("10"), torch.arange(5)
    a, b = (diffusion.posterior(m, m, t)._replace(mean=m, log_variance=v) for m, v in zip(mean, log_variance))
    normal = [torch.distributions.Normal(g.mean, (g.log_variance / 2).exp()) for g in (a, b)]
    torch.testing.assert_close(gaussian_kl(a, b), torch.distributions.kl_divergence(*normal))


def test_draws_hide_as_many_tokens_as_training_does(generator: MARGenerator) -> None:
    draws = generator.draws(0, torch.arange(4000))
    share = draws.mask.double().mean(dim=1)
    assert share.min() >= 0.7
    assert share.max() == 1
    assert abs(share.mean() - (0.874 + 0.5 / 16)) < 0.01  # mean of the truncated normal, and rounding up
    assert (draws.t.min(), draws.t.max()) == (0, 999)
    one = generator.draws(0, torch.tensor([17]))
    assert torch.equal(one.mask[0], draws.mask[17])
    assert torch.equal(one.noise[0], draws.noise[17])


def test_adapter_lists_every_linear_once_in_forward_order(generator: MARGenerator, tokens: Tensor) -> None:
    adapter, model = generator.adapter, generator.transformer
    linears = {name for name, m in model.named_modules() if isinstance(m, Linear)}
    consumers = [name for site in adapter.sites for name in site.consumers]
    assert sorted(consumers) == sorted(linears)
    reached: list[str] = []
    for name in linears:
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: reached.append(name))
    adapter.forward(adapter.rows(tokens, LABELS)[0])
    first = list(dict.fromkeys(reached))
    assert [name for name in first if name in {s.name for s in adapter.sites}] == [s.name for s in adapter.sites]
    assert {s.kind for s in adapter.sites} == {"qkv", "proj", "fc1", "fc2", "embed", "diffusion"}
    for site in adapter.sites:
        in_blocks = site.kind in ("qkv", "proj", "fc1", "fc2") or site.name == "decoder_embed"
        assert (len(site.segments), site.sinks) == ((5, 4) if in_blocks else (1, 0)), site.name
    assert len(adapter.matmuls) == 2 * 4


def test_folding_into_every_site_that_can_absorb_changes_nothing(generator: MARGenerator, tokens: Tensor) -> None:
    adapter, model = generator.adapter, generator.transformer.double()
    rows = adapter.rows(tokens.double(), LABELS)[0]
    before = adapter.forward(rows)
    sites = [site for site in adapter.sites if site.fold is not None]
    assert len(sites) == 2 * 4 + 1 + 3  # qkv and fc1 of each block, decoder_embed, diffusion blocks and final layer
    for site in sites:
        channels = model.get_submodule(site.name).in_features
        scale, shift = made_up(site.name + ":scale", (channels,)).double().exp(), made_up(site.name, (channels,))
        folding.apply(model, site, InputTransform(scale, shift.double()))
    torch.testing.assert_close(adapter.forward(rows), before, rtol=1e-12, atol=1e-12 * float(before.abs().max()))


def test_calibration_rows_go_through_the_sampling_run(generator: MARGenerator) -> None:
    adapter, many = generator.adapter, made_up("test:many", (64, 16, 4))
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
