"""The Triton kernels on a CPU, see `interpreted.py`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.experiments.cells import ROOT
from tests.interpreted import KERNELS


@pytest.mark.parametrize("name", list(KERNELS))
def test_a_kernel_computes_what_pytorch_does(name: str) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.interpreted", name]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
