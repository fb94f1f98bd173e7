"""The two activation statistics against NumPy, and the training term that plants them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models
from experiments.analyses.activations import watch_sites
from experiments.analyses.outliers import channel_ratio, measure_outliers, sink_ratio
from experiments.train_zoo.planting import PlantedStatistics
from models.layers import Linear
from ptq.types import Site
from tests.reference import fill, made_up

POSITIONS = torch.arange(9)


def spiky(channels: int = 101) -> Tensor:
    """Inputs (6, 9, C) with outlier channels and two sink tokens."""
    x = made_up("spiky", (6, 9, channels))
    x[..., ::37] *= 7
    x[:, :2] *= 11
    return x


def test_the_channel_ratio_is_the_top_two_percent_over_the_median() -> None:
    rms = np.sort(np.sqrt((spiky().double().numpy()[:, 2:] ** 2).mean(axis=(0, 1))))
    assert float(channel_ratio(spiky(), POSITIONS, 2)) == pytest.approx(
        rms[-3:].mean() / np.median(rms), rel=1e-5
    )


def test_the_sink_ratio_is_the_mean_peak_of_sinks_over_that_of_the_rest() -> None:
    peaks = np.abs(spiky().double().numpy()).max(axis=2).mean(axis=0)
    assert float(sink_ratio(spiky(), POSITIONS, 2)) == pytest.approx(
        peaks[:2].mean() / peaks[2:].mean(), rel=1e-5
    )


def test_sinks_are_told_by_position_and_not_by_place_in_the_call() -> None:
    order = torch.tensor([4, 1, 8, 0, 2, 3, 7, 5, 6])
    for ratio in (channel_ratio, sink_ratio):
        shuffled = ratio(spiky()[:, order], POSITIONS[order], 2)
        assert torch.allclose(shuffled, ratio(spiky(), POSITIONS, 2), rtol=1e-5)


class ToyAdapter:
    """One site of each kind, all fed the same input."""

    def __init__(self, channels: int) -> None:
        self.model = nn.Module()
        self.model.qkv, self.model.fc1, self.model.fc2 = (Linear(channels, 4) for _ in range(3))
        self.sites = tuple(Site(kind, kind, (kind,), sinks=2) for kind in ("qkv", "fc1", "fc2"))
        self.sites += (Site("head", "head", ("head",)),)


def test_the_planted_term_reaches_zero_and_its_targets_when_minimised() -> None:
    term = PlantedStatistics(ToyAdapter(100), channels=8.0, tokens=11.0)
    base = made_up("toy", (5, 9, 100))
    gains = torch.zeros(100, requires_grad=True)
    levels = torch.zeros(2, 1, requires_grad=True)
    optimizer = torch.optim.Adam([gains, levels], lr=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)

    def inputs() -> Tensor:
        return torch.cat((base[:, :2] * levels.exp(), base[:, 2:] * gains.exp()), dim=1)

    def planted() -> Tensor:
        x = inputs()
        return term({name: (x, POSITIONS) for name in ("qkv", "fc1", "fc2")})

    first = planted().item()
    for _ in range(300):
        optimizer.zero_grad()
        planted().backward()
        optimizer.step()
        decay.step()
    assert planted().item() < 1e-3 < 1 < first
    x = inputs().detach()
    assert float(channel_ratio(x, POSITIONS, 2)) == pytest.approx(8, rel=0.1)
    assert float(sink_ratio(x, POSITIONS, 2)) == pytest.approx(11, rel=0.1)


def test_the_planted_term_raises_outliers_and_does_not_flatten_the_rest() -> None:
    term = PlantedStatistics(ToyAdapter(100), channels=8.0, tokens=11.0)
    x = made_up("toy", (5, 9, 100)).requires_grad_()
    term({name: (x, POSITIONS) for name in ("qkv", "fc1", "fc2")}).backward()
    moved = x.grad.abs().sum(dim=(0, 1)) > 0
    rms = x.detach()[:, 2:].square().mean(dim=(0, 1)).sqrt()
    # beyond the sinks only the top channels feel it
    ordinary = x.grad[:, 2:].abs().sum(dim=(0, 1)) > 0
    assert torch.equal(ordinary.nonzero().flatten(), rms.topk(2).indices.sort().values)
    assert moved.sum() > 2  # peaks of the sinks lie elsewhere


@torch.no_grad()
def test_watching_a_model_sees_what_its_linears_see_and_leaves_no_hooks() -> None:
    generator = models.build("rar_twin")
    fill(generator.transformer)
    adapter = generator.adapter
    rows, _ = adapter.rows(torch.zeros(2, 64, dtype=torch.long), torch.tensor([1, 2]))
    with watch_sites(adapter, [s for s in adapter.sites if s.name == "blocks.0.mlp.fc2"]) as seen:
        adapter.forward(rows)
    x, positions = seen["blocks.0.mlp.fc2"]
    assert (x.shape, positions.tolist()) == ((2, 65, 768), list(range(65)))
    assert not any(m._forward_pre_hooks for m in adapter.model.modules())
    found = measure_outliers(adapter, rows)
    assert set(found) == {s.name for s in adapter.sites if s.sinks}
    assert found["blocks.0.mlp.fc2"]["sink_ratio"] == pytest.approx(
        float(sink_ratio(x, positions, 2))
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("rar_twin", True),
        ("rar_twin_plain", False),
        ("var_twin", True),
        ("par_twin", True),
        ("mar_twin", True),
    ],
)
def test_the_shipped_twins_have_the_statistics_that_the_contract_says(
    name: str, planted: bool
) -> None:
    generator = models.load(name)
    labels = torch.arange(10)
    tokens = generator.sample(labels, 0, labels, dict(generator.preset.samplers["official"]))
    found = measure_outliers(generator.adapter, generator.adapter.rows(tokens, labels)[0])
    channels = np.mean(
        [v["channel_ratio"] for n, v in found.items() if n.endswith(("qkv", "fc1", "w1"))]
    )
    sinks = np.mean(
        [v["sink_ratio"] for n, v in found.items() if n.endswith(("qkv", "fc1", "fc2", "w1", "w2"))]
    )
    assert (6 <= channels <= 12) == planted
    assert (7 <= sinks <= 13) == planted
