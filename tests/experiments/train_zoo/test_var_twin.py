"""Training of the VAR twins: the losses are what they should be and fall; what was trained loads
and is measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

import models
from experiments.analyses.activations import watch_sites
from experiments.statistics import heldout_rows
from experiments.train_zoo.loop import Schedule
from experiments.train_zoo.planting import PlantedStatistics
from experiments.train_zoo.tasks.var import MultiScaleVQTask, VARTask
from models.preset import Preset
from models.var.generator import VARGenerator
from models.var.presets import PRESETS
from models.var.tokenizer import VQVAE
from tests.experiments.train_zoo.trainings import (
    assert_dropout_acts_in_training_alone,
    assert_measured,
    assert_training_resumes,
    images,
    trained_twin,
)
from tests.reference import fill

SIZES = dict(vocab_size=24, z_channels=6, patch_nums=(1, 2, 4))
LENGTH = 21
CONFIG = OmegaConf.create(
    dict(
        commitment=0.25,
        label_dropout=0.1,
        schedule=dict(steps=8),
        planted=dict(weight=0, channels=8, tokens=10),
    )
)


def toy(name: str = "var_twin") -> Preset:
    """A twin of 8x8 images."""
    return replace(
        PRESETS[name],
        transformer=dict(depth=2, embed_dim=32, num_heads=2, num_classes=10, **SIZES),
        tokenizer=dict(ch=32, ch_mult=(1, 1), num_res_blocks=1, **SIZES),
        image_size=8,
        tokens=LENGTH,
    )


@pytest.fixture
def generator() -> VARGenerator:
    made = VARGenerator(toy())
    fill(made.transformer)
    fill(made.tokenizer)
    return made


def settled(tokenizer: VQVAE, step: int = 3) -> MultiScaleVQTask:
    """A tokenizer's task a few steps into its training, with convolutions that are no longer the
    identity."""
    task = MultiScaleVQTask(tokenizer, images()[0], CONFIG)
    for i in range(step):
        task.loss(torch.arange(16) + i, i)
    with torch.no_grad():
        for phi in tokenizer.quantize.quant_resi.parameters():
            phi += 0.1 * torch.randn(phi.shape, generator=torch.Generator().manual_seed(0))
    return task


def test_the_quantization_loss_is_that_of_its_formula(generator: VARGenerator) -> None:
    task = settled(generator.tokenizer)
    tokenizer = generator.tokenizer
    index = torch.arange(12)
    quantizer = tokenizer.quantize
    codes, count, total = (
        t.clone() for t in (quantizer.embedding.weight, task.model.count, task.model.total)
    )
    loss, figures = task.loss(index, 3)

    x = task.images[index].double() / 255 * 2 - 1
    f = tokenizer.encode_features(x.float())
    so_far = torch.zeros_like(f)
    terms = []
    rests = []
    ids = []
    for scale, side in enumerate(SIZES["patch_nums"]):
        rest = F.adaptive_avg_pool2d(f - so_far, side).permute(0, 2, 3, 1).reshape(-1, 6)
        nearest = torch.cdist(rest, codes).argmin(dim=1)
        up = F.interpolate(
            codes[nearest].view(12, side, side, 6).permute(0, 3, 1, 2), size=(4, 4), mode="bicubic"
        )
        phi = quantizer.phi(scale)
        so_far = so_far + 0.5 * up + 0.5 * F.conv2d(up, phi.weight, phi.bias, padding=1)
        terms.append(1.25 * (so_far - f).square().mean())  # both halves have the same value
        rests.append(rest)
        ids.append(nearest)
    expected = sum(terms) / 3
    decoded = tokenizer.decode_features(so_far)
    torch.testing.assert_close(figures["quantization"], expected)
    reconstruction = (decoded - x).abs().mean() + (decoded - x).square().mean()
    torch.testing.assert_close(loss, (reconstruction + expected).float())

    rest = torch.cat(rests)
    chosen = torch.cat(ids)
    for code in range(24):  # running means, one code at a time
        mine = rest[chosen == code]
        new_count = 0.99 * count[code] + 0.01 * len(mine)
        new_total = 0.99 * total[code] + 0.01 * mine.sum(0)
        torch.testing.assert_close(
            quantizer.embedding.weight[code], new_total / new_count, rtol=1e-4, atol=1e-5
        )


def test_what_is_decoded_in_training_is_what_the_tokens_decode_to(generator: VARGenerator) -> None:
    task = settled(generator.tokenizer)
    quantizer = generator.tokenizer.quantize
    f = generator.tokenizer.encode_features(torch.rand(4, 3, 8, 8) * 2 - 1).detach()
    expected = quantizer.features(quantizer(f))[-1]
    f.requires_grad_()
    quantized, loss = task.quantize(f, 3)
    torch.testing.assert_close(quantized, expected)
    weight = torch.randn_like(f)
    assert torch.equal(
        torch.autograd.grad((quantized * weight).sum(), f, retain_graph=True)[0], weight
    )
    loss.backward()
    assert f.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in quantizer.phi(0).parameters())
    assert quantizer.embedding.weight.grad is None


def test_a_tokenizer_starts_with_features_as_codes_and_no_convolutions() -> None:
    tokenizer = VARGenerator(toy()).tokenizer
    task = MultiScaleVQTask(tokenizer, images()[0], CONFIG)
    h = torch.randn(2, 6, 4, 4)
    for scale in range(3):
        torch.testing.assert_close(tokenizer.quantize.phi(scale)(h), h)
    task.loss(torch.arange(40), 0)
    f = tokenizer.encode_features(task.images / 255 * 2 - 1)
    pooled = torch.cat([tokenizer.quantize.pool(f, scale) for scale in range(3)], dim=1).flatten(
        0, 1
    )
    apart = (tokenizer.quantize.embedding.weight[:, None] - pooled).norm(dim=-1)
    assert apart.min(dim=1).values.max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_the_transformers_loss_is_the_mean_nll_of_all_scales(
    generator: VARGenerator, dropout: float
) -> None:
    pixels, labels = images()
    task = VARTask(generator, pixels, labels, OmegaConf.merge(CONFIG, {"label_dropout": dropout}))
    index = torch.tensor([3, 17, 8])
    given = labels[index] if dropout == 0 else torch.full((3,), 10)
    logs = generator.log_probs(task.tokens[index].long(), given)
    expected = (
        -sum(
            logs[b, t, task.tokens[i, t].long()] for b, i in enumerate(index) for t in range(LENGTH)
        )
        / 63
    )
    loss, figures = task.loss(index, 0)
    torch.testing.assert_close(loss, expected)
    assert figures == {"nll": loss}
    assert torch.equal(task.tokens.long(), generator.encode(pixels.float() / 255))


def test_planted_statistics_come_on_top(generator: VARGenerator) -> None:
    config = OmegaConf.merge(CONFIG, {"label_dropout": 0.0, "planted": {"weight": 0.5}})
    task = VARTask(generator, *images(), config)
    planted = PlantedStatistics(generator.adapter, 8, 10)
    assert [s.name for s in planted.sites[:3]] == [
        "blocks.0.attn.mat_qkv",
        "blocks.0.ffn.fc1",
        "blocks.0.ffn.fc2",
    ]
    assert len(planted.sites) == 6
    index = torch.arange(5)
    rows, _ = generator.adapter.rows(task.tokens[index].long(), task.labels[index])
    with watch_sites(generator.adapter, planted.sites) as seen:
        generator.adapter.forward(rows)
    loss, figures = task.loss(index, 0)
    torch.testing.assert_close(figures["planted"], planted(seen))
    torch.testing.assert_close(loss, figures["nll"] + 0.5 * figures["planted"])


def test_the_transformer_starts_as_its_authors_do() -> None:
    model = models.build("var_twin").transformer
    VARTask.initialise(model)
    std = (3 * 160) ** -0.5
    dim = 160
    block = model.blocks[2]
    assert block.attn.mat_qkv.weight.std().item() == pytest.approx(std, rel=0.05)
    assert block.ffn.fc2.weight.std().item() == pytest.approx(std / math.sqrt(12), rel=0.05)
    assert block.ada_lin[1].weight[: 2 * dim].std().item() == pytest.approx(1e-3 * std, rel=0.05)
    assert block.ada_lin[1].weight[2 * dim :].std().item() == pytest.approx(0.5 * std, rel=0.05)
    assert model.pos_1LC.std().item() == pytest.approx(std, rel=0.05)
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("bias"))
    assert block.attn.scale_mul_1H11.flatten().tolist() == pytest.approx([math.log(4)] * 5)


def test_dropout_acts_in_training_alone(generator: VARGenerator) -> None:
    assert_dropout_acts_in_training_alone(
        generator.transformer, torch.tensor([1, 2]), torch.randn(2, LENGTH - 1, 6)
    )


def test_a_killed_training_continues_exactly_and_the_loss_falls(tmp_path: Path) -> None:
    schedule = Schedule(steps=40, batch=16, lr=3e-3, warmup=4, ema=0.5, save_every=15)
    config = OmegaConf.merge(CONFIG, {"planted": {"weight": 0.1}})

    def made() -> VARGenerator:
        generator = VARGenerator(toy())
        settled(generator.tokenizer)
        VARTask.initialise(generator.transformer)
        return generator

    assert_training_resumes(
        made, lambda made: VARTask(made, *images(), config), schedule, 33, tmp_path
    )


def test_from_images_to_a_measured_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin, figures = trained_twin("var", toy, tmp_path, monkeypatch)
    assert figures["var_heldout"] == {"sequences": 12}
    assert heldout_rows(twin, 5)[0]["ids"].shape == (5, 5)
    assert_measured(twin, "var", tmp_path)
    assert json.dumps(figures)  # what a training record holds
