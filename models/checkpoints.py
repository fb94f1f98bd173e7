"""Reading weights: one function reads a file, one puts it into a module, and both say in one line what is wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A weights file is missing, damaged, or belongs to another model. The message is one line."""


def read(path: Path) -> dict[str, Tensor]:
    """State dict of a .safetensors file or of a PyTorch file that holds tensors only.

    Raises:
        CheckpointError: the file is missing, a directory, truncated, or holds anything but tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"weights: {path} is {'a directory' if path.is_dir() else 'missing'}, expected a file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"weights: {path} cannot be read ({str(error).splitlines()[0]})") from error


def load_into(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict that must match the module key for key and shape for shape; otherwise change nothing.

    Raises:
        CheckpointError: names the first few missing, unexpected and misshapen keys.
    """
    own = module.state_dict()
    misshapen = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own if k in state and state[k].shape != own[k].shape
    ]
    problems = [
        f"{len(keys)} {what} keys ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (
            ("missing", [k for k in own if k not in state]),
            ("unexpected", [k for k in state if k not in own]),
            ("misshapen", misshapen),
        ) if keys
    ]
    if problems:
        raise CheckpointError(f"weights: {source} does not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(state)


def digest(module: nn.Module) -> str:
    """sha256 (16 hex digits) over names and values of a module's state dict: the identity of its weights."""
    sha = hashlib.sha256()
    for key, value in module.state_dict().items():
        sha.update(key.encode())
        sha.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
