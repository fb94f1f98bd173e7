"""A quantized model as integers on disk: `<name>.safetensors` holds its tensors, `<name>.json` says
what they are.

    of a quantized linear     <layer>.weight.codes     (O, I) int8, or packed to uint8 below 8 bits (`packing.py`)
                              <layer>.weight.scale     (O,) float32       <layer>.weight.zero   (O,) int32
                              <layer>.input.scale      (G,) float32       <layer>.input.zero    (G,) int32
                              <layer>.bias             (O,) float32
                              <layer>.transform.scale, .shift    (I,) float32, where they run online
                              <layer>.down (r, I), <layer>.up (O, r)   bfloat16, which they are rounded to anyway
    of an attention product   <product>.a.scale, .a.zero, .b.scale, .b.zero    (1,) float32 and int32, as above
    the rest of the model     its own names: parameters and all buffers, in FP16 or FP32

So the quantized layers come back bit for bit, whatever the rest is kept in. Zero points are those
of signed codes, G is the number of segments of token positions, dynamic inputs have no tensors. The
description (`structure.py`):

    {"format", "version", "digest", "sha256", "bytes", "rest", "segments": [[0], [0, 1, 2], ...],
     "layers": {name: {"shape", "bits", "bias", "input", "transform", "rank"}}, "products": {name:
     {"rotation", "a", "b"}}, "modules": {name: ...}, "about": {...}}

`sha256` is that of the tensor file, `digest` that of the description without it, so that a change
of either is seen before any tensor is used. `about` is the caller's: model, method, calibration,
versions. The description is written
last, and when a pair is written again the old one is removed first: while it is not there, nothing
is.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptq.int8.structure import Plain
from ptq.spec import ConfigError

FORMAT = "ar-ptq-int8"
VERSION = 1


class ExportError(ConfigError):
    """An export is missing, damaged, foreign, or of another model. The message is one line."""


@dataclass(frozen=True)
class Export:
    """A model as integers: the description, and tensors by name."""

    plain: Plain
    tensors: Mapping[str, Tensor]

    @property
    def rest(self) -> dict[str, Tensor]:
        """The tensors that belong to no quantized layer or product."""
        taken = tuple(f"{name}." for part in ("layers", "products") for name in self.plain[part])
        return {name: value for name, value in self.tensors.items() if not name.startswith(taken)}

    def sizes(self) -> dict[str, int]:
        """Bytes of the weights' codes, of all else that belongs to quantized layers and products,
        and of the rest."""
        codes = sum(
            value.nbytes for name, value in self.tensors.items() if name.endswith(".weight.codes")
        )
        rest = sum(value.nbytes for value in self.rest.values())
        whole = sum(value.nbytes for value in self.tensors.values())
        return {"codes": codes, "parameters": whole - codes - rest, "rest": rest}


def save_export(export: Export, path: Path, about: Plain) -> Export:
    """Write both files, of which `path` is the description (`<name>.json`); returns the export with
    all that it says.

    Raises:
        ExportError: they cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with appearing(path.with_suffix(".safetensors")) as part:
            save_file(dict(export.tensors), part, metadata={"format": "pt"})
            own = {
                "format": FORMAT,
                "version": VERSION,
                "sha256": _sha256(part),
                "bytes": part.stat().st_size,
            }
        # an export that was read has those of its file
        plain = own | export.plain | own | {"about": about}
        plain["digest"] = _digest(plain)
        with appearing(path) as part:
            part.write_text(json.dumps(plain, indent=1) + "\n")
    except (OSError, SafetensorError) as error:
        raise ExportError(f"export: {path} cannot be written ({error})") from error
    return Export(plain, export.tensors)


def read_export(path: Path) -> Export:
    """The export whose description is `path`.

    Raises:
        ExportError: a file is missing, damaged, of another format or version, or the two do not
            belong together.
    """
    try:
        plain = json.loads(path.read_text())
    except OSError as error:
        raise ExportError(f"export: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ExportError(f"export: {path} is damaged: it is not JSON") from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise ExportError(
            f"export: {path} is not the description of an export, allowed is the format {FORMAT}"
        )
    if plain.get("version") != VERSION:
        raise ExportError(
            f"export: {path} has the format version {plain.get('version')}, allowed is {VERSION}"
        )
    if plain.get("digest") != _digest(plain):
        raise ExportError(f"export: {path} is damaged: its digest differs")
    file = path.with_suffix(".safetensors")
    try:
        if _sha256(file) != plain["sha256"]:
            raise ExportError(
                f"export: {file} is damaged or belongs to another description: its sha256 differs"
            )
        return Export(plain, load_file(file))
    except (OSError, SafetensorError) as error:
        raise ExportError(f"export: {file} cannot be read ({error})") from error


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A file name to write to, which becomes `path` when that went well; otherwise nothing is
    left."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(plain: Plain) -> str:
    content = {k: v for k, v in plain.items() if k != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
