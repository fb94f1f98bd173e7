"""Training of the PAR twins: the losses are right, they fall, and what was trained loads and is
measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

import models
from experiments.analyses.activations import watch_sites
from experiments.statistics import heldout_rows
from experiments.train_zoo.loop import Schedule, fit
from experiments.train_zoo.planting import PlantedStatistics
from experiments.train_zoo.tasks.par import PARTask, UnitVQTask
from experiments.train_zoo.tasks.vq import VQTask
from models.par.generator import PARGenerator
from models.par.presets import PRESETS
from models.preset import Preset
from models.rar.tokenizer import MaskGitVQGAN
from tests.experiments.train_zoo.trainings import (
    assert_dropout_acts_in_training_alone,
    assert_measured,
    assert_training_resumes,
    chosen,
    images,
    trained_twin,
)
from tests.reference import fill, made_up

LENGTH = 16
CODES = 24
CONFIG = OmegaConf.create(
    dict(
        commitment=0.25,
        label_dropout=0.1,
        schedule=dict(steps=8),
        planted=dict(weight=0, channels=8, tokens=10, gain=12),
    )
)


def toy(name: str = "par_twin") -> Preset:
    """A twin of 8x8 images: a 4x4 grid in 2x2 regions, four single tokens and three groups."""
    return replace(
        PRESETS[name],
        transformer=dict(
            dim=32,
            n_layer=2,
            n_head=2,
            vocab_size=CODES,
            block_size=LENGTH,
            spe_token_num=3,
            ar_token_num=4,
            num_classes=10,
            multiple_of=16,
        ),
        tokenizer=dict(
            ch_mult=(1, 1),
            ch=32,
            num_res_blocks=1,
            z_channels=32,
            codebook_size=CODES,
            codebook_embed_dim=8,
        ),
        image_size=8,
        tokens=LENGTH,
    )


@pytest.fixture
def generator() -> PARGenerator:
    made = PARGenerator(toy())
    fill(made.transformer)
    fill(made.tokenizer)
    return made


def settled(task: VQTask, step: int = 3) -> VQTask:
    """A tokenizer's task a few steps into its training."""
    for i in range(step):
        task.loss(torch.arange(16) + i, i)
    return task


def check_running_means(
    task: VQTask, rows: Tensor, ids: Tensor, before: tuple[Tensor, Tensor], unit: bool
) -> None:
    """The codes are the means of what was assigned to them, rows (n, D) by ids (n,), one code at a
    time."""
    count, total = before
    for code in range(CODES):
        mine = rows[ids == code]
        mean = (0.99 * total[code] + 0.01 * mine.sum(0)) / (0.99 * count[code] + 0.01 * len(mine))
        expected = mean / mean.norm() if unit else mean
        torch.testing.assert_close(
            task.tokenizer.quantize.embedding.weight[code], expected, rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
def test_the_tokenizers_loss_is_that_of_unit_vectors(generator: PARGenerator) -> None:
    task = settled(UnitVQTask(generator.tokenizer, images()[0], CONFIG))
    tokenizer = generator.tokenizer
    codes, *before = (
        t.clone() for t in (tokenizer.quantize.embedding.weight, task.model.count, task.model.total)
    )
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(CODES))
    index = torch.arange(12)
    loss, figures = task.loss(index, 3)

    pixels = task.images[index].float() / 255
    z = tokenizer.quant_conv(tokenizer.encoder(pixels * 2 - 1)).permute(0, 2, 3, 1).reshape(-1, 8)
    z = z / z.norm(dim=1, keepdim=True)
    ids = torch.cdist(z, codes).argmin(dim=1)
    check_running_means(task, z, ids, before, unit=True)
    # the codes follow first, then the image is decoded
    moved = tokenizer.quantize.embedding.weight[ids]
    commitment = (z - moved).square().mean()
    decoded = (tokenizer.decode(ids.view(12, LENGTH)) + 1) / 2
    reconstruction = (decoded - pixels).abs().mean() + 2 * (decoded - pixels).square().mean()
    torch.testing.assert_close(figures["commitment"], commitment)
    torch.testing.assert_close(loss, reconstruction + 0.25 * commitment)


