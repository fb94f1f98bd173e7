"""Reading weights: one function reads a file, one puts it into a module, and both say in one line
what is wrong.

A pickle is a program. PyTorch's restricted unpickler runs it with an allow-list: tensors, plain
containers, and the `argparse.Namespace` in which training scripts keep their arguments. A file that
asks for anything else is refused.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# entries that hold the weights; the first one present counts
WRAPPERS = ("model_ema", "model", "module", "state_dict")
# what training scripts keep beside the weights; anything else that holds tensors is an error
SIBLINGS = frozenset(
    {
        "model",
        "optimizer",
        "optimizers",
        "optimizer_states",
        "optimizer_disc",
        "discriminator",
        "scaler",
        "scheduler",
        "lr_scheduler",
        "lr_schedulers",
        "callbacks",
        "loops",
        "args",
        "config",
        "hyper_parameters",
        "epoch",
        "step",
    }
)
PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile


class CheckpointError(ValueError):
    """A weights file is missing, damaged, or belongs to another model. The message is one line."""


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """State dict of a .safetensors file or of a PyTorch file, freed of wrappers and prefixes;
    dtypes as in the file.

    Raises:
        CheckpointError: the file is missing, a directory, damaged, or holds anything but tensors
            and plain values.
    """
    if not path.is_file():
        raise CheckpointError(
            f"weights: {path} is {'a directory' if path.is_dir() else 'missing'}, expected a file"
        )
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes make the readers fail in any way
        raise CheckpointError(f"weights: {path} cannot be read ({_error_gist(error)})") from error
    return _unwrap_state(content, path)


def _read_pickle(path: Path) -> object:
    """Content of a `torch.save` file; archives (PyTorch 1.6 and later) are mapped into memory after
    a checksum test."""
    archive = zipfile.is_zipfile(path)
    if archive:
        with zipfile.ZipFile(path) as members:
            damaged = members.testzip()
        if damaged is not None:
            raise CheckpointError(f"weights: {path} is damaged: the checksum of {damaged} differs")
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)


def _error_gist(error: Exception) -> str:
    """The gist of a reader's error in one line; what a refused pickle asked for instead of
    PyTorch's long advice."""
    text = str(error)
    asked = re.search(r"GLOBAL (\S+)", text)
    if asked:
        return f"it asks for {asked[1].strip('`')}, allowed are tensors and plain values"
    text = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    return "not a PyTorch file" if "weights only" in text.lower() else text[:160]


def _unwrap_state(content: object, path: Path) -> dict[str, Tensor]:
    """The tensors by name inside the wrappers of training scripts."""
    while isinstance(content, Mapping):
        entry = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if entry is None:
            break
        strangers = [
            str(k)
            for k, v in content.items()
            if k != entry and k not in SIBLINGS and _has_tensors(v)
        ]
        if strangers:
            raise CheckpointError(
                f"weights: {path} holds tensors beside its entry {entry!r} ({_first_names(strangers)}), expected none"
            )
        content = content[entry]
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"weights: {path} holds a {type(content).__name__}, expected tensors by name"
        )
    others = [
        f"{k}: {type(v).__name__}"
        for k, v in content.items()
        if not (type(k) is str and isinstance(v, Tensor))
    ]
    if others or not content:
        raise CheckpointError(
            f"weights: {path} holds {_first_names(others) or 'nothing'}, expected tensors by name"
        )
    state = dict(content)
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return {k: v.detach() for k, v in state.items()}


def _has_tensors(value: object) -> bool:
    values = value.values() if isinstance(value, Mapping) else [value]
    return any(isinstance(v, Tensor) for v in values)


def _first_names(names: list[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


@dataclass(frozen=True)
class Comparison:
    """How a state dict agrees with a module: names that agree, and descriptions of those that do
    not."""

    agreeing: list[str]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]
    mistyped: list[str]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen or self.mistyped)

    def __str__(self) -> str:
        """One line: how many keys are wrong in which way, with the first few of them."""
        kinds = ("missing", "unexpected", "misshapen", "mistyped")
        return "; ".join(
            f"{len(v)} {k} keys ({_first_names(v)})" for k in kinds if (v := getattr(self, k))
        )


def compare_state(module: nn.Module, state: Mapping[str, Tensor]) -> Comparison:
    """Compare names, shapes and kinds (integer or floating point) with a module, which may be on
    the meta device."""
    own = module.state_dict()
    both = [k for k in own if k in state]
    misshapen = [k for k in both if state[k].shape != own[k].shape]
    mistyped = [
        k
        for k in both
        if state[k].is_floating_point() != own[k].is_floating_point() and k not in misshapen
    ]
    return Comparison(
        agreeing=[k for k in both if k not in misshapen and k not in mistyped],
        missing=[k for k in own if k not in state],
        unexpected=[k for k in state if k not in own],
        misshapen=[
            f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in misshapen
        ],
        mistyped=[f"{k} {state[k].dtype} instead of {own[k].dtype}" for k in mistyped],
    )


def require_fit(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Make sure that a state dict matches a module, which may be on the meta device.

    Raises:
        CheckpointError: names the first few missing, unexpected, misshapen and mistyped keys.
    """
    comparison = compare_state(module, state)
    if not comparison.fits:
        raise CheckpointError(
            f"weights: {source} does not fit {type(module).__name__}: {comparison}"
        )


def load_into(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict that must match the module key for key and shape for shape.

    Raises:
        CheckpointError: as `require_fit`; the module is then unchanged.
    """
    require_fit(module, state, source)
    module.load_state_dict(state)
