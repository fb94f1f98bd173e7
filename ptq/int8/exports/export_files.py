"""A quantized model as integers on disk.

`model.safetensors` holds its tensors, `config.json` says what they are; older exports have
`<name>.safetensors` and `<name>.json`.

    of a quantized linear
        <layer>.weight.codes              (O, I) int8, packed to uint8 below 8 bits (`packing.py`)
        <layer>.weight.scale, .zero       (O,) float32 and int32; a pair in 4 bytes, bfloat16 and
                                          int16, where the description says `short` (STAQ)
        <layer>.input.scale, .zero        (G,) likewise
        <layer>.sink.mean, .sink.bias     (I,), (O,) float32, where sink tokens are shifted
        <layer>.bias                      (O,) float32
        <layer>.transform.scale, .shift   (I,) float32, where they run online
        <layer>.down, .up                 (r, I), (O, r) bfloat16, which they are rounded to anyway
        <layer>.weight.whole              (1,) float32, the tensor's scale of NVFP4
        <layer>.weight.values             (O, I), in place of codes where a weight is left as it is
    of an attention product
        <product>.a.scale, .a.zero, .b.scale, .b.zero   (1,) float32 and int32, or (H, G) short
        <product>.b.key_weights                         (H,) float32, of values at sinks
    of the rest of the model
        parameters and all buffers by their own names, in FP16 or FP32

What has no integer kernel, such as groups and floating-point formats, has scales of its own kind
(`simulated.py`); a description with such layers has the version 2.

So the quantized layers come back bit for bit, whatever the rest is kept in. Zero points are those
of signed codes, G is the number of segments of token positions, dynamic inputs have no tensors. The
description (`structure.py`):

    {"format", "version", "digest", "sha256", "bytes", "rest", "segments": [[0], [0, 1, 2], ...],
     "layers": {name: {"shape", "bits", "bias", "input", "transform", "rank"}}, "products": {name:
     {"rotation", "a", "b"}}, "modules": {name: ...}, "about": {...}}

`sha256` is that of the tensor file, `digest` that of the description without it, so that a change
of either is seen before any tensor is used. `about` is the caller's: model, method, calibration,
versions. The description is written last, and when a pair is written again the old one is removed
first: without a description there is no export.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptq.files import describe_damage, read_json, replacing, value_digest
from ptq.int8.exports.structure import Plain
from ptq.spec import ConfigError

FORMAT = "ar-ptq-int8"
VERSION = 1
SIMULATED_VERSION = 2  # of exports that hold what has no integer kernel (`simulated.py`)
VERSIONS = (VERSION, SIMULATED_VERSION)
CONFIG = "config.json"
TENSORS = "model.safetensors"


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
        taken = tuple(f"{name}." for name in (*self.plain["layers"], *self.plain["products"]))
        return {name: value for name, value in self.tensors.items() if not name.startswith(taken)}

    def sizes(self) -> dict[str, int]:
        """Bytes of weights' codes, of other tensors of quantized layers and products, of the
        rest."""
        codes = 0
        whole = 0
        for name, value in self.tensors.items():
            whole += value.nbytes
            if name.endswith(".weight.codes"):
                codes += value.nbytes
        rest = sum(value.nbytes for value in self.rest.values())
        return {"codes": codes, "parameters": whole - codes - rest, "rest": rest}


def tensor_file(path: Path) -> Path:
    """Where the tensors lie that the description `path` is of."""
    return path.with_name(TENSORS) if path.name == CONFIG else path.with_suffix(".safetensors")


def find_description(place: Path) -> Path:
    """The description of the export in a folder; a file is one itself.

    Raises:
        ExportError: the folder holds none, or several.
    """
    if not place.is_dir():
        return place
    if (place / CONFIG).is_file():
        return place / CONFIG
    found = [path for path in sorted(place.glob("*.json")) if tensor_file(path).is_file()]
    if len(found) != 1:
        number = len(found) or "no"
        raise ExportError(f"export: {place} holds {number} exports, allowed is one ({CONFIG})")
    return found[0]


def save_export(export: Export, path: Path, about: Plain) -> Export:
    """Write both files; returns the export with its whole description.

    Args:
        path: of the description.
        about: where the model comes from.

    Raises:
        ExportError: they cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with replacing(tensor_file(path)) as temporary:
            save_file(dict(export.tensors), temporary, metadata={"format": "pt"})
            head = {
                "format": FORMAT,
                "version": version_of(export.plain),
                "sha256": _file_sha256(temporary),
                "bytes": temporary.stat().st_size,
            }
        # once for the order of keys, once more over what an export that was read says of its own
        # file
        plain = head | export.plain | head | {"about": about}
        _write_description(path, plain)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"export: {path} cannot be written ({error})") from error
    return Export(plain, export.tensors)


def version_of(plain: Plain) -> int:
    """The least version whose readers know everything in a description."""
    for layer in plain["layers"].values():
        if "weight" in layer:
            return SIMULATED_VERSION
    for product in plain["products"].values():
        for operand in ("a", "b"):
            if (product[operand] or {}).get("kind") == "simulated":
                return SIMULATED_VERSION
    return VERSION


def replace_about(path: Path, about: Plain) -> None:
    """Say something else about an export; its tensors stay.

    Args:
        path: of the description.

    Raises:
        ExportError: the description is missing or damaged. OSError: it cannot be written.
    """
    _write_description(path, {**read_description(path), "about": about})


def _write_description(path: Path, plain: Plain) -> None:
    """Write a description with its digest."""
    plain["digest"] = _description_digest(plain)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n")


def read_export(path: Path) -> Export:
    """The export whose description is `path`.

    Raises:
        ExportError: a file is missing, damaged, of another format or version, or the two do not
            belong together.
    """
    plain = read_description(path)
    file = tensor_file(path)
    try:
        found = _file_sha256(file)
        if found != plain["sha256"]:
            raise ExportError(
                f"export: {file} is damaged or belongs to another description: its sha256 differs"
                f" ({found[:16]}..., expected {plain['sha256'][:16]}...)"
            )
        return Export(plain, load_file(file))
    except (OSError, SafetensorError) as error:
        raise ExportError(f"export: {file} cannot be read ({describe_damage(error)})") from error


def read_description(path: Path) -> Plain:
    """What a description says; its tensors are not looked at.

    Raises:
        ExportError: it is missing, damaged, or of another format or version.
    """
    try:
        plain = read_json(path)
    except OSError as error:
        raise ExportError(f"export: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ExportError(f"export: {path} is damaged: it is not JSON") from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise ExportError(
            f"export: {path} is not the description of an export, allowed is the format {FORMAT}"
        )
    if plain.get("version") not in VERSIONS:
        raise ExportError(
            f"export: {path} has the format version {plain.get('version')}, "
            f"allowed are {' and '.join(map(str, VERSIONS))}"
        )
    if plain.get("digest") != _description_digest(plain):
        raise ExportError(f"export: {path} is damaged: its digest differs")
    return plain


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _description_digest(plain: Plain) -> str:
    content = {key: value for key, value in plain.items() if key != "digest"}
    return value_digest(content, 64)
