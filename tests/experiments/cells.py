"""Tiny cells on the shipped twin, and the command line, for the tests of this folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from experiments.config.compose import CONF, configure
from experiments.config.schema import RunConfig

ROOT = CONF.parent
TINY = ("eval.n=16", "eval.sequences=8", "calib.n=8", "sampler.microbatch=8", "device=cpu")


def config_of(*overrides: str) -> RunConfig:
    """What `python -m experiments.run OVERRIDES` would run."""
    return configure(list(overrides))


def tiny(runs: Path, *overrides: str) -> RunConfig:
    """A cell of 16 images in two micro-batches, 8 held-out sequences and 8 calibration rows."""
    return config_of(*TINY, f"runs={runs}", *overrides)


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m experiments.run ARGUMENTS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
