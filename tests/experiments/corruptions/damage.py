"""What can happen to a file, and what a file means to libraries that are not the project's.

A corruption changes bytes. Whether it has changed what they mean is judged here apart from all
readers of the project, by `json`, `numpy`, `safetensors`, `torch` and Pillow alone.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

PAGE = b"<!DOCTYPE html>\n<html><body>404: not found</body></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
NUMBER = rb"(?<![\w.\"-])-?\d+\.\d+(?![\w.\"-])"

# --- corruptions: of the bytes of a file, by the bytes of another one of its kind


def cut_off(content: bytes, other: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(1, len(content))]


def flip_bit(content: bytes, other: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def empty_file(content: bytes, other: bytes, draw: random.Random) -> bytes:
    return b""


def replace_by_other(content: bytes, other: bytes, draw: random.Random) -> bytes:
    return other


def replace_by_page(content: bytes, other: bytes, draw: random.Random) -> bytes:
    return PAGE


def replace_by_pointer(content: bytes, other: bytes, draw: random.Random) -> bytes:
    return POINTER


def zero_block(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """A block that the disk never wrote."""
    length = max(len(content) // 3, 1)
    start = draw.randrange(len(content) - length + 1)
    return content[:start] + bytes(length) + content[start + length :]


def double_file(content: bytes, other: bytes, draw: random.Random) -> bytes:
    return content + content


def swap_halves(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """The second half of a file is that of another one."""
    return content[: len(content) // 2] + other[len(other) // 2 :]


def swap_entries(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """Two numbers of a text, or two blocks of a file's last bytes, change places."""
    numbers = list(re.finditer(NUMBER, content)) if content[:1] in (b"{", b"[") else []
    if len(numbers) > 1:
        first, second = numbers[0], numbers[-1]
    else:
        length = len(content) // 8
        first = re.compile(b".{%d}" % length, re.DOTALL).match(content, len(content) // 2)
        second = re.compile(b".{%d}" % length, re.DOTALL).match(content, len(content) - length)
    parts = (
        content[: first.start()],
        second[0],
        content[first.end() : second.start()],
        first[0],
        content[second.end() :],
    )
    return b"".join(parts)


def not_a_number(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """NaN in place of a figure of a text, or of the last floats of a file."""
    if content[:1] in (b"{", b"["):
        found = draw.choice(list(re.finditer(NUMBER, content)))
        return content[: found.start()] + b"NaN" + content[found.end() :]
    return content[:-8] + np.full(2, np.nan, np.float32).tobytes()


CORRUPTIONS: dict[str, Callable[[bytes, bytes, random.Random], bytes]] = {
    "cut": cut_off,
    "bit": flip_bit,
    "emptied": empty_file,
    "other": replace_by_other,
    "page": replace_by_page,
    "pointer": replace_by_pointer,
    "zeros": zero_block,
    "doubled": double_file,
    "halves": swap_halves,
    "swapped": swap_entries,
    "nan": not_a_number,
}


# --- what bytes mean


def as_json(content: bytes) -> Any:
    return json.loads(content)


def as_json_lines(content: bytes) -> Any:
    return [json.loads(line) for line in content.decode().splitlines()]


def as_tensors(content: bytes) -> Any:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors = safetensors.torch.load(content)
    return header.get("__metadata__"), {name: plain_value(value) for name, value in tensors.items()}


def as_arrays(content: bytes) -> Any:
    with np.load(io.BytesIO(content)) as stored:
        return {
            name: plain_value(torch.from_numpy(stored[name]))
            for name in stored
            if is_number(stored[name])
        }


def is_number(array: np.ndarray) -> bool:
    return array.dtype.kind in "iuf"


def as_checkpoint(content: bytes) -> Any:
    return plain_value(torch.load(io.BytesIO(content), weights_only=True))


def as_picture(content: bytes) -> Any:
    with Image.open(io.BytesIO(content)) as picture:
        return picture.format, picture.size, np.asarray(picture).tobytes()


def plain_value(value: Any) -> Any:
    """Tensors as types, shapes and bytes, inside containers, too."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {name: plain_value(value[name]) for name in sorted(value, key=str)}
    return [plain_value(entry) for entry in value] if isinstance(value, list | tuple) else value


def means_the_same(content: bytes, changed: bytes, meaning: Callable[[bytes], Any]) -> bool:
    """Whether changed bytes mean what they did; what cannot be read means nothing."""
    try:
        # as text: JSON's NaN equals nothing, not even itself
        return repr(meaning(changed)) == repr(meaning(content))
    except Exception:  # whatever the library says of damaged bytes
        return False


def restore(path: Path, content: bytes) -> None:
    """Put the bytes of a file back, as a new file."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
