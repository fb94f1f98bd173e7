"""The training loop: a killed run continues exactly, several processes train as one that sees all
their samples."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from experiments.train_zoo.loop import (
    Budget,
    Paused,
    Schedule,
    average_gradients,
    fit,
    save_atomically,
)
from tests.experiments.cells import ROOT
from tests.reference import fill, made_up

TEN = Schedule(steps=10, batch=8, lr=0.05, warmup=3, ema=0.9, seed=5, save_every=4)


class Linear:
    """A linear map fitted to noisy data, with dropout, so that every source of randomness is in
    it."""

    def __init__(self, stop: int | None = None) -> None:
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.Linear(5, 2))
        fill(self.model)
        self.model.register_buffer("seen", torch.zeros(()))
        self.size = 40
        self.stop = stop
        self.x = made_up("x", (40, 6))
        self.y = made_up("y", (40, 2))

    def loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        if step == self.stop:
            raise KeyboardInterrupt
        self.model.seen += len(index)
        loss = (self.model(self.x[index]) - self.y[index]).square().mean()
        return loss, {"double": 2 * loss}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def quiet(figures: object, step: int) -> None:
    pass


@pytest.mark.parametrize("stop", [3, 6, 9])
def test_an_interrupted_run_continues_exactly_as_if_nothing_had_happened(
    tmp_path: Path, stop: int
) -> None:
    straight = state(fit(Linear(), TEN, tmp_path / "straight.pt", quiet))
    with pytest.raises(KeyboardInterrupt):
        fit(Linear(stop), TEN, tmp_path / "killed.pt", quiet)
    assert (tmp_path / "killed.pt").exists() == (stop > 4)
    torch.rand(3)  # the global generator is somewhere else after a restart
    resumed = fit(Linear(), TEN, tmp_path / "killed.pt", quiet)
    assert not resumed.training
    assert all(torch.equal(v, straight[k]) for k, v in state(resumed).items())
    assert int(straight["seen"]) == 80


def test_a_training_in_pieces_is_that_of_one_piece(tmp_path: Path) -> None:
    straight = state(fit(Linear(), TEN, tmp_path / "straight.pt", quiet))
    for done in range(1, 10):  # no time at all: one step a piece
        with pytest.raises(
            Paused, match=f"paused after {done} of 10 steps; give the command again"
        ):
            fit(Linear(), TEN, tmp_path / "pieces.pt", quiet, budget=Budget(until=0.0))
    last = Budget(until=0.0)
    resumed = state(fit(Linear(), TEN, tmp_path / "pieces.pt", quiet, budget=last))
    assert last.earlier_s > 0
    assert all(torch.equal(v, straight[k]) for k, v in resumed.items())


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    straight = state(fit(Linear(), TEN, tmp_path / "done.pt", quiet))
    before = (tmp_path / "done.pt").stat().st_mtime_ns
    again = fit(Linear(stop=0), TEN, tmp_path / "done.pt", quiet)
    assert all(torch.equal(v, straight[k]) for k, v in state(again).items())
    assert (tmp_path / "done.pt").stat().st_mtime_ns == before


def test_training_lowers_the_loss_and_another_seed_is_another_training(tmp_path: Path) -> None:
    losses: list[float] = []
    longer = Schedule(steps=200, batch=20, lr=0.05, warmup=10, ema=0.9)
    task = Linear()
    task.y = task.x[:, :2] * 2
    model = fit(
        task,
        longer,
        tmp_path / "a.pt",
        lambda figures, step: losses.append(figures["loss"]),
        log_every=20,
    )
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 3
    other = fit(Linear(), Schedule(**{**vars(TEN), "seed": 6}), tmp_path / "b.pt", quiet)
    same = fit(Linear(), TEN, tmp_path / "c.pt", quiet)
    assert not torch.equal(other[0].weight, same[0].weight)
    assert not torch.equal(model[0].weight, same[0].weight)


def test_the_returned_weights_are_the_moving_average(tmp_path: Path) -> None:
    fit(Linear(), TEN, tmp_path / "a.pt", quiet)
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    model = fit(Linear(), TEN, tmp_path / "a.pt", quiet)
    assert torch.equal(model[0].weight, saved["average"]["module.0.weight"])
    assert not torch.equal(model[0].weight, saved["model"]["0.weight"])


def test_the_learning_rate_warms_up_linearly_and_decays_along_a_cosine() -> None:
    schedule = Schedule(steps=100, batch=1, lr=2.0, warmup=10)
    for step in range(100):
        expected = 2.0 * min(1.0, (step + 1) / 10) * (1 + math.cos(math.pi * step / 100)) / 2
        assert schedule.lr_at(step) == pytest.approx(expected)
    assert schedule.lr_at(0) == pytest.approx(0.2)
    assert schedule.lr_at(99) < 0.001
    assert Schedule(steps=10, batch=1, lr=1.0, warmup=0).lr_at(0) == 1.0


def test_figures_are_logged_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    log: list[tuple[int, dict]] = []
    fit(
        Linear(),
        TEN,
        tmp_path / "a.pt",
        lambda figures, step: log.append((step, dict(figures))),
        log_every=4,
    )
    assert [step for step, _ in log] == [4, 8, 10]
    assert all(set(figures) == {"double", "loss", "steps_per_second"} for _, figures in log)
    assert all(figures["double"] == pytest.approx(2 * figures["loss"]) for _, figures in log)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_atomically({"step": 1}, path)

    class Unsavable:
        def __reduce__(self) -> tuple:
            raise RuntimeError("killed in the middle of a save")

    with pytest.raises(RuntimeError, match="killed"):
        save_atomically({"big": torch.zeros(1000), "bad": Unsavable()}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_one_process_averages_nothing() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 5.0)
    average_gradients([parameter], 1)
    assert parameter.grad.tolist() == [5, 5, 5]


def test_a_batch_that_the_processes_cannot_share_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="batch: 8 is not a multiple of the 3 processes"):
        fit(Linear(), TEN, tmp_path / "a.pt", quiet)


SCRIPT = """
import sys
from pathlib import Path
import torch
from experiments.train_zoo.loop import Schedule, fit, start_distributed
from tests.experiments.train_zoo.test_training import TEN, Deterministic, quiet
torch.set_num_threads(1)
rank, world, device = start_distributed()
assert (world, device.type) == (2, "cpu")
model = fit(Deterministic(), TEN, Path(sys.argv[1]) / "checkpoint.pt", quiet)
torch.save(model.state_dict(), Path(sys.argv[1]) / f"rank{rank}.pt")
torch.distributed.destroy_process_group()
"""


class Deterministic(Linear):
    """No dropout. As one process, draws what two processes draw and sees both halves."""

    def __init__(self, halves: int = 1) -> None:
        super().__init__()
        self.model[1].p = 0.0
        self.halves = halves

    def loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        if self.halves == 2:
            parts = []
            for rank in range(2):
                torch.manual_seed((TEN.seed * 1_000_003 + step) * 1009 + rank)
                parts.append(torch.randint(self.size, (TEN.batch // 2,)))
            index = torch.cat(parts)
        return super().loss(index, step)


def test_two_processes_train_as_one_that_sees_both_halves_of_the_batch(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "train.py"), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    one = state(fit(Deterministic(2), TEN, tmp_path / "one.pt", quiet))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for key in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert torch.equal(ranks[0][key], ranks[1][key])
        assert torch.allclose(ranks[0][key], one[key], atol=1e-5)
