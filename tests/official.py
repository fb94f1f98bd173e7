"""Made-up weights as official files: the authors' file names, and what their scripts saved around
the weights."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from models import registry

ARGS = argparse.Namespace(lr=1e-4, epochs=800, output_dir="out", distributed=True)
OPTIMIZER = {
    "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}},
    "param_groups": [{"params": [0]}],
}


def wrapped(family: str, part: str, state: dict[str, Tensor]) -> object:
    """The object that the authors' training scripts saved."""
    if family in ("par", "llamagen"):
        return {"model": state, "optimizer": OPTIMIZER, "steps": 450_000, "args": ARGS}
    if family == "mar" and part == "transformer":
        unaveraged = {k: torch.zeros(1).expand(v.shape) for k, v in state.items()}
        return {
            "model": unaveraged,
            "model_ema": state,
            "optimizer": OPTIMIZER,
            "epoch": 799,
            "scaler": {"scale": 65536.0},
            "args": ARGS,
        }
    if family == "mar":
        return {"model": {**state, "loss.logvar": torch.zeros(())}}
    return state


def save_official(name: str, part: str, module: nn.Module, folder: Path) -> Path:
    """Write a module (`transformer` or `tokenizer` of a preset) as its official file; returns the
    path."""
    path = folder / Path(registry.source_of(name, part).file).name
    torch.save(wrapped(registry.find_preset(name).family, part, module.state_dict()), path)
    return path
