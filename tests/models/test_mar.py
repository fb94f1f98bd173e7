"""MAR and KL-16 against reference outputs of LTH14/mar; schedules and the arithmetic of the
diffusion."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from models.mar.diffloss import timestep_embedding
from models.mar.diffusion import cosine_diffusion, gaussian_kl, spaced_timesteps
from models.mar.generator import MARGenerator
from models.mar.presets import PRESETS
from models.mar.sampler import generate, guidance_at, mask_lengths
from models.mar.tokenizer import AutoencoderKL
from models.mar.transformer import MAR
from tests.models.mar_cases import CASES, SETS, TINY_A, Case
from tests.reference import Golden, fill, made_up, released_keys

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("name", ["mar_b", "mar_l", "mar_h"])
def test_state_dicts_match_the_released_files_key_for_key(name: str) -> None:
    with torch.device("meta"):
        model = MARGenerator(PRESETS[name])
    for part, file in {"transformer": name.replace("_", "-"), "tokenizer": "mar-kl16"}.items():
        state = {k: list(v.shape) for k, v in getattr(model, part).state_dict().items()}
        assert list(state.items()) == list(released_keys(file).items())


@pytest.mark.parametrize("case", CASES)
def test_encoder_and_decoder(case: Case) -> None:
    golden = case.golden
    model = case.model
    tokens = case.tokens
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
    names = {
        f"block{i}_out(enc0..{len(model.encoder_blocks) - 1},then dec)": out
        for i, out in enumerate(outputs)
    }
    checked = [case.check(name, out) for name, out in names.items() if name in golden]
    stored = [name for name in golden.data.files if re.fullmatch(r"block\d+_out\(.*\)", name)]
    assert len(checked) == len(stored) > 0
    assert set(stored) <= set(names)

    nothing = torch.ones_like(mask)
    no_class = torch.full_like(golden["labels"], model.num_classes)
    encoded = model.encode(tokens, nothing, no_class)
    case.check("encoder_out_allmasked_fake", encoded)
    case.check("decoder_z_allmasked_fake", model.decode(model.pad(encoded, nothing)))


@pytest.mark.parametrize("case", CASES)
def test_denoising_network_and_training_losses(case: Case) -> None:
    golden = case.golden
    net = case.model.diffloss.net
    t = case.golden["net_t"]
    z = case.z.flatten(0, 1)[:8]
    x = case.made_up("xt", 8)
    golden.check("timestep_embedding_256", timestep_embedding(t), 5e-5)  # see its docstring
    case.check("time_embed", net.time_embed(t))
    case.check("net_out", net(x, t, z))
    case.check("net_out_cfg2.9", net.guided(x[:4], t, z, 2.9))

    diffusion = cosine_diffusion()
    clean = case.made_up("tgt", 8)
    noise = case.made_up("noise", 8)
    noised = diffusion.q_sample(clean, t, noise)
    case.check("q_sample", noised)
    error, bound = diffusion.losses(net(noised, t, z), clean, noised, t, noise)
    case.check("train_mse", error)
    case.check("train_vb", bound)
    case.check("train_loss", error + bound)

    generation = cosine_diffusion(case.steps)
    t = golden["pmv_gen_index_t"]
    p = generation.p_mean_variance(net(x, generation.timestep_map[t], z), x, t)
    values = (
        ("mean", p.mean),
        ("variance", p.log_variance.exp()),
        ("log_variance", p.log_variance),
        ("pred_xstart", p.x_start),
    )
    for name, value in values:
        case.check(f"pmv_{name}", value)


def chain(
    case: Case, x: Tensor, z: Tensor, first: int, temperature: float, scale: float | None = None
) -> Tensor:
    """The released chain from step `first` down; guided, both halves of x go through it, each with
    its own noise."""
    diffusion = cosine_diffusion(case.steps)
    net = case.model.diffloss.net
    for step in range(first, -1, -1):
        t = torch.full((len(x),), step)
        original = diffusion.timestep_map[t]
        output = (
            net(x, original, z)
            if scale is None
            else net.guided(x[: len(x) // 2], original, z, scale)
        )
        x = diffusion.p_sample(output, x, t, torch.randn(x.shape), temperature)
    return x


def official_noise(
    diffusion_steps: int, rows: int, dim: int, guided: bool
) -> Callable[[int], Tensor]:
    """The released draws of one chain: noise of the null class is drawn as well, except for the
    start."""

    def noise(step: int) -> Tensor:
        return torch.randn(2 * rows if guided and step < diffusion_steps else rows, dim)[:rows]

    return noise


@pytest.mark.parametrize("case", CASES)
def test_diffusion_chains(case: Case) -> None:
    z = case.z.flatten(0, 1)[:4]
    low = case.made_up("xlow", 4)
    head = case.model.diffloss
    diffusion = cosine_diffusion(case.steps)
    dim = case.model.token_embed_dim
    case.check("ddpm_temp0_loop", chain(case, case.made_up("xT", 4), z, diffusion.steps - 1, 0.0))
    for name, seed, temperature, scale in (
        ("temp0", 0, 0.0, None),
        ("seed21_temp0.95", 21, 0.95, None),
        ("seed22_temp1_cfg3", 22, 1.0, 3.0),
    ):
        torch.manual_seed(seed)
        first = int(case.golden[f"lowstart_{name}_first_t"])
        case.check(f"lowstart_{name}", chain(case, low, z, first, temperature, scale))

    torch.manual_seed(77)
    sampled = head.sample(z, official_noise(diffusion.steps, 4, dim, False), diffusion)
    case.check("diffloss_sample_seed77_temp1_cfg1", sampled)
    torch.manual_seed(77)
    sampled = head.sample(
        z[:2], official_noise(diffusion.steps, 2, dim, True), diffusion, 0.95, 3.0, z[2:]
    )
    check_first_half(case, "diffloss_sample_seed77_temp0.95_cfg3", sampled)


def check_first_half(case: Case, name: str, value: Tensor) -> None:
    """Guided samples: the released code also returns rows of the null class, which nothing uses."""
    reference = case.golden[name][: len(value)]
    assert (value - reference).abs().max() <= case.tolerance * case.golden[f"{name}@stats"][2]


@pytest.mark.parametrize(("case", "name"), SETS)
def test_sampling_sets(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed, num_iter, cfg, schedule, temperature, labelled = case.sets[name]
    golden = case.golden
    model = case.model
    guided = cfg != 1.0
    batch = case.latents[0]
    length = model.seq_len
    dim = model.token_embed_dim
    steps = cosine_diffusion(case.steps).steps
    numbers = np.random.RandomState(seed)
    orders = np.tile(np.arange(length), (batch, 1))
    for order in orders:
        numbers.shuffle(order)
    torch.manual_seed(seed)

    calls: list[tuple[Tensor, Tensor, float]] = []
    released = model.diffloss.sample

    def recorded(z: Tensor, *args: object) -> Tensor:
        out = released(z, *args)
        scale = args[-2]
        uncond = args[-1]
        calls.append((z if uncond is None else torch.cat((z, uncond)), out, scale))
        return out

    monkeypatch.setattr(model.diffloss, "sample", recorded)
    labels = golden["labels"] if labelled else torch.full((batch,), model.num_classes)
    tokens = generate(
        model,
        labels,
        torch.from_numpy(orders),
        lambda iteration, step, n: official_noise(steps, batch * n, dim, guided)(step),
        num_iter,
        cfg,
        schedule,
        temperature,
        case.steps,
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
    model = fill(
        MAR(**TINY_A.mar | dict(decoder_embed_dim=48, buffer_size=64, diffloss_d=1, diffloss_w=32))
    )
    labels = torch.cat((golden["cali_labels"], torch.full((4,), model.num_classes)))
    golden.check("fp_z", model(golden["cali_tokens"], golden["cali_mask"].bool(), labels))


@pytest.mark.parametrize("case", [CASES[0], CASES[2]])
def test_tokenizer(case: Case) -> None:
    golden = case.golden
    vae = fill(AutoencoderKL(**case.vae))
    images = (made_up(f"{case.tag}:img", case.image) * 0.5).clamp(-1, 1)
    posterior = vae.encode(images)
    case.check("vae_moments", vae.moments(images))
    case.check("vae_mean", posterior.mean)
    case.check("vae_mode", posterior.mean)
    case.check("vae_logvar_clamped", posterior.logvar)
    case.check("vae_kl", posterior.kl())
    torch.manual_seed(1234)
    case.check("vae_sample_seed1234", posterior.sample(torch.randn(posterior.mean.shape)))
    case.check(
        "vae_decode", vae.decode(made_up(f"{case.tag}:z", tuple(golden["vae_mean@shape"].tolist())))
    )


def test_diffusion_tables() -> None:
    data = Golden("mar_diffusion_tables").data
    for entry in data.files:
        respacing, table = entry.split(":")
        mine = getattr(
            cosine_diffusion("" if respacing == "full1000" else respacing), table
        ).numpy()
        np.testing.assert_allclose(mine, data[entry], rtol=1e-12, atol=1e-300, err_msg=entry)


def test_mask_schedules() -> None:
    golden = Golden("mar_tiny_a")
    schedules = [e.split("_iter") for e in golden.data.files if e.startswith("mask_len_seq")]
    assert len(schedules) == 5
    for prefix, iterations in schedules:
        length = int(prefix.removeprefix("mask_len_seq"))
        golden.check(
            f"{prefix}_iter{iterations}", torch.tensor(mask_lengths(length, int(iterations)))
        )
    # more iterations than tokens: some are idle
    assert mask_lengths(4, 8) == [3, 2, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("respacing", ["ddim300", "ddim", "0", "2000", "10,", "many", "500,600"])
def test_respacings_that_cannot_be_are_refused(respacing: str) -> None:
    with pytest.raises(ValueError, match="diffusion_steps"):
        spaced_timesteps(respacing)


def test_unknown_guidance_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cfg_schedule: 'cosine' is not one of linear, constant"):
        guidance_at(3, 16, 2.0, "cosine")


def test_one_diffusion_step_is_the_predicted_token() -> None:
    diffusion = cosine_diffusion("1")
    x = torch.randn(3, 4)
    output = torch.randn(3, 8)
    t = torch.zeros(3, dtype=torch.long)
    p = diffusion.p_mean_variance(output, x, t)
    torch.testing.assert_close(diffusion.p_sample(output, x, t, torch.randn(3, 4)), p.x_start)


def test_gaussian_kl_is_that_of_torch() -> None:
    mean = torch.randn(2, 5, 3)
    log_variance = torch.randn(2, 5, 3)
    diffusion = cosine_diffusion("10")
    t = torch.arange(5)
    a, b = (
        diffusion.posterior(m, m, t)._replace(mean=m, log_variance=v)
        for m, v in zip(mean, log_variance)
    )
    normal = [torch.distributions.Normal(g.mean, (g.log_variance / 2).exp()) for g in (a, b)]
    torch.testing.assert_close(gaussian_kl(a, b), torch.distributions.kl_divergence(*normal))
