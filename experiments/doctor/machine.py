"""Checks of the machine: packages, devices, compilers, services, disk."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import netrc
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from urllib.parse import urlparse

import torch

from experiments.doctor.findings import MISSING, OK, PART, Finding
from models.weights.conversions import cache_root
from ptq.config.files import PACKAGES
from ptq.errors import error_line

REQUIREMENTS = PACKAGES / "requirements.txt"
OLDEST_PYTHON = (3, 11)
GIGABYTE = 1e9
LEAST_FREE = 1e9  # bytes of a disk, below which even runs of twins may not fit
CLUSTER_SECONDS = 10  # after which Slurm's controller counts as away
# of engines and trackers, which have checks of their own
OPTIONAL = {"hydra-joblib-launcher", "hydra-submitit-launcher", "submitit", "wandb"}
MOST_SHOWN = 4  # packages of another version, before the line says how many more


def check_machine(runs: Path) -> list[Finding]:
    """All checks of this file, in the order in which they are shown."""
    return [
        check_python(),
        check_packages(),
        check_processor(),
        check_gpus(),
        check_several_gpus(),
        check_triton(),
        check_compiler(),
        check_torchrun(),
        check_tracker_package(),
        check_tracker_login(),
        check_slurm(),
        check_disk("disk of runs", runs),
        check_disk("disk of weights", cache_root()),
    ]


def check_python() -> Finding:
    version = platform.python_version()
    oldest = ".".join(map(str, OLDEST_PYTHON))
    is_new_enough = sys.version_info >= OLDEST_PYTHON
    return Finding("Python", OK if is_new_enough else MISSING, f"{version}, {oldest} or later")


def check_packages() -> Finding:
    """Installed versions beside those of requirements.txt, which results and tests are of."""
    if not REQUIREMENTS.is_file():  # the package was installed, with its requirements
        return Finding("packages", OK, f"torch {torch.__version__}")
    wanted = re.findall(r"^([\w-]+)==(\S+)", REQUIREMENTS.read_text(), re.MULTILINE)
    absent = []
    others = []
    for name, version in wanted:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
            continue
        if found.partition("+")[0] != version:  # torch's version names its CUDA
            others.append(f"{name} {found} (not {version})")
    if absent:
        text = f"not here: {', '.join(absent)}; pip install -r requirements.txt"
        is_enough = set(absent) <= OPTIONAL
        return Finding("packages", PART if is_enough else MISSING, text)
    if others:
        more = f" and {len(others) - MOST_SHOWN} more" if len(others) > MOST_SHOWN else ""
        text = f"{', '.join(others[:MOST_SHOWN])}{more}; results were made with the latter"
        return Finding("packages", PART, text)
    return Finding(
        "packages", OK, f"the {len(wanted)} of requirements.txt, torch {torch.__version__}"
    )


def check_processor() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{platform.machine()}, {cores} cores, {pages / GIGABYTE:.0f} GB of memory"
    return Finding("processor", OK, text)


def check_gpus() -> Finding:
    """The GPUs that PyTorch sees, each of which has to add two numbers."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"PyTorch is built for CUDA {built}" if built else "PyTorch is built without CUDA"
        return Finding("GPU", MISSING, f"none that PyTorch sees ({why}); all runs on the CPU")
    names = []
    for index in range(torch.cuda.device_count()):
        try:
            torch.ones(2, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            return Finding("GPU", MISSING, f"cuda:{index} does not work: {error_line(error)}")
        memory = torch.cuda.get_device_properties(index).total_memory
        names.append(f"{torch.cuda.get_device_name(index)}, {memory / GIGABYTE:.0f} GB")
    counts = []
    for name in dict.fromkeys(names):
        counts.append(f"{names.count(name)} x {name}")
    return Finding("GPU", OK, f"{'; '.join(counts)}; CUDA {torch.version.cuda}")


def check_several_gpus() -> Finding:
    count = torch.cuda.device_count()
    state = OK if count > 1 else MISSING
    return Finding("several GPUs", state, f"{count} here")


def check_triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        return Finding("Triton", MISSING, "not here; it comes with PyTorch for CUDA on Linux")
    return Finding("Triton", OK, importlib.metadata.version("triton"))


def check_compiler() -> Finding:
    """What Triton and torch.compile build with; nothing is compiled for this check."""
    found = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if found is None:
        return Finding("C compiler", MISSING, "neither gcc nor clang is on the PATH")
    if not header.is_file():
        text = f"{found}, but no {header} (Debian: python3-dev)"
        return Finding("C compiler", MISSING, text)
    return Finding("C compiler", OK, found)


def check_torchrun() -> Finding:
    if not torch.distributed.is_available():
        return Finding("torchrun", MISSING, "PyTorch is built without torch.distributed")
    available = torch.distributed.is_nccl_available() and torch.cuda.is_available()
    return Finding("torchrun", OK, "NCCL" if available else "gloo, processes on the CPU")


def check_tracker_package() -> Finding:
    if importlib.util.find_spec("wandb") is None:
        return Finding("W&B", MISSING, "the package wandb is not here: pip install wandb")
    version = importlib.metadata.version("wandb")
    return Finding("W&B", OK, f"wandb {version}; tracker=wandb_offline needs no more")


def check_tracker_login() -> Finding:
    """Whether W&B knows a key; it is not shown, and nobody is asked whether it is valid."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        has_entry = netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):  # mostly there is no such file
        has_entry = False
    if not has_entry and not os.environ.get("WANDB_API_KEY"):
        text = "tracker=wandb needs one: wandb login, or WANDB_API_KEY"
        return Finding("W&B login", MISSING, text)
    return Finding("W&B login", OK, "there is a key; the server was not asked about it")


def check_slurm() -> Finding:
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        return Finding("Slurm", MISSING, "no sbatch and sinfo on the PATH")
    if importlib.util.find_spec("submitit") is None:
        return Finding("Slurm", MISSING, "the package submitit is not here: pip install submitit")
    try:
        answer = subprocess.run(
            ["sinfo", "-h", "-o", "%P %D %t"],
            capture_output=True,
            text=True,
            timeout=CLUSTER_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("Slurm", MISSING, f"sinfo does not answer ({error_line(error)})")
    if answer.returncode != 0:
        reason = answer.stderr.strip().partition("\n")[0]
        return Finding("Slurm", MISSING, f"sinfo does not answer ({reason})")
    partitions = ", ".join(answer.stdout.split("\n")).strip(", ")
    return Finding("Slurm", OK, f"partitions, nodes, states: {partitions}")


def check_disk(name: str, folder: Path) -> Finding:
    """Room where a folder is, or will be."""
    place = folder.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Finding(name, MISSING, error_line(error))
    if not os.access(place, os.W_OK):
        return Finding(name, MISSING, f"{place} cannot be written")
    state = OK if free >= LEAST_FREE else PART
    return Finding(name, state, f"{free / GIGABYTE:.0f} GB free for {folder}")
