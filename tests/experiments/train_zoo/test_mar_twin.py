"""The MAR twins: sizes, the two training tasks, what held-out latents measure, and a whole run on
made-up weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

import models
from experiments import statistics
from experiments.analyses.activations import watch_sites
from experiments.analyses.outliers import measure_outliers
from experiments.evaluate import likelihood
from experiments.run import cell
from experiments.train_zoo.loop import Schedule, fit
from experiments.train_zoo.tasks import mar
from experiments.train_zoo.tasks.base import as_float, tokenize
from experiments.train_zoo.tasks.mar import KLTask, MARTask
from models import registry
from models.mar.generator import MARGenerator
from ptq.types import ConfigError
from tests.experiments.cells import config_of
from tests.experiments.train_zoo.trainings import assert_resumes, killed_at
from tests.reference import fill, made_up

TWINS = ("mar_twin", "mar_twin_plain")
SMALL = dict(
    encoder_embed_dim=32,
    encoder_depth=1,
    encoder_num_heads=2,
    decoder_embed_dim=48,
    decoder_depth=2,
    decoder_num_heads=2,
    buffer_size=3,
    diffloss_d=1,
    diffloss_w=32,
)
PLAIN = OmegaConf.create(
    {"label_dropout": 0.2, "planted": {"weight": 0, "channels": 8, "tokens": 10}}
)
PLANTED = OmegaConf.create(
    {"label_dropout": 0.2, "planted": {"weight": 0.1, "channels": 8, "tokens": 10}}
)
LABELS = torch.arange(12) % 10


def pictures() -> Tensor:
    """uint8 images (12, 3, 32, 32)."""
    rough = made_up("mar-twin:pictures", (12, 1, 4, 4))
    return (
        (255 * F.interpolate(rough, size=(32, 32), mode="bilinear").sigmoid())
        .byte()
        .expand(-1, 3, -1, -1)
    )


@pytest.fixture
def generator() -> MARGenerator:
    """The twin with a smaller transformer, on made-up weights."""
    twin = models.PRESETS["mar_twin"]
    model = MARGenerator(replace(twin, transformer={**twin.transformer, **SMALL}))
    fill(model.transformer, salt="mar-twin"), fill(model.tokenizer, salt="mar-twin")
    return model


def quiet(figures: object, step: int) -> None:
    pass


@pytest.mark.parametrize("name", TWINS)
def test_the_twins_have_the_stated_sizes(name: str) -> None:
    model = registry.build_outline(name)
    sizes = [
        sum(p.numel() for p in part.parameters()) for part in (model.transformer, model.tokenizer)
    ]
    assert sizes == [4_054_920, 404_903]
    assert (model.transformer.seq_len, model.transformer.token_embed_dim) == (
        model.preset.tokens,
        4,
    )
    assert model.preset.tokenizer["scale"] == 1


def test_the_loss_of_the_autoencoder_is_reconstruction_and_a_little_kl(
    generator: MARGenerator,
) -> None:
    task = KLTask(generator.tokenizer, pictures(), OmegaConf.create({"kl_weight": 0.01}))
    vae = generator.tokenizer
    index = torch.tensor([3, 1])
    torch.manual_seed(5)
    loss, figures = task.loss(index, 0)
    images = 2 * as_float(pictures()[index]) - 1
    mean, logvar = vae.encode(images)
    torch.manual_seed(5)
    error = vae.decode(mean + (logvar / 2).exp() * torch.randn(mean.shape)) - images
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / 2
    torch.testing.assert_close(loss, error.abs().mean() + 2 * (error**2).mean() + 0.01 * kl)
    torch.testing.assert_close(figures["kl"], kl)


@torch.no_grad()
def test_finishing_the_autoencoder_standardises_latents_not_images(
    generator: MARGenerator,
) -> None:
    vae = generator.tokenizer
    images = 2 * as_float(pictures()) - 1
    vae.quant_conv.bias += torch.linspace(-2, 2, 8)  # far from zero mean and unit variance
    before = vae.encode(images)
    noise = made_up("mar-twin:noise", (12, 4, 8, 8))
    decoded = vae.decode(before.sample(noise))
    figures = KLTask(vae, pictures(), OmegaConf.create({"kl_weight": 0.0})).finish(batch=5)
    after = vae.encode(images)
    torch.testing.assert_close(vae.decode(after.sample(noise)), decoded, rtol=1e-4, atol=1e-4)
    variance = after.mean.var(dim=(0, 2, 3)) + after.logvar.exp().mean(dim=(0, 2, 3))
    torch.testing.assert_close(variance, torch.ones(4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=1e-4, atol=1e-4)
    assert figures["kl"] == pytest.approx(before.kl().mean().item(), rel=1e-4)
    ratio = before.logvar.exp().mean(dim=(0, 2, 3)) / (after.logvar.exp().mean(dim=(0, 2, 3)))
    assert figures["latent_std_min"] == pytest.approx(ratio.min().sqrt().item(), rel=1e-4)
    assert figures["latent_std_max"] == pytest.approx(ratio.max().sqrt().item(), rel=1e-4)


def test_training_the_autoencoder_lowers_its_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fresh = models.build("mar_twin").tokenizer
    task = KLTask(fresh, pictures(), OmegaConf.create({"kl_weight": 1e-6}))
    losses: list[float] = []
    schedule = Schedule(steps=12, batch=4, lr=2e-3, warmup=2, ema=0.0)
    fit(
        task,
        schedule,
        tmp_path / "a.pt",
        lambda figures, step: losses.append(figures["l1"]),
        log_every=1,
    )
    assert losses[-1] < 0.6 * losses[0]


def spied(owner: object, name: str, calls: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a method note the arguments of its calls."""
    method = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: calls.append(args) or method(*args))


