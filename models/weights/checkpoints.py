"""Reading weights: one function reads a file, one puts it into a module; errors are one line.

A pickle is a program. PyTorch's restricted unpickler runs it with an allow-list: tensors, plain
containers, and the `argparse.Namespace` in which training scripts keep their arguments. A file that
asks for anything else is refused.

Where a training script keeps several models in one file, `PATH::ENTRY` names one of them, as in
`ar-ckpt-best.pth::trainer.var_wo_ddp` or `checkpoint.pt::ema`.
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

from models.preset import Source
from models.weights.file_kinds import describe_foreign

# entries that hold the weights; the first one present counts
WRAPPERS = ("model_ema", "model", "module", "state_dict")
# what training scripts keep beside the weights; anything else that holds tensors is an error
# fmt: off
SIBLINGS = frozenset({
    "model", "discriminator", "optimizer", "optimizers", "optimizer_states", "optimizer_disc",
    "scaler", "scheduler", "lr_scheduler", "lr_schedulers", "callbacks", "loops",
    "args", "config", "hyper_parameters", "epoch", "step",
})
# fmt: on
ENTRY_MARK = "::"
PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile
LONGEST_GIST = 160  # letters that an error shows of what a library says


class CheckpointError(ValueError):
    """A weights file is missing, damaged, or belongs to another model. The message is one line."""


def split_entry(path: Path) -> tuple[Path, str | None]:
    """The file and the entry of `PATH::ENTRY`; a file whose own name holds `::` has none."""
    name, separator, entry = str(path).rpartition(ENTRY_MARK)
    if not separator or path.exists():
        return path, None
    return Path(name), entry


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """State dict of a .safetensors or a PyTorch file, without wrappers and prefixes; dtypes as in
    the file.

    Args:
        path: of the file, or `PATH::ENTRY`.

    Raises:
        CheckpointError: the file is missing, a directory, damaged, or holds anything but tensors
            and plain values.
    """
    return _read_state(path, verify=True)


def read_outline(path: Path) -> dict[str, Tensor]:
    """Names, shapes and dtypes of what `read_checkpoint` gives; the values stay on disk.

    Raises:
        CheckpointError: as `read_checkpoint`, but for damaged values.
    """
    # both formats are mapped into memory, where nothing of a value is read unless it is used
    state = _read_state(path, verify=False)
    return {name: value.to("meta") for name, value in state.items()}


def without_ignored(source: Source, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the keys that the source says to pass over."""
    return {key: value for key, value in state.items() if not key.startswith(source.ignore)}


def _read_state(path: Path, verify: bool) -> dict[str, Tensor]:
    """What `read_checkpoint` gives, with or without a test of checksums."""
    path, entry = split_entry(path)
    if not path.is_file():
        what = "a directory" if path.is_dir() else "missing"
        raise CheckpointError(f"weights: {path} is {what}, expected a file")
    try:
        with path.open("rb"):  # whatever the system's reason, safetensors calls the file missing
            pass
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = read_pickle(path, verify)
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes make the readers fail in any way
        # a file in PyTorch's format is a zip archive, older ones are of no kind that is known
        expected = "safetensors" if path.suffix == ".safetensors" else "zip"
        reason = describe_foreign(path, expected) or error_gist(error)
        raise CheckpointError(f"weights: {path} cannot be read ({reason})") from error
    if entry is not None:
        content = _named_entry(content, entry, path)
    return _unwrap_state(content, path)


def _named_entry(content: object, entry: str, path: Path) -> object:
    """What a file holds under `a.b`: entry b of entry a, or the entry called `a.b`."""
    if isinstance(content, Mapping) and entry in content:
        return content[entry]
    first, dot, remaining = entry.partition(".")
    if isinstance(content, Mapping) and dot and first in content:
        return _named_entry(content[first], remaining, path)
    names = list(map(str, content)) if isinstance(content, Mapping) else []
    raise CheckpointError(
        f"weights: {path} has no entry {entry!r}, there are {_first_names(names, 8) or 'none'}"
    )


def _entries_with_states(content: Mapping, prefix: str = "") -> list[str]:
    """The dotted names of entries that are tensors by name, down to the third level."""
    names: list[str] = []
    for key, value in content.items():
        if not isinstance(value, Mapping) or not value:
            continue
        name = f"{prefix}{key}"
        if all(isinstance(entry, Tensor) for entry in value.values()):
            names.append(name)
        elif name.count(".") < 2:
            names += _entries_with_states(value, f"{name}.")
    return names


def _entry_advice(content: Mapping) -> str:
    """The end of an error: how to name one of the entries that hold weights."""
    names = _entries_with_states(content)
    return f"; name one: PATH{ENTRY_MARK}{f' or {ENTRY_MARK}'.join(names[:3])}" if names else ""


def read_pickle(path: Path, verify: bool = True) -> object:
    """Content of a `torch.save` file.

    Archives (PyTorch 1.6 and later) are mapped into memory, after a test of their checksums, which
    reads them whole, if `verify`.

    Raises:
        CheckpointError: a checksum differs. Whatever damaged bytes make the reader fail with.
    """
    is_archive = zipfile.is_zipfile(path)
    if is_archive and verify:
        with zipfile.ZipFile(path) as members:
            damaged = members.testzip()
        if damaged is not None:
            raise CheckpointError(f"weights: {path} is damaged: the checksum of {damaged} differs")
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)


