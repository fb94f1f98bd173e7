"""Engines: workers share a queue, die, and come back; what comes out is the same."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.config import compose
from experiments.run import cell
from experiments.store import locks, provenance
from experiments.store.progress import ProgressDisplay
from experiments.table import __main__ as table_command
from experiments.table import engine, jobs, workers
from experiments.table.engine import Engine, read_engine
from experiments.table.job_queue import ATTEMPTS, JobQueue
from experiments.table.jobs import Job
from experiments.table.local import LocalWorkers, worker_devices
from experiments.table.slurm import SlurmWorkers
from experiments.table.workers import Worker
from ptq.types import ConfigError
from tests.experiments.cells import ROOT, TINY


def queue_of(folder: Path, number: int = 3) -> JobQueue:
    return JobQueue.create(folder / "queue", [Job("run", (f"seed={i}",)) for i in range(number)])


def answering(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[Any]]
) -> list[tuple[str, bool]]:
    """Jobs answer in turn what is given for their seed, and {"ok"} otherwise; returns the calls."""
    calls: list[tuple[str, bool]] = []

    def run_job(job: Job, wait: bool, display: ProgressDisplay) -> dict[str, Any] | None:
        calls.append((job.overrides[0], wait))
        left = answers.get(job.overrides[0], [])
        return left.pop(0) if left else {"ok": job.overrides[0]}

    monkeypatch.setattr(jobs, "run_job", run_job)
    return calls


def test_a_job_is_the_same_after_a_file() -> None:
    job = Job("perturbation", ("method=fp", "seed=1"), {"trials": 3}, {"reference": None})
    assert Job.parse(job.text()) == job


def test_work_does_every_job_once_and_those_that_others_hold_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = answering(monkeypatch, {"seed=0": [None]})  # None: another process computes that cell
    made = queue_of(tmp_path)
    Worker(made).work()
    assert calls == [("seed=0", False), ("seed=1", False), ("seed=2", False), ("seed=0", True)]
    assert [made.outcome(i) for i in range(3)] == [{"ok": f"seed={i}"} for i in range(3)]
    assert made.open_jobs() == []
    assert [(made.folder / f"{i}.tries").stat().st_size for i in range(3)] == [1, 1, 1]
    Worker(made).work()
    assert len(calls) == 4


def test_a_job_that_waited_is_tried_again_before_later_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 0.0)
    calls = answering(monkeypatch, {"seed=0": [None, None]})
    Worker(queue_of(tmp_path, 4)).work()
    first = [
        ("seed=0", False),
        ("seed=1", False),
        ("seed=0", False),
        ("seed=2", False),
        ("seed=0", False),
    ]
    assert calls == [*first, ("seed=3", False)]


def test_a_held_job_is_left_to_its_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answering(monkeypatch, {})
    made = queue_of(tmp_path)
    with (made.folder / "1.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        Worker(made).work()
    assert [c for c, _ in calls] == ["seed=0", "seed=2"]
    assert made.open_jobs() == [1]


def test_a_job_of_which_processes_die_fails_after_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = answering(monkeypatch, {})
    made = queue_of(tmp_path)
    for _ in range(ATTEMPTS):
        with made.claim(1) as ours:
            assert ours
            assert made.begin(1)  # and then the process is gone
    Worker(made).work()
    assert [c for c, _ in calls] == ["seed=0", "seed=2"]
    assert "its process died, 3 times in a row" in made.outcome(1)["error"]


SHORT = {
    "error": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
    "traceback": "...",
}


def test_a_job_that_lacks_gpu_memory_beside_others_is_done_again_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = answering(monkeypatch, {"seed=0": [SHORT], "seed=1": [SHORT, SHORT]})
    made = queue_of(tmp_path)
    Worker(made).work()
    assert [c for c, _ in calls] == ["seed=0", "seed=0", "seed=1", "seed=1", "seed=2"]
    assert made.outcome(0) == {"ok": "seed=0"}
    assert made.outcome(1)["error"].startswith("out of memory with no other worker on its GPU")
    assert "Tried to allocate 2 GiB" in made.outcome(1)["error"]
    assert made.outcome(1)["traceback"] == "..."


@pytest.mark.parametrize(("what", "failures"), [("run", 1), ("speed", 0)])
def test_what_must_be_alone_on_a_gpu_waits_for_the_others_on_it_alone(
    what: str, failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = answering(monkeypatch, {"seed=0": [SHORT] * failures})
    made = JobQueue.create(tmp_path / "queue", [Job(what, ("seed=0",))])
    worker = threading.Thread(target=Worker(made).work, daemon=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with made.hold_gpu(alone=True):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        with made.hold_gpu(alone=False):
            worker.start()
            worker.join(0.3)
            assert len(calls) == failures
            assert made.open_jobs() == [0]
        worker.join(10)
    assert made.outcome(0) == {"ok": "seed=0"}


def test_an_error_that_is_not_the_users_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise KeyError("gps")

    monkeypatch.setattr(jobs, "measure_cell", fails)
    found = jobs.run_job(Job("run", ()))
    assert found["error"] == "KeyError: 'gps'"
    assert "in fails" in found["traceback"]


class Vain:
    """Workers that end before they begin anything."""

    number = 2
    started = 0
    stopped = False

    def __init__(self, log: Path) -> None:
        self.logs = [log]

    def alive(self) -> int:
        return 0

    def start(self, number: int) -> None:
        self.started += 1

    def stop(self) -> None:
        self.stopped = True


def test_workers_that_never_begin_are_given_up_with_their_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "POLL", 0.0)
    (tmp_path / "log").write_text("Traceback\nModuleNotFoundError: no torch\n\n")
    vain = Vain(tmp_path / "log")
    with pytest.raises(
        ConfigError, match="workers end before they begin a job: ModuleNotFoundError: no torch"
    ):
        engine.watch_workers(queue_of(tmp_path), vain)
    assert (vain.started, vain.stopped) == (engine.VAIN_STARTS, True)


def test_what_workers_say_of_files_they_ignore_is_said_once(tmp_path: Path) -> None:
    logs = [tmp_path / "worker-0.log", tmp_path / "worker-1.log"]
    logs[0].write_text("ignored: a: it is truncated\nsomething else\n")
    logs[1].write_text("ignored: a: it is truncated\nignored: b: is of run 1\n")
    assert engine.ignored_files(logs) == ["ignored: a: it is truncated", "ignored: b: is of run 1"]


@pytest.mark.parametrize(
    ("devices", "jobs_", "gpus", "expected"),
    [
        (None, 2, 1, [None, None]),
        ("0,1", 1, 1, ["0", "1"]),
        ("0,1", 2, 1, ["0", "0", "1", "1"]),
        ("3,5,6,7", 1, 2, ["3,5", "6,7"]),
    ],
)
def test_workers_get_their_gpus(
    devices: str | None, jobs_: int, gpus: int, expected: list, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices is not None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices or "")
    assert worker_devices(Engine("local", jobs=jobs_, gpus=gpus)) == expected


def test_workers_are_told_how_many_share_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda *_, env, **__: told.append((env["CUDA_VISIBLE_DEVICES"], env[provenance.WORKERS])),
    )
    LocalWorkers(Engine("local", jobs=3), queue_of(tmp_path)).start(6)
    assert told == [("0", "3")] * 3 + [("1", "3")] * 3
    monkeypatch.setenv(provenance.WORKERS, "3")
    assert provenance.elapsed_cost(time.perf_counter())["workers"] == 3


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ConfigError, match="engine.gpus: 2 is more than the 1 of this machine"):
        worker_devices(Engine("local", gpus=2))


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("nope", [], "engine: 'nope' is not one of inproc, local, slurm"),
        ("local", ["jobs=0"], "engine.jobs: 0 is not"),
        ("local", ["nope=1"], "engine.nope: .*allowed are name, jobs"),
        ("local", ["thread=1"], "engine.thread: .*; did you mean threads?"),
        ("slurm", ["gpus=-1"], "engine.gpus: -1 is not"),
        ("local", ["jobs=many"], "engine.jobs: Value 'many' .*, allowed are integers from 1 to"),
        ("local", ["setup=[a"], "engine: one of setup=.a is no"),
        ("local", ["name=slurm"], "engine.name: 'slurm' is not one of local"),
    ],
)
def test_a_wrong_engine_is_refused_in_one_line(
    name: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        read_engine(name, overrides)
    assert "\n" not in str(refused.value)


def test_slurm_without_slurm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="slurm needs sbatch on the PATH"):
        SlurmWorkers(read_engine("slurm", []), queue_of(tmp_path))


def test_a_cell_that_another_process_runs_is_busy_unless_one_waits(tmp_path: Path) -> None:
    job = Job("run", ("method=fp", *TINY, f"runs={tmp_path}"))
    folder = cell.prepare_run(compose.configure(list(job.overrides))).folder
    with locks.hold_lock(folder):
        assert jobs.run_job(job, wait=False) is None
        with pytest.raises(locks.Busy), locks.hold_lock(folder, wait=False):
            pass


def test_workers_killed_at_random_points_change_nothing_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (
        "name=main",
        "model=rar_twin",
        "quant=w6a6",
        "row=RTN",
        *TINY,
        "eval.n=8",
        "eval.sequences=4",
    )
    killed = tmp_path / "killed"
    whole = tmp_path / "whole"
    # sums depend on threads
    command = [sys.executable, "-m", "experiments.table", *own, "workers=2", "engine.threads=1"]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen([*command, f"runs={killed}"], cwd=ROOT, stdout=log, stderr=log)
        kill_two(killed, running)
        assert running.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    monkeypatch.setattr(sys, "argv", ["table", *own, f"runs={whole}"])
    table_command.main()  # in this process
    part = "main-model=rar_twin-quant=w6a6-row=RTN"
    for runs in (killed, whole):
        assert (runs / "tables" / part / "costs.csv").is_file()
        assert not list((runs / "tables").glob(".board-*"))
        found = json.loads((runs / "tables" / part / "results.json").read_text())
        assert [(r["table"]["row"], r["table"]["point"]["quant"]) for r in found] == [
            ("RTN", "w6a6")
        ]
    tables = [(runs / "tables" / part / "table.csv").read_bytes() for runs in (killed, whole)]
    assert tables[0] == tables[1]


def kill_two(runs: Path, running: subprocess.Popen) -> None:
    """Kill a worker hard when the first cell has begun, and another when the first one is done."""
    for pattern in ("rar_twin-*/config.yaml", "rar_twin-*/metrics.json"):
        while running.poll() is None and not list(runs.glob(pattern)):
            time.sleep(0.05)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        running_workers = [
            c
            for c in children
            if "experiments.table.workers" in Path(f"/proc/{c}/cmdline").read_text()
        ]
        assert running_workers
        os.kill(int(running_workers[0]), signal.SIGKILL)


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    job = Job("run", ("method=fp", *TINY, f"runs={tmp_path}", "eval.n=4000"))
    made = JobQueue.create(tmp_path / "queue", [job])
    script = (
        "import subprocess, sys; "
        "from experiments.table.processes import child_environment; "
        "p = subprocess.Popen([sys.executable, '-m', 'experiments.table.workers', sys.argv[1]], "
        "env=child_environment()); print(p.pid, flush=True); import time; time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(made.folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        worker = int(parent.stdout.readline())
        while not (made.folder / "0.tries").is_file():
            time.sleep(0.05)
        parent.kill()
    for _ in range(100):
        state = Path(f"/proc/{worker}/stat")
        if not state.is_file() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker lives on")
