"""Whose weights a file holds, told by its content.

Names and shapes of tensors tell; values stay on disk. Where they fit several released files, an
official file name decides among these; where several files fit one released file, the pinned hash
does, and then the name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from models.preset import Source
from models.weights.checkpoints import (
    CheckpointError,
    compare_state,
    read_outline,
    split_entry,
    without_ignored,
)
from models.weights.digests import FileState, file_digest, file_state

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class WeightsFile:
    """A file, and the released ones that it may be by its content.

    Attributes:
        path: of the file, or `PATH::ENTRY`.
        sources: none for a stranger, several where content and name leave it open.
        fault: why it cannot be read, or nothing.
    """

    path: Path
    sources: tuple[Source, ...]
    fault: str = ""

    @property
    def is_clear(self) -> bool:
        return len(self.sources) == 1


_memory: dict[tuple[FileState, str, tuple[Source, ...]], WeightsFile] = {}


def list_files(place: Path) -> list[Path]:
    """The files below a folder that may hold weights, by their suffix; a file is itself.

    Raises:
        CheckpointError: there is nothing at `place`, or the folder cannot be read.
    """
    if split_entry(place)[0].is_file():
        return [place]
    if not place.is_dir():
        raise CheckpointError(f"weights: {place} is missing, expected a folder or a file")

    def refuse_unreadable(error: OSError) -> None:
        if error.filename == str(place):  # a folder below it may be another user's
            raise CheckpointError(f"weights: {place} cannot be read ({error.strerror})") from error

    files = []
    for folder, _, names in os.walk(place, onerror=refuse_unreadable):
        for name in names:
            if name.endswith(SUFFIXES):
                files.append(Path(folder, name))
    return sorted(files)


def recognise_file(path: Path, modules: Mapping[Source, nn.Module]) -> WeightsFile:
    """What a file is.

    A file is looked at once per process and state.

    Args:
        modules: what each released file fits; without memory for weights.
    """
    try:
        state = file_state(split_entry(path)[0])
    except OSError as error:  # a link that leads nowhere, as a cleared cache leaves it
        return WeightsFile(path, (), f"weights: {path} cannot be read ({error.strerror})")
    key = (state, str(path), tuple(modules))
    if key not in _memory:
        _memory[key] = _look_into(path, modules)
    return _memory[key]


def _look_into(path: Path, modules: Mapping[Source, nn.Module]) -> WeightsFile:
    try:
        outline = read_outline(path)
    except CheckpointError as error:
        return WeightsFile(path, (), str(error))
    fitting = []
    for source, module in modules.items():
        if compare_state(module, without_ignored(source, outline)).fits:
            fitting.append(source)
    named = [source for source in fitting if is_official_name(source, path)]
    return WeightsFile(path, tuple(named if len(named) == 1 else fitting))


def is_official_name(source: Source, path: Path) -> bool:
    return Path(source.file).name == path.name


def is_pinned(source: Source, path: Path) -> bool:
    """Whether a file is the very one that was released, as far as its hash is known."""
    return source.sha256 is not None and file_digest(path) == source.sha256


def choose_file(source: Source, files: Sequence[WeightsFile]) -> Path | None:
    """The one of several files that stands for a released one; None where there is none.

    Raises:
        CheckpointError: several could, or one that could be another, too.
    """
    clear: list[Path] = []
    unclear: list[Path] = []
    for file in files:
        if source in file.sources:
            (clear if file.is_clear else unclear).append(file.path)
    if len(clear) > 1:
        clear = _preferred_paths(source, clear)
    if len(clear) == 1:
        return clear[0]
    paths = clear or unclear
    if not paths:
        return None
    raise CheckpointError(f"weights: {' and '.join(map(str, paths))} may be {source.file}")


def _preferred_paths(source: Source, paths: list[Path]) -> list[Path]:
    """The pinned files, or those of the official name, or all; of copies the first."""
    pinned: list[Path] = []
    named: list[Path] = []
    for path in paths:
        if is_pinned(source, path):
            pinned.append(path)
        if is_official_name(source, path):
            named.append(path)
    candidates = pinned or named or paths
    first_of_copies = {file_digest(path): path for path in reversed(candidates)}
    return list(first_of_copies.values())
