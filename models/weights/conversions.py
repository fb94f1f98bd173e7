"""Weights converted to safetensors, kept in AR_PTQ_CACHE or ~/.cache/ar-ptq.

    weights-1/<sha256 of the source file>-<sha256 of this file, 16 digits>.safetensors
    sources-1/<repository>@<revision>/<file>.sha256
        the source file that a hub revision stood for when it was fetched

Files appear whole, by a rename. Both hashes are in the name, so nothing is read that does not come
from the wanted source or was damaged since: a damaged file is removed and made anew. The number in
the folder names is raised when the conversion changes.
"""

from __future__ import annotations

import os
import re
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from models.preset import Source
from models.weights.checkpoints import CheckpointError, read_checkpoint
from models.weights.digests import file_digest

FORMAT = 1
CACHE_FOLDER = "AR_PTQ_CACHE"  # names another place for the cache
DIGEST = re.compile("[0-9a-f]{64}")
NO_CACHE = Path(os.devnull) / "ar-ptq"  # nothing is found there, and nothing can be written


def cache_root() -> Path:
    """The cache folder, which need not exist yet."""
    chosen = os.environ.get(CACHE_FOLDER)
    if chosen:
        return Path(chosen).expanduser()
    try:
        return Path.home() / ".cache" / "ar-ptq"
    except RuntimeError:  # HOME is not set, and the user has no entry in passwd
        return NO_CACHE


def convert_file(path: Path, sha256: str | None = None) -> Path:
    """The conversion of a PyTorch file, made on first use; `path` itself if the cache cannot be
    written.

    Raises:
        CheckpointError: the source file is missing or damaged.
    """
    sha256 = sha256 or file_digest(path)
    cached = find_conversion(sha256)
    if cached is not None:
        return cached
    state = read_checkpoint(path)
    try:
        with temporary_file(_weights_folder()) as part:
            _save_tensors(state, part)
            final = _weights_folder() / f"{sha256}-{file_digest(part)[:16]}.safetensors"
            os.replace(part, final)
    except OSError as error:
        warnings.warn(
            f"cache: {cache_root()} cannot be written ({error}); {path} is read as it is",
            stacklevel=2,
        )
        return path
    return final


def find_conversion(sha256: str) -> Path | None:
    """The intact conversion of the source file with this hash; damaged ones are removed."""
    for path in list_conversions(sha256):
        with suppress(OSError, CheckpointError):  # another process may have removed it first
            if file_digest(path)[:16] == path.stem.rpartition("-")[2]:
                return path
            warnings.warn(f"cache: {path} is damaged, it is made anew", stacklevel=2)
            path.unlink()
    return None


def list_conversions(sha256: str) -> list[Path]:
    """Conversions of the source file with this hash, intact or not (looking costs nothing)."""
    return sorted(_weights_folder().glob(f"{sha256}-*.safetensors"))


def remember_source(source: Source, sha256: str) -> None:
    """Note which file a hub revision stands for, so that its conversion is found without the hub.

    A cache that cannot be written is no error.
    """
    note = _source_note(source)
    with suppress(OSError), temporary_file(note.parent) as part:
        part.write_text(sha256 + "\n")
        os.replace(part, note)


def known_digest(source: Source) -> str | None:
    """sha256 of the file that `source` stands for: the pinned one, or that of the file fetched."""
    if source.sha256 is not None or source.repo is None:
        return source.sha256
    note = _source_note(source)
    if not note.is_file():
        return None
    digest = note.read_text(errors="replace").strip()
    if DIGEST.fullmatch(digest):
        return digest
    warnings.warn(f"cache: {note} is damaged, it is made anew", stacklevel=2)
    return None


def write_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors; the file appears whole or not at all.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    with temporary_file(path.parent) as part:
        _save_tensors(state, part)
        os.replace(part, path)


def _weights_folder() -> Path:
    return cache_root() / f"weights-{FORMAT}"


def _source_note(source: Source) -> Path:
    folder = f"{source.repo}@{source.revision}".replace("/", "--")
    return cache_root() / f"sources-{FORMAT}" / folder / f"{source.file.replace('/', '--')}.sha256"


@contextmanager
def temporary_file(folder: Path) -> Iterator[Path]:
    """A file name in `folder` to write to and rename from; what is left under it is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{uuid.uuid4().hex}.part"
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _save_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Write safetensors; the format knows no shared memory, so tensors that share are copied."""
    storages: set[int] = set()
    separate = {}
    for key, value in state.items():
        storage = value.untyped_storage().data_ptr()
        separate[key] = (value.clone() if storage in storages else value).contiguous()
        storages.add(storage)
    try:
        save_file(separate, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
