"""Files of weights that a user has added: `added-1.json` in the folder of the cache.

    {"files": {"yucornetto/RAR/rar_b.bin": {"path": "/data/rar_b.bin", "sha256": "4f61..."}},
     "digest": "..."}

A key is the released file, whatever the user's is called; models that share a tokenizer share its
entry. The JSON is read whole, changed and replaced under a lock, and carries a digest of its
entries. The file that an entry names is compared with the entry's sha256 before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from models.preset import Source
from models.weights.checkpoints import CheckpointError
from models.weights.conversions import FORMAT, cache_root, temporary_file


@dataclass(frozen=True)
class AddedFile:
    """A file that stands for a released one.

    Attributes:
        path: absolute; `PATH::ENTRY` where a file holds several models.
        sha256: of the whole file when it was added.
    """

    path: Path
    sha256: str


def entries_file() -> Path:
    """The JSON of all entries, which need not exist yet."""
    return cache_root() / f"added-{FORMAT}.json"


def entry_key(source: Source) -> str:
    """How a released file is called: a revision that is pinned later is still the same file."""
    return f"{source.repo}/{source.file}" if source.repo else source.file


def find_entry(source: Source) -> AddedFile | None:
    """What was added in the place of a released file.

    Raises:
        CheckpointError: the JSON is damaged.
    """
    return read_entries().get(entry_key(source))


def read_entries() -> dict[str, AddedFile]:
    """All entries by key.

    Raises:
        CheckpointError: the JSON is damaged.
    """
    path = entries_file()
    try:
        stored = json.loads(path.read_text())
        files = stored["files"]
        is_whole = stored["digest"] == _digest_entries(files)
        entries = _read_files(files)
    except (FileNotFoundError, NotADirectoryError):  # the latter without a home, see `NO_CACHE`
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise CheckpointError(
            f"weights: {path} is damaged; remove it and add your files again: "
            "python -m models add FOLDER"
        )
    return entries


def _read_files(files: Mapping[str, Mapping[str, str]]) -> dict[str, AddedFile]:
    """Entries out of what is stored of them."""
    entries = {}
    for key, file in files.items():
        entries[key] = AddedFile(Path(file["path"]), file["sha256"])
    return entries


def _stored_files(entries: Mapping[str, AddedFile]) -> dict[str, dict[str, str]]:
    """What is stored of entries, in the order of their keys."""
    files = {}
    for key, entry in sorted(entries.items()):
        files[key] = {"path": str(entry.path), "sha256": entry.sha256}
    return files


def _digest_entries(files: object) -> str:
    """sha256 (16 hex digits) of entries as they are stored; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def add_entries(files: Mapping[Source, AddedFile]) -> None:
    """Add entries, in the place of those of the same released files.

    Raises:
        CheckpointError: the JSON is damaged, or cannot be written.
    """
    with _changing_entries() as entries:
        for source, file in files.items():
            entries[entry_key(source)] = file


def remove_entries(sources: Iterable[Source]) -> None:
    """Remove the entries of released files, where there are any; no file of weights is removed.

    Raises:
        CheckpointError: as `add_entries`.
    """
    with _changing_entries() as entries:
        for source in sources:
            entries.pop(entry_key(source), None)


@contextmanager
def _changing_entries() -> Iterator[dict[str, AddedFile]]:
    """The entries, which are written at the end of the block as it leaves them."""
    path = entries_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # where a file system has no flock, filelock would leave a marker that outlives its process
        with FileLock(path.with_suffix(".lock"), fallback_to_soft=False):
            entries = read_entries()
            yield entries
            files = _stored_files(entries)
            stored = {"files": files, "digest": _digest_entries(files)}
            with temporary_file(path.parent) as part:
                part.write_text(json.dumps(stored, indent=1) + "\n")
                os.replace(part, path)
    except OSError as error:
        raise CheckpointError(
            f"weights: {path} cannot be written ({error.strerror or error}); AR_PTQ_CACHE names "
            "another folder"
        ) from error
