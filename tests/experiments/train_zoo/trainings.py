"""What the tests of the twins' trainings share: made-up images, trainings that are killed, the
shipped recipes run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

import models
from experiments.config.compose import CONF
from experiments.data import fashion_mnist
from experiments.run import scoring
from experiments.store.tracking import Tracker
from experiments.train_zoo import trainers
from experiments.train_zoo.loop import Schedule, Task, fit
from models import registry
from models.preset import Preset
from models.registry import TokenGenerator
from tests.experiments.cells import config_of
from tests.reference import made_up_ints


def images(n: int = 40) -> tuple[Tensor, Tensor]:
    """uint8 images (n, 3, 8, 8), blocks of 4x4 of even colour that the class decides, and classes
    (n,)."""
    labels = torch.arange(n) % 10
    blocks = made_up_ints("blocks", (10, 3, 2, 2), 256)[labels]
    return blocks.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8), labels


def killed_at(task: Task, stop: int | None) -> Task:
    """The task, whose step `stop` ends like a killed process."""
    loss = task.loss

    def killed(index: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        if step == stop:
            raise KeyboardInterrupt
        return loss(index, step)

    task.loss = killed
    return task


def assert_resumes(train: Callable[[str, int | None], nn.Module], stop: int) -> None:
    """`train(checkpoint, stop)` gives the same weights straight on and, from another checkpoint,
    after a kill."""
    straight = {k: v.clone() for k, v in train("straight.pt", None).state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        train("killed.pt", stop)
    resumed = train("killed.pt", None).state_dict()
    assert all(torch.equal(v, resumed[k]) for k, v in straight.items())


def assert_training_resumes(
    made: Callable[[], TokenGenerator],
    task_of: Callable[[TokenGenerator], Task],
    schedule: Schedule,
    stop: int,
    folder: Path,
) -> None:
    """Training the transformer of `made()` with dropout continues exactly after a kill, and its
    loss falls."""
    log: dict[str, list[float]] = {}

    def train(name: str, stop: int | None) -> nn.Module:
        torch.manual_seed(0)
        generator = made()
        losses = log.setdefault(name, [])
        generator.transformer.set_dropout(0.1)
        fit(
            killed_at(task_of(generator), stop),
            schedule,
            folder / name,
            lambda figures, step: losses.append(figures["nll"]),
            log_every=10,
        )
        return generator.transformer

    assert_resumes(train, stop)
    assert log["straight.pt"][0] > log["straight.pt"][-1] + 0.3


def assert_dropout_acts_in_training_alone(model: nn.Module, *inputs: Tensor) -> None:
    model.set_dropout(0.5)
    still = model(*inputs)
    assert torch.equal(still, model(*inputs))
    model.train()
    assert not torch.equal(model(*inputs), model(*inputs))
    model.set_dropout(0.0)
    assert torch.equal(still, model(*inputs))


def chosen(name: str, **changes: object) -> DictConfig:
    """The shipped training config of `name`, shortened."""
    with initialize_config_dir(str(CONF / "train_zoo"), version_base="1.3"):
        config = compose("config", [f"model={name}"]).model
    OmegaConf.set_struct(config, False)
    short = {"schedule": {"steps": 4, "batch": 8, "warmup": 2}} if "schedule" in config else {}
    return OmegaConf.merge(config, {"data": None, **short, **changes})


def trained_twin(
    family: str, toy: Callable[[str], Preset], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[TokenGenerator, dict[str, dict]]:
    """The twin after every step of its family's shipped recipes, in their order, on made-up images;
    and all figures."""
    pixels = images()
    twins = (f"{family}_twin", f"{family}_twin_plain")
    monkeypatch.setattr(fashion_mnist, "load_split", lambda split, folder=None: pixels)
    monkeypatch.setattr(registry, "ZOO", folder)
    for name in twins:
        monkeypatch.setitem(registry.PRESETS, name, toy(name))
    figures = {}
    for name in (f"{family}_tokenizer", f"{family}_heldout", *twins):
        config = chosen(name, **({"n": 12} if name.endswith("heldout") else {}))
        with Tracker(folder / "logs", "none", {}) as tracker:
            figures[name] = trainers.TRAINERS[config.task](config, *pixels, folder, tracker)
    return models.load(twins[0]), figures


def assert_measured(twin: TokenGenerator, family: str, folder: Path) -> Tensor:
    """NLL on the stored tokens is the mean of their log-probabilities, the twin samples; returns
    the tokens."""
    config = config_of(f"model={family}_twin", "method=fp", "eval.sequences=12", "device=cpu")
    nll = scoring.score_held_out(twin, twin, config, torch.device("cpu"))["nll"]
    stored = {k: v.long() for k, v in load_file(folder / f"{family}_heldout.safetensors").items()}
    logs = twin.log_probs(stored["tokens"], stored["labels"])
    assert nll == pytest.approx(
        F.nll_loss(logs.flatten(0, 1), stored["tokens"].flatten()).item(), rel=1e-5
    )
    made = twin.decode(
        twin.sample(torch.arange(3), 0, torch.arange(3), dict(twin.preset.samplers["official"]))
    )
    assert made.shape == (3, 3, 8, 8)
    assert not list(folder.glob("*.checkpoint.pt"))
    return stored["tokens"]
