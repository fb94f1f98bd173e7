"""Files that are never half-written, and digests of values."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name beside `path`, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, likewise."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, likewise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary)
    os.replace(temporary, path)


def value_digest(value: object, length: int = 8) -> str:
    """First hex digits of the sha256 of a JSON-able value, independent of the order of mapping
    keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]
