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
from safetensors import SafetensorError
from torch import Tensor

from ptq.errors import say
from ptq.files import OWNER, DamagedFile, digest_tensors, read_tensors, write_tensors
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
    try:
        write_tensors(tensors, path, {OWNER: key, "seconds": f"{seconds:.3f}"})
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"omniquant: {path} cannot be written ({error})") from error


def training_seconds(path: Path) -> float:
    """How long the finished blocks in a file took, in all processes; 0 if there is no whole one."""
    if not path.is_file():
        return 0.0
    try:
        _, metadata = read_tensors(path)
    except DamagedFile:  # whoever reads its blocks says so
        return 0.0
    return float(metadata["seconds"])


def read_blocks(path: Path, adapter: Adapter, key: str) -> dict[str, TrainedBlock]:
    """The finished blocks in a file; none if there is no such file.

    One that is damaged or has another key is named, and its blocks are trained anew.
    """
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
    if not path.is_file():
        return {}
    try:
        return read_tensors(path, key, device=str(device))[0]
    except DamagedFile as error:
        say(f"made anew: {error}")
        return {}


def _names_before(tensors: Mapping[str, Tensor], ending: str) -> list[str]:
    """The names that end so, without the ending."""
    return [name.removesuffix(ending) for name in tensors if name.endswith(ending)]