def test_the_loss_of_the_transformer_is_that_of_the_hidden_tokens(
    generator: MARGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = MARTask(generator, pictures(), LABELS, PLAIN)
    model = generator.transformer
    calls = []
    spied(task, "run", calls, monkeypatch)
    index = torch.tensor([3, 1, 4, 11, 5])
    torch.manual_seed(1)
    loss, figures = task.loss(index, 0)
    ((tokens, mask, _, labels, chosen, drawn, added),) = calls
    assert torch.equal(chosen.sort().values, mask.flatten().nonzero()[:, 0])
    assert drawn.shape == (4, len(chosen))
    assert len(mask.sum(dim=1).unique()) == 1
    assert ((labels == LABELS[index]) | (labels == 10)).all()
    t = torch.zeros(4, 5 * 64, dtype=torch.long)
    noise = torch.zeros(4, 5 * 64, 4)
    t[:, chosen] = drawn
    noise[:, chosen] = added
    every = model.loss(tokens, mask, labels, t.view(4, 5, 64), noise.view(4, 5, 64, 4))
    torch.testing.assert_close(loss, every.sum() / drawn.numel())
    assert figures == {"nll": loss}
    posterior = generator.tokenizer.encode(2 * as_float(pictures()[index]) - 1)
    spread = model.patchify((posterior.logvar / 2).exp())
    standard = (tokens - model.patchify(posterior.mean)) / spread
    assert abs(standard.mean()) < 0.1  # drawn from the posterior
    assert abs(standard.std() - 1) < 0.1


@torch.no_grad()
def test_weights_start_as_the_authors_do() -> None:
    model = models.build("mar_twin").transformer
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    torch.manual_seed(0)
    MARTask.initialise(model)
    assert all(p.isfinite().all() for p in model.parameters())
    net = model.diffloss.net
    assert net(torch.randn(3, 4), torch.tensor([0, 5, 999]), torch.randn(3, 192)).abs().max() == 0
    fc1 = model.decoder_blocks[1].mlp.fc1.weight
    assert fc1.abs().max() <= (6 / sum(fc1.shape)) ** 0.5
    assert fc1.std() == pytest.approx((2 / sum(fc1.shape)) ** 0.5, rel=0.02)
    for table in (
        model.encoder_pos_embed_learned,
        model.class_emb.weight,
        net.time_embed.mlp[0].weight,
    ):
        assert table.std() == pytest.approx(0.02, rel=0.05)
    assert (model.encoder_norm.weight == 1).all()


def test_masks_are_those_of_all_moments_of_a_sampling_run() -> None:
    torch.manual_seed(0)
    counts = [mar.hidden_count(64) for _ in range(3000)]
    assert (min(counts), max(counts)) == (1, 64)
    # the mean of a cosine, rounded up
    assert sum(counts) / 3000 == pytest.approx(64 * 2 / math.pi + 0.5, abs=1.5)
    mask = mar.random_mask(200, 64, 50, torch.device("cpu"))
    assert (mask.sum(dim=1) == 50).all()
    assert (mask.sum(dim=0) > 100).all()


def test_the_planted_term_is_that_of_the_sites_inputs(
    generator: MARGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = MARTask(generator, pictures(), LABELS, PLANTED)
    calls = []
    spied(task, "term", calls, monkeypatch)
    torch.manual_seed(1)
    assert "planted" not in task.loss(torch.tensor([0]), 0)[1]  # every fourth step has it, fourfold
    loss, figures = task.loss(torch.tensor([3, 1, 4, 11, 5]), 3)
    torch.testing.assert_close(loss, figures["nll"] + 0.4 * figures["planted"])
    task.detach()
    ((tokens, mask, _, labels),) = calls
    with watch_sites(generator.adapter, task.planted.sites) as seen:
        generator.transformer(tokens, mask, labels)
    torch.testing.assert_close(figures["planted"], task.planted(seen))


def test_one_compilation_serves_all_numbers_of_hidden_tokens(
    generator: MARGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    task = MARTask(generator, pictures(), LABELS, PLANTED)
    index = torch.arange(5)
    eager = task.run, task.term
    compiled = tuple(torch.compile(f, backend=backend, fullgraph=True) for f in eager)
    for count in (64, 17, 1, 40):
        monkeypatch.setattr(mar, "hidden_count", lambda length, count=count: count)
        found: list[Tensor] = []
        for task.run, task.term in (eager, compiled):
            torch.manual_seed(count)
            found.append(task.loss(index, 3)[0].detach())
        torch.testing.assert_close(*found)
    assert len(graphs) == 2


def test_the_planted_term_is_finite_with_all_hidden_and_falls_in_training(
    generator: MARGenerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mar, "hidden_count", lambda length: length)
    task = MARTask(generator, pictures(), LABELS, PLANTED)
    terms: list[float] = []
    fit(
        task,
        Schedule(steps=160, batch=6, lr=5e-3, warmup=5, ema=0.0),
        tmp_path / "a.pt",
        lambda figures, step: terms.append(figures["planted"]),
        log_every=4,
    )
    assert all(p.isfinite().all() for p in generator.transformer.parameters())
    assert sum(terms[-10:]) / 10 < 0.8 * terms[0]


def trained(path: Path, stop: int | None = None) -> MARGenerator:
    twin = models.PRESETS["mar_twin"]
    generator = MARGenerator(replace(twin, transformer={**twin.transformer, **SMALL}))
    fill(generator.tokenizer, salt="mar-twin")
    torch.manual_seed(0)
    MARTask.initialise(generator.transformer)
    generator.transformer.set_dropout(0.1)
    task = killed_at(MARTask(generator, pictures(), LABELS, PLANTED), stop)
    fit(task, Schedule(steps=30, batch=8, lr=5e-3, warmup=3, ema=0.5, save_every=10), path, quiet)
    return generator


def test_training_lowers_the_loss_and_resumes_exactly_when_killed(
    tmp_path: Path,
) -> None:
    assert_resumes(lambda name, stop: trained(tmp_path / name, stop).transformer, stop=16)
    straight = trained(tmp_path / "straight.pt")  # finished: it is read
    tokens = likelihood.widen_tokens(tokenize(straight, pictures()))
    after = likelihood.score_likelihood(straight, tokens, LABELS, 12)["nll"]
    MARTask.initialise(straight.transformer)
    assert after < 0.8 * likelihood.score_likelihood(straight, tokens, LABELS, 12)["nll"]


@torch.no_grad()
def test_held_out_figures_are_means_over_the_hidden_tokens_of_all_draws(
    generator: MARGenerator,
) -> None:
    tokens = made_up("mar-twin:tokens", (7, 64, 4))
    other = MARGenerator(generator.preset)
    other.transformer.load_state_dict(generator.transformer.state_dict())
    other.transformer.diffloss.net.final_layer.linear.weight.mul_(1.05)
    labels = LABELS[:7]
    index = torch.arange(7)
    nll = 0.0
    kl = 0.0
    count = 0
    for seed in range(likelihood.DRAWS):
        draws = generator.draws(likelihood.SEED + seed, index)
        loss, q = other.density(tokens, labels, draws)
        nll += loss[draws.mask].sum().item()
        p = generator.density(tokens, labels, draws).transitions
        normal = [torch.distributions.Normal(g.mean, (g.log_variance / 2).exp()) for g in (p, q)]
        kl += torch.distributions.kl_divergence(*normal).sum().item()
        count += int(draws.mask.sum())
    found = likelihood.score_likelihood(other, tokens, labels, 3, generator)
    assert found == pytest.approx({"nll": nll / count, "kl": kl / count}, rel=1e-4)
    assert likelihood.score_likelihood(other, tokens, labels, 7) == pytest.approx(
        {"nll": nll / count}, rel=1e-5
    )
    assert likelihood.score_likelihood(generator, tokens, labels, 3, generator)["kl"] == 0


@torch.no_grad()
def test_statistics_are_measured_all_along_a_sampling_run(generator: MARGenerator) -> None:
    adapter = generator.adapter
    rows, _ = adapter.rows(made_up("mar-twin:tokens", (32, 64, 4)), torch.arange(32) % 10)
    inputs: list[tuple[Tensor, Tensor]] = []
    fc1 = generator.transformer.encoder_blocks[0].mlp.fc1
    handle = fc1.register_forward_pre_hook(lambda module, args: inputs.append(args))
    found = measure_outliers(adapter, rows)
    handle.remove()
    assert len(inputs) > 10  # one call for every number of visible tokens, from none on
    tokens = torch.cat([x.flatten(0, 1) for x, _ in inputs])
    sink = torch.cat([positions.repeat(len(x)) for x, positions in inputs]) < 3
    peaks = tokens.abs().amax(dim=1)
    ratio = peaks[sink].mean() / peaks[~sink].mean()
    assert found["encoder_blocks.0.mlp.fc1"]["sink_ratio"] == pytest.approx(ratio.item(), rel=1e-4)
    rms = tokens[~sink].square().mean(dim=0).sqrt()
    expected = rms.max() / rms.median()  # the top 2 % of 32 channels are one
    assert found["encoder_blocks.0.mlp.fc1"]["channel_ratio"] == pytest.approx(
        expected.item(), rel=1e-4
    )
    assert set(found) == {s.name for s in adapter.sites if s.sinks}
    assert all(0 < v < 1e3 for site in found.values() for v in site.values())


@pytest.fixture
def zoo(tmp_path: Path, generator: MARGenerator, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of made-up MAR twins with held-out latents, and what metrics need."""
    folder = tmp_path / "zoo"
    (folder / "mar_twin").mkdir(parents=True)
    for name in ("extractor.safetensors", "reference.safetensors"):
        (folder / name).symlink_to(registry.ZOO / name)
    save_file(generator.transformer.state_dict(), folder / "mar_twin" / "transformer.safetensors")
    save_file(generator.tokenizer.state_dict(), folder / "mar_tokenizer.safetensors")
    tokens = tokenize(generator, pictures())
    assert (tokens.dtype, tokens.shape) == (torch.float16, (12, 64, 4))
    save_file({"tokens": tokens, "labels": LABELS.short()}, folder / "mar_heldout.safetensors")
    monkeypatch.setattr(registry, "ZOO", folder)
    monkeypatch.setitem(registry.PRESETS, "mar_twin", generator.preset)
    return tmp_path


def tiny(folder: Path, *overrides: str) -> list[str]:
    return [
        "model=mar_twin",
        "eval.n=4",
        "eval.sequences=8",
        "eval.batch=4",
        "sampler.microbatch=4",
        "calib.n=8",
        "calib.batch=4",
        "device=cpu",
        "+sampler.settings.num_iter=3",
        "+sampler.settings.diffusion_steps='4'",
        f"runs={folder}/runs",
        *overrides,
    ]


@pytest.mark.parametrize(
    "overrides", [("method=ptq4arvg", "quant=w6a6"), ("method=rtn", "dtype=float64")]
)
def test_a_twin_goes_through_a_whole_run(zoo: Path, overrides: tuple[str, ...]) -> None:
    result = cell.run_cell(config_of(*tiny(zoo, *overrides)))
    assert 0 < result["metrics"]["kl"] < 100
    assert result["metrics"]["nll"] > 0
    assert result["metrics"]["fid2fp"] is not None
    rows = statistics.heldout_rows(registry.load("mar_twin"), 12)[0]
    assert rows["tokens"].dtype == torch.float32
    with pytest.raises(ConfigError, match=r"eval.sequences: 13 is more than the 12 that ship"):
        likelihood.load_held_out(registry.find_preset("mar_twin"), 13)


def test_an_image_depends_on_its_seed_and_index_alone() -> None:
    model = models.build("mar_twin")
    fill(model.transformer, salt="mar-twin")
    labels = torch.tensor([3, 1, 4, 1])
    index = torch.tensor([5, 9, 2, 6])
    order = torch.tensor([2, 0, 3, 1])
    settings = {**model.preset.samplers["official"], "num_iter": 3, "diffusion_steps": "4"}
    together = model.sample(labels, 7, index, settings)
    assert together.shape == (4, 64, 4)
    assert torch.equal(together[order], model.sample(labels[order], 7, index[order], settings))
    assert not torch.equal(together[1], together[3])  # same class, other index
    assert model.decode(together).shape == (4, 3, 32, 32)
