"""torchvision, timm and torch-fidelity import on whatever torch is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from models import torchvision_shim

AFTER = (
    "from models.torchvision_shim import ensure_torchvision\n"
    "ensure_torchvision()\n"
    "ensure_torchvision()\n"
)
FAILED_BEFORE = "try:\n    import torchvision\nexcept RuntimeError:\n    pass\n"
USE = "import timm, timm.layers, torch_fidelity, torchvision.transforms\nprint('imported')"


@pytest.mark.parametrize("before", ["", FAILED_BEFORE], ids=["first", "after a failed import"])
def test_a_fresh_process_imports_timm_and_torch_fidelity(before: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", before + AFTER + USE], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "imported", done.stderr


@pytest.fixture
def defined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that `ensure_torchvision` declares, on a CPU-only build, without declaring them."""
    names: list[str] = []
    monkeypatch.setattr(torch.library, "define", lambda name, schema: names.append(name))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torchvision_shim, "_operators_load", lambda: False)
    monkeypatch.setattr(torchvision_shim, "NEEDED_AT_IMPORT", ("nms_of_this_test",))
    return names


def test_missing_operators_are_declared(defined: list[str]) -> None:
    torchvision_shim.ensure_torchvision()
    assert defined == ["torchvision::nms_of_this_test"]


@pytest.mark.parametrize("build", ["cuda", "hip"])
def test_nothing_happens_on_gpu_builds(
    defined: list[str], monkeypatch: pytest.MonkeyPatch, build: str
) -> None:
    monkeypatch.setattr(torch.version, build, "13.0")
    torchvision_shim.ensure_torchvision()
    assert defined == []


def test_nothing_happens_where_the_operators_load(
    defined: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision_shim, "_operators_load", lambda: True)
    torchvision_shim.ensure_torchvision()
    assert defined == []


def test_no_torchvision_at_all_is_not_our_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_shim.importlib.util, "find_spec", lambda name: None)
    assert torchvision_shim._operators_load()
