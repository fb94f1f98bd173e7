"""A small training loop: seeded by step, resumable after a kill, on one device or several."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.weights import checkpoints
from ptq.files import replacing
from ptq.types import ConfigError

FIELDS = {"model", "average", "optimizer", "step", "identity"}  # of a checkpoint
Log = Callable[[Mapping[str, float], int], None]


class Paused(Exception):
    """A training stopped at its limit of time, after writing a checkpoint."""

    def __init__(self, done: int, steps: int) -> None:
        super().__init__(f"paused after {done} of {steps} steps; give the command again to go on")


@dataclass
class Budget:
    """The time that a training has, and what it took before.

    Attributes:
        until: time (of `time.time`) after which it pauses; only of a single process, since several
            would not pause at the same step.
        earlier_s: seconds of the steps before the checkpoint that it went on from.
    """

    until: float = math.inf
    earlier_s: float = 0.0


class Task(Protocol):
    """Something to train: `model` holds parameters and, as buffers, what else is to be kept."""

    model: nn.Module
    size: int  # training samples

    def loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Loss and figures to log, for the samples `index` (B,)."""


@dataclass(frozen=True)
class Schedule:
    """Optimisation settings: AdamW, linear warm-up, cosine decay to zero, averaged weights."""

    steps: int
    batch: int
    lr: float
    warmup: int = 200
    weight_decay: float = 0.03
    ema: float = 0.999
    clip: float = 1.0
    seed: int = 0
    save_every: int = 1000

    def lr_at(self, step: int) -> float:
        # without a warm-up the first step has the full rate
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def start_distributed() -> tuple[int, int, torch.device]:
    """Rank, world size and device of this process, from torchrun's environment if there is one."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return 0, 1, torch.device("cuda" if cuda else "cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    local = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local)
    return dist.get_rank(), dist.get_world_size(), torch.device(f"cuda:{local}" if cuda else "cpu")


def average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """Mean of the gradients over all processes, in one flat reduction."""
    if world == 1:
        return
    gradients = [each.grad for each in parameters if each.grad is not None]
    flat = torch.cat(list(map(torch.flatten, gradients)))  # (all numbers,)
    dist.all_reduce(flat)
    flat /= world
    begin = 0
    for gradient in gradients:
        end = begin + gradient.numel()
        gradient.copy_(flat[begin:end].view_as(gradient))
        begin = end


def save_atomically(value: object, path: Path) -> None:
    """`torch.save` beside `path`, then rename: a kill never leaves half a file."""
    # through a file of Python's, which says why it cannot be written
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(value, file)


class Training:
    """A task's model with its optimizer and the moving average of its weights.

    Args:
        identity: of the config; a checkpoint of another one is refused.
    """

    def __init__(self, task: Task, schedule: Schedule, identity: str) -> None:
        self.task = task
        self.schedule = schedule
        self.identity = identity
        self.model = task.model
        self.earlier_s = 0.0  # seconds of steps before the checkpoint
        self.device = next(self.model.parameters()).device
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.parameters, schedule, self.device)
        # buffers are copied, not averaged
        self.average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(schedule.ema), use_buffers=False
        )

    def load(self, checkpoint: Path) -> int:
        """Continue from a checkpoint, if there is one; returns the steps that are done.

        Raises:
            ConfigError: it is damaged, or belongs to a training with another identity; nothing is
                changed.
        """
        if not checkpoint.is_file():
            return 0
        state = read_checkpoint(checkpoint)
        if state["identity"] != self.identity:
            raise ConfigError(
                f"checkpoint: {checkpoint} is of a training with another config; "
                "delete it to start anew"
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.earlier_s = state.get("seconds", 0.0)  # older checkpoints do not say
        return state["step"]

    def save(self, checkpoint: Path, step: int, seconds: float) -> None:
        """Write all that continuing needs, after `step` steps and so many seconds of them."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": step,
            "identity": self.identity,
            "seconds": self.earlier_s + seconds,
        }
        save_atomically(state, checkpoint)

    def take_step(self, step: int, rank: int, world: int) -> dict[str, float | Tensor]:
        """One step of the optimizer; the loss and the task's figures.

        Every random number of it comes from (seed, step, rank).
        """
        seed = (self.schedule.seed * 1_000_003 + step) * 1009 + rank
        torch.manual_seed(seed % 2**63)
        batch = self.schedule.batch // world  # of this process
        index = torch.randint(self.task.size, (batch,), device=self.device)  # (batch,)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr_at(step)
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on_gpu):
            loss, figures = self.task.loss(index, step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.parameters, world)
        # after averaging, so that all processes clip by the same norm
        nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        return {**figures, "loss": loss}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `Training.save` wrote, whose archive has checksums of all its tensors.

    Raises:
        ConfigError: it is damaged, or no such file.
    """
    try:
        state = checkpoints.read_pickle(path)
        lacking = FIELDS - set(state)
    except Exception as error:  # damaged bytes make the reader fail in any way
        raise ConfigError(
            f"checkpoint: {path} cannot be read ({checkpoints.error_gist(error)}); "
            "delete it to start anew"
        ) from error
    if lacking:
        raise ConfigError(
            f"checkpoint: {path} is none of a training, it lacks {', '.join(sorted(lacking))}; "
            "delete it to start anew"
        )
    return state


def build_optimizer(
    parameters: list[nn.Parameter], schedule: Schedule, device: torch.device
) -> torch.optim.AdamW:
    """AdamW that decays matrices, and neither biases nor gains."""
    matrices = []
    vectors = []
    for parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": schedule.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=schedule.lr,
        betas=(0.9, 0.96),
        fused=device.type == "cuda",
    )


def fit(
    task: Task,
    schedule: Schedule,
    checkpoint: Path,
    log: Log,
    log_every: int = 100,
    identity: str = "",
    budget: Budget | None = None,
) -> nn.Module:
    """Train `task` and return its model with averaged weights, in eval mode.

    Every random number of a step comes from (seed, step, rank), so a run that is killed and started
    again with the same world size continues as if nothing had happened, from the last checkpoint.

    Raises:
        ConfigError: the checkpoint belongs to a training with another `identity`; nothing is
            changed.
        Paused: its `budget` of time is spent; the checkpoint is written.
    """
    budget = budget or Budget()
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    if schedule.batch % world:
        raise ConfigError(
            f"schedule.batch: {schedule.batch} is not a multiple of the {world} processes"
        )
    training = Training(task, schedule, identity)
    first = training.load(checkpoint)
    budget.earlier_s = training.earlier_s
    training.model.train()
    started = time.time()
    for step in range(first, schedule.steps):
        figures = training.take_step(step, rank, world)
        done = step + 1
        is_last = done == schedule.steps
        if rank == 0 and (done % log_every == 0 or is_last):
            numbers = {name: as_number(figure) for name, figure in figures.items()}
            numbers["steps_per_second"] = (done - first) / (time.time() - started)
            log(numbers, done)
        # one process writes for all: they have taken the same steps
        pauses = time.time() > budget.until and not is_last
        if rank == 0 and (done % schedule.save_every == 0 or is_last or pauses):
            training.save(checkpoint, done, time.time() - started)
        if pauses:
            raise Paused(done, schedule.steps)
    training.model.load_state_dict(training.average.module.state_dict())
    return training.model.eval()


def as_number(figure: float | Tensor) -> float:
    """A figure to log, off its device."""
    return float(figure.detach() if isinstance(figure, Tensor) else figure)
