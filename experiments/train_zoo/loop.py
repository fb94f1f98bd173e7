"""A small training loop: seeded by step, resumable after a kill, on one device or on several
through torchrun."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from experiments.store.files import replacing
from ptq.types import ConfigError

Log = Callable[[Mapping[str, float], int], None]


class Task(Protocol):
    """Something to train: `model` holds the parameters and (as buffers) everything else a
    checkpoint must keep."""

    model: nn.Module
    size: int  # training samples

    def loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Loss and figures to log, for the samples `index` (B,)."""


@dataclass(frozen=True)
class Schedule:
    """Optimisation settings: AdamW, linear warm-up, cosine decay to zero, exponential moving
    average of the weights."""

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
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= world
    for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
        grad.copy_(part.view_as(grad))


def save_atomically(value: object, path: Path) -> None:
    """`torch.save` to a temporary name beside `path`, then rename: a kill never leaves half a file
    under `path`."""
    with replacing(path) as temporary:
        torch.save(value, temporary)


def fit(
    task: Task,
    schedule: Schedule,
    checkpoint: Path,
    log: Log,
    log_every: int = 100,
    identity: str = "",
) -> nn.Module:
    """Train `task` and return its model with averaged weights, in eval mode.

    Every random number of a step comes from (seed, step, rank), so a run that is killed and started
    again with the same world size continues as if nothing had happened, from the last checkpoint.

    Raises:
        ConfigError: the checkpoint belongs to a training with another `identity`; nothing is
            changed.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if schedule.batch % world:
        raise ValueError(f"batch: {schedule.batch} is not a multiple of the {world} processes")
    model = task.model
    device = next(task.model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in parameters if p.ndim >= 2]
    rest = [p for p in parameters if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": schedule.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ],
        lr=schedule.lr,
        betas=(0.9, 0.96),
        fused=device.type == "cuda",
    )
    average = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(schedule.ema), use_buffers=False
    )
    first = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["identity"] != identity:
            raise ConfigError(
                f"checkpoint: {checkpoint} is of a training with another config; delete it to start anew"
            )
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    model.train()
    started = time.time()
    for step in range(first, schedule.steps):
        torch.manual_seed(((schedule.seed * 1_000_003 + step) * 1009 + rank) % 2**63)
        index = torch.randint(task.size, (schedule.batch // world,), device=device)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss, figures = task.loss(index, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(parameters, world)
        nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimizer.step()
        average.update_parameters(model)
        done = step + 1
        if rank == 0 and (done % log_every == 0 or done == schedule.steps):
            rate = (done - first) / (time.time() - started)
            shown = {
                k: float(v.detach() if isinstance(v, Tensor) else v)
                for k, v in {**figures, "loss": loss}.items()
            }
            log(shown | {"steps_per_second": rate}, done)
        if rank == 0 and (done % schedule.save_every == 0 or done == schedule.steps):
            save_atomically(
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": done,
                    "identity": identity,
                },
                checkpoint,
            )
    model.load_state_dict(average.module.state_dict())
    return model.eval()