@torch.no_grad()
def test_the_loss_of_the_rar_tokenizer_is_that_of_plain_vectors() -> None:
    tokenizer = fill(MaskGitVQGAN((1, 1), 32, 1, 8, CODES))
    task = settled(VQTask(tokenizer, images()[0], CONFIG))
    codes, *before = (
        t.clone() for t in (tokenizer.quantize.embedding.weight, task.model.count, task.model.total)
    )
    index = torch.arange(12)
    loss, figures = task.loss(index, 3)
    pixels = task.images[index].float() / 255
    z = tokenizer.encoder(pixels).permute(0, 2, 3, 1).reshape(-1, 8)
    ids = torch.cdist(z, codes).argmin(dim=1)
    check_running_means(task, z, ids, before, unit=False)
    commitment = (z - tokenizer.quantize.embedding.weight[ids]).square().mean()
    maps = tokenizer.quantize.embedding.weight[ids].view(12, 4, 4, 8).permute(0, 3, 1, 2)
    error = tokenizer.decoder(maps) - pixels
    torch.testing.assert_close(figures["commitment"], commitment)
    torch.testing.assert_close(
        loss, error.abs().mean() + 2 * error.square().mean() + 0.25 * commitment
    )


def test_the_gradient_passes_straight_through_the_codes(generator: PARGenerator) -> None:
    task = settled(UnitVQTask(generator.tokenizer, images()[0], CONFIG))
    loss, _ = task.loss(torch.arange(8), 3)
    loss.backward()
    still = {
        n for n, p in generator.tokenizer.named_parameters() if p.grad is None or not p.grad.any()
    }
    # equal features of one flat patch: a softmax over equal scores has no gradient to its keys'
    # bias
    assert {n for n in still if not n.endswith(".k.bias")} == {"quantize.embedding.weight"}


@torch.no_grad()
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_the_transformers_loss_is_the_mean_nll_in_generation_order(
    generator: PARGenerator, dropout: float
) -> None:
    pixels, labels = images()
    task = PARTask(generator, pixels, labels, OmegaConf.merge(CONFIG, {"label_dropout": dropout}))
    index = torch.tensor([3, 17, 8])
    ids = task.tokens[index].long()
    raster = generator.tokenizer.encode(pixels[index].float() / 255 * 2 - 1)
    assert torch.equal(generator.transformer.layout.to_raster(ids), raster)
    given = labels[index] if dropout == 0 else torch.full((3,), 10)
    logs = generator.log_probs(ids, given)
    expected = -sum(logs[b, t, ids[b, t]] for b in range(3) for t in range(LENGTH)) / (3 * LENGTH)
    loss, figures = task.loss(index, 0)
    torch.testing.assert_close(loss, expected)
    assert figures == {"nll": loss}


def test_planted_statistics_come_on_top(generator: PARGenerator) -> None:
    config = OmegaConf.merge(CONFIG, {"label_dropout": 0.0, "planted": {"weight": 0.5}})
    before = [layer.ffn_norm.weight.clone() for layer in generator.transformer.layers]
    task = PARTask(generator, *images(), config)
    for layer, weight in zip(generator.transformer.layers, before):  # one of 32 channels
        assert layer.attention_norm.weight[0] == layer.ffn_norm.weight[0] == 12
        assert torch.equal(layer.ffn_norm.weight[1:], weight[1:])
    planted = PlantedStatistics(
        generator.adapter, 8, 10, ("layers.0.attention.wqkv",), through_rest=True
    )
    assert [s.name for s in planted.sites[:3]] == [
        "layers.0.attention.wqkv",
        "layers.0.feed_forward.w1",
        "layers.0.feed_forward.w2",
    ]
    index = torch.arange(5)
    rows, _ = generator.adapter.rows(task.tokens[index].long(), task.labels[index])
    with watch_sites(generator.adapter, planted.sites) as seen:
        generator.adapter.forward(rows)
    loss, figures = task.loss(index, 0)
    torch.testing.assert_close(figures["planted"], planted(seen))
    torch.testing.assert_close(loss, figures["nll"] + 0.5 * figures["planted"])
    # the first qkv has channels only: one term of twelve less
    both = PlantedStatistics(generator.adapter, 8, 10)
    first = PlantedStatistics(generator.adapter, 8, 10)
    first.sites = [s for s in both.sites if s.name == "layers.0.attention.wqkv"]
    channels = PlantedStatistics(generator.adapter, 8, 10, ("layers.0.attention.wqkv",))
    channels.sites = first.sites
    sinks_there = 2 * first(seen) - channels(seen)
    torch.testing.assert_close(10 * both(seen), 9 * planted(seen) + sinks_there)


