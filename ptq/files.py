"""Files that are never half-written, and that prove what they hold.

A file is written under a temporary name beside its place and then renamed: whoever reads it finds
the old content or the new one, whenever the writer is killed. What the system refuses is an OSError
that names the file, whichever library wrote it.

JSON objects and safetensors carry a digest of their content, which is compared when they are read:
a file that was cut, changed, or put in another's place since is a `DamagedFile`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ptq.errors import system_code
from ptq.spec import ConfigError

if typing.TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = ".tmp"  # what the suffix of a temporary name begins with
KEPT_LETTERS = (
    40  # of the file's and the host's name in a temporary one, which must not be too long
)

DIGEST = "digest"  # field of an object, or of a tensor file's metadata
OWNER = "of"  # field of a tensor file's metadata: what its tensors are of
DIGEST_LETTERS = 16
SEALED = re.compile(f"[0-9a-f]{{{DIGEST_LETTERS}}}")  # the last field of a sealed object


class DamagedFile(ConfigError):
    """A file is not what was written to it. The message is one line: the file, and why."""


# --- writing beside and renaming


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path` at the end of the block, or removed if it fails.

    The block writes a file there, or makes a folder; a folder that is at `path` already is for the
    block to remove. A file is open to those whom the umask allows, whichever library wrote it.

    Raises:
        OSError: the system refuses to write; the error names `path`.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_file():
            temporary.chmod(usual_mode(temporary))
        os.replace(temporary, path)  # atomic: both are on one file system
    except BaseException as error:  # Ctrl-C and signals, too
        remove_quietly(temporary)
        code = refusal_code(error, temporary)
        if code is not None:
            raise OSError(code, os.strerror(code), str(path)) from error
        raise


def temporary_path(path: Path) -> Path:
    """A name beside `path` that no other writer has, on whichever host."""
    start = path.name[:KEPT_LETTERS]
    host = socket.gethostname()[:KEPT_LETTERS]
    return path.with_name(f"{start}{TEMPORARY}-{host}-{secrets.token_hex(8)}")


def usual_mode(temporary: Path) -> int:
    """The mode that a new file beside `temporary` gets, by the umask and the folder's rules.

    safetensors and `tempfile` make files for their owner alone.
    """
    # what the system says of it is said of the temporary file, whose name it begins with
    probe = temporary.with_name(f"{temporary.name}-mode")
    with probe.open("x") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    probe.unlink()
    return mode


def refusal_code(error: BaseException, temporary: Path) -> int | None:
    """Why the system refused to write `temporary`, as a number of `errno`; None for other errors.

    An error that names another file is of that one. Libraries in Rust or C++ tell the system's
    reasons in the text of errors of their own.
    """
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return error.__context__.errno  # PyTorch's archive fails once more after its file has
    if not isinstance(error, OSError):
        return system_code(error)
    is_of_temporary = error.filename is None or str(error.filename).startswith(str(temporary))
    return error.errno if is_of_temporary else None


def remove_quietly(path: Path) -> None:
    """Remove a file or a folder, if it is there; an error here must not hide the one before it."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


# --- JSON


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, holds NaN or infinity, or is nested too deep.
    """
    return parse_json(path.read_text())


def parse_json(text: str) -> Any:
    """The value that a text stands for; NaN and infinity are none.

    Raises:
        ValueError: it is no JSON, or is nested too deep.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON, only finite numbers are")


def value_digest(value: object, length: int = 8) -> str:
    """First hex digits of the sha256 of a JSON-able value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def seal_object(value: Mapping[str, Any]) -> dict[str, Any]:
    """An object with the digest of its other fields as its last one."""
    content = {name: entry for name, entry in value.items() if name != DIGEST}
    return {**content, DIGEST: value_digest(content, DIGEST_LETTERS)}


def seal_fault(value: Mapping[str, Any]) -> str:
    """How an object differs from its digest; "" if it does not, or has none."""
    if DIGEST not in value:
        last = next(reversed(value.values()), None)
        is_digest = isinstance(last, str) and bool(SEALED.fullmatch(last))
        return "its digest has another name" if is_digest else ""
    if seal_object(value)[DIGEST] == value[DIGEST]:
        return ""
    return f"its content has the digest {seal_object(value)[DIGEST]}, expected {value[DIGEST]}"


def read_sealed(path: Path) -> dict[str, Any]:
    """The object in a JSON file, without its digest.

    Raises:
        DamagedFile: it cannot be read, is no object, or is not what its digest says.
    """
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path}: cannot be read ({describe_damage(error)})") from error
    return open_seal(value, str(path))


def open_seal(value: object, name: str) -> dict[str, Any]:
    """A sealed object without its digest; `name` is how the error calls it.

    Raises:
        DamagedFile: it is no object, has no digest, or is not what its digest says.
    """
    if not isinstance(value, dict) or DIGEST not in value:
        raise DamagedFile(f"{name}: is damaged (it has no digest)")
    fault = seal_fault(value)
    if fault:
        raise DamagedFile(f"{name}: is damaged ({fault})")
    return {field: entry for field, entry in value.items() if field != DIGEST}


def describe_damage(error: Exception) -> str:
    """Why a file cannot be read, in a line: the system's reason, or the gist of a library's."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:160]


# --- tensors


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (16 hex digits) over names, types, shapes and bytes of tensors."""
    import torch

    sha = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        sha.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:DIGEST_LETTERS]


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors by name, and texts by name beside them, as safetensors with their digest.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    from safetensors.torch import save_file  # with PyTorch, which texts and JSON do without

    # safetensors refuses views that are not contiguous
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = dict(metadata or {})
    with replacing(path) as temporary:
        save_file(stored, temporary, {**texts, DIGEST: _content_digest(stored, texts)})


def read_tensors(
    path: Path, of: str | None = None, sealed: bool = True, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the texts beside them, of a file of `write_tensors`.

    Args:
        of: what the text `OWNER` has to be, if that matters.
        sealed: refuse a file without a digest, too, as older ones are.

    Raises:
        DamagedFile: it cannot be read, is not what its digest says, or is of something else.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt", device) as file:
            metadata = dict(file.metadata() or {})
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make the reader fail in any way
        raise DamagedFile(f"{path}: cannot be read ({describe_damage(error)})") from error
    expected = metadata.pop(DIGEST, None)
    found = _content_digest(tensors, metadata)
    if expected is None and sealed:
        raise DamagedFile(f"{path}: is damaged (it has no digest)")
    if expected not in (None, found):
        raise DamagedFile(
            f"{path}: is damaged (its content has the digest {found}, expected {expected})"
        )
    if of is not None and metadata.get(OWNER) != of:
        raise DamagedFile(f"{path}: is of {metadata.get(OWNER)}, expected {of}")
    return tensors, metadata


def _content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The digest of tensors and of the texts beside them."""
    return value_digest([digest_tensors(tensors), dict(metadata)], DIGEST_LETTERS)
