"""The file that keeps OmniQuant's finished blocks, so that a killed training goes on with the next.

    <block>.losses (epochs,)    <site>.scale, <site>.shift (C,)    <linear>.low, <linear>.high (O,)

Its metadata hold the key of what training depends on, and the seconds that training took so far.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptq.calibration import digest_tensors
from ptq.files import replacing
from ptq.numbers.quantizers import Clip
from ptq.recipe import Recipe
from ptq.sites import Adapter, Rows
from ptq.spec import ConfigError
from ptq.transform import InputTransform


@dataclass(frozen=True)
class TrainedBlock:
    """What came out of the training of a block.

    Attributes:
        transforms: by site.
        clips: by linear.
        losses: mean loss of every epoch (epochs,).
    """

    transforms: Mapping[str, InputTransform]
    clips: Mapping[str, Clip]
    losses: Tensor


def block_file_key(adapter: Adapter, recipe: Recipe, rows: Rows) -> str:
    """What training depends on, in 64 hex digits: recipe, weights and calibration rows."""
    model = adapter.model
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    text = f"{recipe} {adapter.layout} {digest_tensors(state)} {digest_tensors(rows)}"
    return hashlib.sha256(text.encode()).hexdigest()


def write_blocks(path: Path, trained: Mapping[str, TrainedBlock], key: str, seconds: float) -> None:
    """Write finished blocks and the seconds spent on them; `path` appears complete or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for block, result in trained.items():
        tensors[f"{block}.losses"] = result.losses
        for site, transform in result.transforms.items():
            tensors[f"{site}.scale"] = transform.scale
            tensors[f"{site}.shift"] = transform.shift
        for linear, clip in result.clips.items():
            tensors[f"{linear}.low"] = clip.low
            tensors[f"{linear}.high"] = clip.high
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(stored, temporary, {"identity": key, "seconds": f"{seconds:.3f}"})
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"omniquant: {path} cannot be written ({error})") from error


def training_seconds(path: Path) -> float:
    """How long the finished blocks in a file took, in all processes; 0 if there is no such file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (FileNotFoundError, SafetensorError):
        return 0.0
    return float(metadata.get("seconds", 0.0))


def read_blocks(path: Path, adapter: Adapter, key: str) -> dict[str, TrainedBlock]:
    """The finished blocks in a file; none if there is no such file, or one with another key."""
    tensors = _read_tensors(path, next(adapter.model.parameters()).device, key)
    trained: dict[str, TrainedBlock] = {}
    for block in adapter.blocks:
        losses = tensors.get(f"{block}.losses")
        if losses is None:
            continue
        own = {name: value for name, value in tensors.items() if name.startswith(f"{block}.")}
        transforms: dict[str, InputTransform] = {}
        for site in _names_before(own, ".scale"):
            transforms[site] = InputTransform(own[f"{site}.scale"], own[f"{site}.shift"])
        clips: dict[str, Clip] = {}
        for linear in _names_before(own, ".low"):
            clips[linear] = Clip(own[f"{linear}.low"], own[f"{linear}.high"])
        trained[block] = TrainedBlock(transforms, clips, losses)
    return trained


def _read_tensors(path: Path, device: torch.device, key: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt", str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != key:
                return {}
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        return {}


def _names_before(tensors: Mapping[str, Tensor], ending: str) -> list[str]:
    """The names that end so, without the ending."""
    return [name.removesuffix(ending) for name in tensors if name.endswith(ending)]