def error_gist(error: Exception) -> str:
    """The gist of a reader's error in one line, without PyTorch's long advice on pickles."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"it asks for {refused[1].strip('`')}, allowed are tensors and plain values"
    gist = first_line(error)
    return "not a PyTorch file" if "weights only" in gist.lower() else gist


def first_line(error: Exception) -> str:
    """The first line with words of what an error says, cut to `LONGEST_GIST`, or its class."""
    for line in str(error).splitlines():
        if line.strip():
            return line[:LONGEST_GIST]
    return type(error).__name__


def _unwrap_state(content: object, path: Path) -> dict[str, Tensor]:
    """The tensors by name inside the wrappers of training scripts, without common prefixes."""
    while isinstance(content, Mapping) and (entry := _wrapper_of(content)) is not None:
        strangers = [str(name) for name in content if _is_stranger(content, name, entry)]
        if strangers:
            raise CheckpointError(
                f"weights: {path} holds tensors beside its entry {entry!r} "
                f"({_first_names(strangers)}), expected none{_entry_advice(content)}"
            )
        content = content[entry]

    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"weights: {path} holds a {type(content).__name__}, expected tensors by name"
        )
    others = []
    for name, value in content.items():
        if type(name) is not str or not isinstance(value, Tensor):
            others.append(f"{name}: {type(value).__name__}")
    if others or not content:
        raise CheckpointError(
            f"weights: {path} holds {_first_names(others) or 'nothing'}, expected tensors by name"
            f"{_entry_advice(content)}"
        )

    state = {name: value.detach() for name, value in content.items()}
    while (prefix := _common_prefix(state)) is not None:
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _wrapper_of(content: Mapping) -> str | None:
    """The entry that holds the weights, if any."""
    for name in WRAPPERS:
        if isinstance(content.get(name), Mapping):
            return name
    return None


def _is_stranger(content: Mapping, name: object, entry: str) -> bool:
    """Whether an entry beside the weights holds tensors that nobody expects."""
    return name != entry and name not in SIBLINGS and _has_tensors(content[name])


def _common_prefix(state: Mapping[str, Tensor]) -> str | None:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return prefix
    return None


def _has_tensors(value: object) -> bool:
    values = value.values() if isinstance(value, Mapping) else [value]
    return any(isinstance(entry, Tensor) for entry in values)


def _first_names(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


@dataclass(frozen=True)
class Comparison:
    """How a state dict agrees with a module: names that do, descriptions of those that do not."""

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
        texts = []
        for kind in ("missing", "unexpected", "misshapen", "mistyped"):
            keys = getattr(self, kind)
            if keys:
                texts.append(f"{len(keys)} {kind} keys ({_first_names(keys)})")
        return "; ".join(texts)


def compare_state(module: nn.Module, state: Mapping[str, Tensor]) -> Comparison:
    """Compare names, shapes and kinds (integer or floating point) with a module's.

    The module may be on the meta device.
    """
    own = module.state_dict()
    comparison = Comparison(agreeing=[], missing=[], unexpected=[], misshapen=[], mistyped=[])
    for key in state:
        if key not in own:
            comparison.unexpected.append(key)
    for key, expected in own.items():
        if key not in state:
            comparison.missing.append(key)
            continue
        value = state[key]
        if value.shape != expected.shape:
            comparison.misshapen.append(
                f"{key} {tuple(value.shape)} instead of {tuple(expected.shape)}"
            )
        elif value.is_floating_point() != expected.is_floating_point():
            comparison.mistyped.append(f"{key} {value.dtype} instead of {expected.dtype}")
        else:
            comparison.agreeing.append(key)
    return comparison


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


def holds_numbers(values: Tensor, is_mask: bool = False) -> bool:
    """Whether floating-point values are finite; those of a mask may be minus infinity, too.

    The extremes tell, since NaN is its own least and most: one pass in place of the several of
    `isfinite`, which takes seconds on the weights of a released model.
    """
    if values.numel() == 0:
        return True
    least, most = values.aminmax()
    return bool(most < torch.inf) and (is_mask or bool(least > -torch.inf))


def require_finite(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Make sure that a state dict that fits a module holds numbers alone.

    Parameters are finite; buffers may hold minus infinity, as masks do.

    Raises:
        CheckpointError: names the first few others.
    """
    parameters = dict(module.named_parameters())
    faulty: list[str] = []
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        values = value if value.element_size() > 1 else value.float()  # 8 bits lack the test
        is_mask = name not in parameters
        if holds_numbers(values, is_mask):
            continue
        allowed = values.isfinite()
        if is_mask:
            allowed |= values.isneginf()
        faulty.append(f"{name}: {int((~allowed).sum())} of {value.numel()}")
    if faulty:
        raise CheckpointError(
            f"weights: {source} holds NaN or infinity ({_first_names(faulty)}), only finite"
            " numbers are allowed"
        )


def load_into(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict that must match the module key for key and shape for shape.

    Raises:
        CheckpointError: as `require_fit` and `require_finite`; the module is then unchanged.
    """
    require_fit(module, state, source)
    require_finite(module, state, source)
    module.load_state_dict(state)
