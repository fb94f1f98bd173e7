"""Folding is exact: with every quantizer off, the transformed model is the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.layers import Linear
from models.par.transformer import RMSNorm
from models.rar.adapter import RARAdapter
from models.rar.sampler import generate
from models.rar.transformer import RAR
from ptq import folding
from ptq.modules import OnlineTransform, QuantLinear
from ptq.types import InputTransform, NormFold, Site
from tests.reference import fill

IDS = torch.randint(40, (3, 15), generator=torch.Generator().manual_seed(0))
CONDITION = torch.tensor([41, 45, 51])  # two classes and "no class"


def tiny(dtype: torch.dtype) -> RAR:
    """Two blocks with random AdaLN weights, affine norms and biases."""
    model = fill(RAR(48, 2, 4, 192, 16, 40, 10)).to(dtype)
    for norm in (model.blocks[0].norm1, model.blocks[1].norm2):
        assert bool(((norm.weight - 1).abs() > 0.1).any())
        assert norm.bias.any()
    return model


def random_transform(seed: int, channels: int, dtype: torch.dtype) -> InputTransform:
    scale, shift = torch.randn(
        2, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return InputTransform((0.7 * scale).exp().to(dtype), shift.to(dtype))


def fold_everything(model: RAR, dtype: torch.dtype, stages: int = 1) -> None:
    adapter = RARAdapter(model)
    foldable = [site for site in adapter.sites if site.fold is not None]
    assert [s.kind for s in foldable] == ["qkv", "proj", "fc1"] * 2 + ["head"]
    for stage in range(stages):
        for i, site in enumerate(foldable):
            assert folding.apply_transform(model, site, random_transform(10 * stage + i, 48, dtype))


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max())


def logits_and_draws(model: RAR, cached: bool) -> tuple[Tensor, Tensor]:
    """Teacher-forced logits, and the probabilities that decoding step by step gives."""
    probabilities: list[Tensor] = []

    def draw(p: Tensor, step: int) -> Tensor:
        probabilities.append(p)
        return IDS[:2, min(step, 14)]

    generate(model, CONDITION[:2] - 41, draw, 1.5, 1.0, 1.0, cached)
    with torch.no_grad():
        return model(IDS, CONDITION), torch.stack(probabilities)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("stages", [1, 2])
def test_folding_into_adaln_keeps_logits_and_cached_and_uncached_decoding(
    dtype: torch.dtype, bound: float, stages: int
) -> None:
    before = tiny(dtype)
    after = tiny(dtype)
    fold_everything(after, dtype, stages)
    assert not torch.allclose(
        after.blocks[0].attn.qkv.weight, before.blocks[0].attn.qkv.weight, atol=0.1
    )
    for cached in (False, True):
        for value, reference in zip(
            logits_and_draws(after, cached), logits_and_draws(before, cached)
        ):
            assert relative(value, reference) < bound


@pytest.mark.parametrize("kappa", ["blocks.0.kappa1", "blocks.1.kappa2", "adaln_before_head.kappa"])
def test_forgetting_one_kappa_breaks_the_model(kappa: str) -> None:
    before = tiny(torch.float64)
    after = tiny(torch.float64)
    fold_everything(after, torch.float64)
    after.get_buffer(kappa).fill_(1)
    with torch.no_grad():
        assert relative(after(IDS, CONDITION), before(IDS, CONDITION)) > 1e-2


def test_folding_makes_the_site_see_the_transformed_input() -> None:
    before = tiny(torch.float64)
    after = tiny(torch.float64)
    fold_everything(after, torch.float64)
    seen: list[Tensor] = []
    for model in (before, after):
        handle = model.blocks[0].mlp.fc1.register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        )
        with torch.no_grad():
            model(IDS, CONDITION)
        handle.remove()
    assert relative(seen[1], random_transform(2, 48, torch.float64)(seen[0])) < 1e-12


class Norms(nn.Module):
    """A norm that feeds two linears, one of them without a bias."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.w1 = Linear(16, 8, bias=False)
        self.w3 = Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        return self.w1(x), self.w3(x)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shifted", [False, True])
def test_folding_into_a_norm_keeps_every_consumer(
    norm: str, dtype: torch.dtype, bound: float, shifted: bool
) -> None:
    model = fill(Norms(nn.LayerNorm(16) if norm == "layer" else RMSNorm(16, 1e-5))).to(dtype)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    transform = random_transform(3, 16, dtype)
    if not shifted:
        transform = InputTransform(transform.scale, torch.zeros_like(transform.shift))
    with torch.no_grad():
        before = model(x)
        normalised = model.norm(x)
        assert folding.apply_transform(
            model, Site("w1", "fc1", ("w1", "w3"), fold=NormFold("norm")), transform
        )
        assert relative(model.norm(x), transform(normalised)) < bound
        for value, reference in zip(model(x), before):
            assert relative(value, reference) < bound
    assert (model.w1.bias is not None) == shifted  # a shift creates what it needs, a scale does not


def test_without_a_producer_the_transform_runs_online_before_the_weight() -> None:
    linear = fill(nn.Sequential(Linear(16, 8))).double()
    x = torch.randn(5, 16, dtype=torch.float64)
    transform = random_transform(4, 16, torch.float64)
    with torch.no_grad():
        before = linear(x)
        assert not folding.apply_transform(linear, Site("0", "proj", ("0",)), transform)
        online = QuantLinear(linear[0])
        assert relative(online(x), before) > 1e-2
        online.transform = OnlineTransform(transform)
        assert relative(online(x), before) < 1e-12