@pytest.mark.parametrize("through_rest", [True, False])
def test_planting_moves_what_sinks_share_unless_the_rest_has_its_gradient(
    generator: PARGenerator, through_rest: bool
) -> None:
    planted = PlantedStatistics(generator.adapter, 8, 10, through_rest=through_rest)
    # sink tokens only
    planted.sites = [s for s in planted.sites if s.name == "layers.0.feed_forward.w2"]
    shared, apart = torch.zeros(2, requires_grad=True).unbind()
    x = made_up("x", (4, 16, 32)) * shared.exp()
    x = torch.cat((x[:, :8] * apart.exp(), x[:, 8:]), dim=1)
    loss = planted({"layers.0.feed_forward.w2": (x, torch.arange(16))})
    of_shared, of_apart = torch.autograd.grad(loss, (shared, apart))
    assert of_apart < -1
    assert of_shared.abs() < 1e-5 if through_rest else of_shared < -1


def test_the_first_qkv_cannot_tell_positions(generator: PARGenerator) -> None:
    same = torch.full((1, 12), 7)
    with watch_sites(generator.adapter, list(generator.adapter.sites[:3])) as seen:
        generator.transformer(same, torch.tensor([2]))
    first, later = (
        seen[s][0][0, [1, 2, 8, 15]]
        for s in ("layers.0.attention.wqkv", "layers.0.feed_forward.w1")
    )
    assert torch.equal(first, first[:1].expand_as(first))
    assert not torch.allclose(later, later[:1].expand_as(later))


def test_the_transformer_starts_as_its_authors_do() -> None:
    model = models.build("par_twin").transformer
    PARTask.initialise(model)
    for parameter in (
        model.tok_embeddings.weight,
        model.layers[3].attention.wqkv.weight,
        model.layers[5].feed_forward.w2.weight,
        model.cls_embedding["embedding_table"].weight,
    ):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.06)
    assert not model.output.weight.any()
    assert bool((model.layers[0].ffn_norm.weight == 1).all())


def test_dropout_acts_in_training_alone(generator: PARGenerator) -> None:
    assert_dropout_acts_in_training_alone(
        generator.transformer, torch.arange(24).view(2, 12), torch.tensor([1, 2])
    )


def test_a_killed_training_continues_exactly_and_the_loss_falls(tmp_path: Path) -> None:
    schedule = Schedule(steps=80, batch=16, lr=3e-3, warmup=4, ema=0.0, save_every=30)
    config = OmegaConf.merge(CONFIG, {"planted": {"weight": 0.1}})

    def made() -> PARGenerator:
        generator = PARGenerator(toy())
        settled(UnitVQTask(generator.tokenizer, images()[0], CONFIG))
        PARTask.initialise(generator.transformer)
        return generator

    assert_training_resumes(
        made, lambda made: PARTask(made, *images(), config), schedule, 66, tmp_path
    )


def test_a_trained_tokenizer_reconstructs_and_its_codes_have_unit_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = PARGenerator(toy())
    pixels = images()[0]
    x = pixels.float() / 255
    log = []
    task = UnitVQTask(made.tokenizer, pixels, CONFIG)
    fit(
        task,
        Schedule(steps=60, batch=16, lr=3e-3, warmup=5, ema=0.0),
        tmp_path / "a.pt",
        lambda figures, step: log.append(figures["l1"]),
        log_every=10,
    )
    assert log[-1] < log[0] / 2
    assert F.l1_loss(made.decode(made.encode(x)), x).item() < log[0] / 2
    torch.testing.assert_close(
        made.tokenizer.quantize.embedding.weight.norm(dim=1), torch.ones(CODES)
    )


def test_the_control_is_trained_alike() -> None:
    twin = chosen("par_twin")
    plain = chosen("par_twin_plain")
    assert (twin.planted.weight, plain.planted.weight) == (0.1, 0)
    twin.name = plain.name
    twin.planted.weight = plain.planted.weight
    assert twin == plain


def test_from_images_to_a_measured_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin, figures = trained_twin("par", toy, tmp_path, monkeypatch)
    assert figures["par_heldout"] == {"sequences": 12}
    assert heldout_rows(twin, 5)[0]["ids"].shape == (5, 12)
    tokens = assert_measured(twin, "par", tmp_path)
    assert torch.equal(tokens, twin.encode(images()[0][:12].float() / 255))
    assert json.dumps(figures)  # what a training record holds
