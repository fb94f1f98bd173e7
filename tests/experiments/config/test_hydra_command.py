"""One bad job does not end a grid, whoever launches it: the others run, the failed are listed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CONFIG = """
defaults: [override hydra/job_logging: none, override hydra/hydra_logging: none, _self_]
seed: 0
name: .
runs: {runs}
hydra:
  run: {{dir: "."}}
  sweep: {{dir: "{runs}", subdir: "${{name}}"}}
  output_subdir: null
"""
# the task is a command's: jobs that are told apart by their seed
COMMAND = """
import os, sys
from pathlib import Path
from experiments.config.hydra_command import run_hydra
from experiments.config.overrides import Overrides
from ptq.errors import user_errors
from ptq.spec import ConfigError

def run_job(config):
    seed = config.seed
    if seed == -1:
        raise ConfigError("seed: -1 is not an integer from 0 on")
    if seed == -2:
        raise OSError(28, "No space left on device", "runs/a")
    if seed == -3:
        raise MemoryError
    if seed == -4:
        raise KeyError("gps")
    if seed == -5:
        sys.exit("error: a task that exits")
    if seed == -6:
        raise KeyboardInterrupt
    if seed == -7:
        os.kill(os.getpid(), 9)
    Path(config.runs, f"{seed}.done").touch()

grid = [word.split() for word in os.environ["GRID"].split(",")] if "GRID" in os.environ else None
with user_errors():
    run_hydra(run_job, Overrides(Path(os.environ["CONF"]), ""), grid)
"""
REASONS = {
    -1: "seed: -1 is not an integer from 0 on",
    -2: "runs/a: No space left on device",
    -3: "memory: there is too little (the system gives none)",
    -4: "KeyError: 'gps'",
}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG.format(runs=tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def command(runs: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CONF": str(runs.parent), "PYTHONPATH": str(ROOT), **variables}
    environment |= {"TMPDIR": str(runs.parent)}
    script = runs.parent / "command.py"
    script.write_text(COMMAND)
    line = [sys.executable, str(script), *arguments]
    return subprocess.run(
        line, env=environment, cwd=runs, capture_output=True, text=True, timeout=120
    )


def seeds_done(runs: Path) -> list[int]:
    return sorted(int(path.stem) for path in runs.glob("*.done"))


LAUNCHERS = {
    "basic": (),
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "submitit": ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=2"),
}


@pytest.mark.parametrize("launcher", ["basic", "submitit"])
def test_a_grid_may_be_a_list_of_jobs_whoever_runs_them(launcher: str, runs: Path) -> None:
    done = command(runs, "-m", *LAUNCHERS[launcher], GRID="seed=0,seed=-1,seed=2 name=.")
    assert done.returncode == 1
    assert seeds_done(runs) == [0, 2], done.stderr
    assert done.stderr.splitlines()[-2:] == [
        "failed: seed=-1: seed: -1 is not an integer from 0 on",
        "error: 1 of 3 jobs failed",
    ]
    assert not list(runs.parent.rglob("ar-ptq-jobs-*"))


# the latter looks at its jobs every few seconds
@pytest.mark.parametrize("launcher", ["joblib", pytest.param("submitit", marks=pytest.mark.slow)])
def test_a_job_that_its_launcher_lost_is_one_line(launcher: str, runs: Path) -> None:
    done = command(runs, "-m", "seed=-7", *LAUNCHERS[launcher])
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    name = LAUNCHERS[launcher][0].partition("=")[2]
    assert last.startswith(f"error: hydra/launcher: {name} failed: ")


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_bad_jobs_of_a_grid_are_listed_and_the_others_run(launcher: str, runs: Path) -> None:
    done = command(runs, "-m", "seed=-1,0,-2,-3,1,-4,2", *LAUNCHERS[launcher])
    assert done.returncode == 1
    assert seeds_done(runs) == [0, 1, 2]
    lines = done.stderr.splitlines()
    expected = [f"failed: seed={seed}: {reason}" for seed, reason in REASONS.items()]
    assert lines[-5:] == [*expected, "error: 4 of 7 jobs failed"]
    assert done.stderr.count("Traceback") == 1  # that of the KeyError
    assert not list(runs.parent.glob("ar-ptq-jobs-*"))


def test_jobs_that_cannot_be_composed_are_listed_and_the_others_run(runs: Path) -> None:
    done = command(runs, "-m", "seed=-1,0,1", "name=.,${nope}")
    assert done.returncode == 1
    assert seeds_done(runs) == [0, 1]
    lines = done.stderr.splitlines()
    assert lines[-1] == "error: 4 of 6 jobs failed"
    refused = [line for line in lines if "Interpolation key 'nope' not found" in line]
    assert len(refused) == 3
    assert "Traceback" not in done.stderr


def test_a_single_bad_job_says_one_line(runs: Path) -> None:
    done = command(runs, "seed=-2")
    assert done.returncode == 1
    assert done.stderr == f"error: {REASONS[-2]}\n"


def test_a_single_job_with_a_fault_of_the_program_keeps_its_traceback(runs: Path) -> None:
    done = command(runs, "seed=-4")
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: 'gps'\n")
    assert "in run_job" in done.stderr


def test_ctrl_c_ends_a_grid_and_what_failed_before_is_listed(runs: Path) -> None:
    done = command(runs, "-m", "seed=0,-1,-6,1")
    assert done.returncode == 130
    assert seeds_done(runs) == [0]
    assert done.stderr.splitlines() == [
        f"failed: seed=-1: {REASONS[-1]}",
        "error: stopped by Ctrl-C; what is finished is kept",
    ]
