"""Where a result comes from: versions, device, code revision; and files that are never half-written."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WORKERS = "AR_PTQ_WORKERS"  # set by engines: how many processes share a worker's device
_PACKAGES = ("torch", "numpy", "torch-fidelity", "scikit-learn", "hydra-core", "safetensors")


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


def digest(value: object, length: int = 8) -> str:
    """First hex digits of the sha256 of a JSON-able value, independent of the order of mapping keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def device_name(device: torch.device) -> str:
    """What the computation runs on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions(device: torch.device) -> Mapping[str, object]:
    """Python, package and CUDA versions and the device."""
    return {
        "python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}, "cuda": torch.version.cuda,
        "device": device_name(device),
    }


def spent(started: float) -> dict[str, float]:
    """Seconds since `started` (of `time.perf_counter`), and how many workers shared the device, fewer of them at a
    table's end."""
    return {"cell_s": round(time.perf_counter() - started, 3), "workers": int(os.environ.get(WORKERS, 1))}


def revision() -> str | None:
    """Git revision of the working tree, with `+` if it has uncommitted changes; None outside a repository.

    Where the code is deployed without its repository, the environment variable AR_PTQ_REVISION may name it.
    """
    if "AR_PTQ_REVISION" in os.environ:
        return os.environ["AR_PTQ_REVISION"]
    root = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
