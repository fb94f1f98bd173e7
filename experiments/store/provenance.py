"""Where a result comes from: versions, device, code revision."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

REVISION = "AR_PTQ_REVISION"  # names the revision where there is no repository
WORKERS = "AR_PTQ_WORKERS"  # set by engines: how many processes share a worker's device
_PACKAGES = ("torch", "numpy", "torch-fidelity", "scikit-learn", "hydra-core", "safetensors")

NO_CODE = (":(top,exclude)experiments/results",)  # for Git: paths that decide no numbers


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


def package_versions(device: torch.device) -> Mapping[str, object]:
    """Python, package and CUDA versions and the device."""
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "cuda": torch.version.cuda,
        "device": device_name(device),
    }


def elapsed_cost(started: float) -> dict[str, float]:
    """Seconds since `started` (of `time.perf_counter`), and how many workers shared the device.

    Towards a table's end fewer of them are left.
    """
    return {
        "cell_s": round(time.perf_counter() - started, 3),
        "workers": int(os.environ.get(WORKERS, 1)),
    }


def code_revision() -> str | None:
    """Git revision of the working tree, with `+` if it has uncommitted changes.

    Published results are no changes of the code: tables are measured and published in turn. None
    outside a repository. Where the code is deployed without its repository, the environment
    variable AR_PTQ_REVISION may name it.
    """
    if REVISION in os.environ:
        return os.environ[REVISION]
    try:
        # an installed package may lie in somebody else's repository
        _ask_git("ls-files", "--error-unmatch", Path(__file__).name)
        revision = _ask_git("rev-parse", "--short=12", "HEAD")
        # -uno: new files are no changes
        changes = _ask_git("status", "--porcelain", "-uno", "--", ":(top)", *NO_CODE)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{revision}+" if changes else revision


def _ask_git(*arguments: str) -> str:
    folder = Path(__file__).parent  # git finds the repository from here upwards
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
