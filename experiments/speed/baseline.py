"""A checkout of a former revision, timed turn by turn with this one.

    python -m experiments.speed what=generate model=rar_b baseline=../former

The checkout runs in a process of its own (`baseline_worker.py`), whose working directory and
PYTHONPATH it is: what that process imports of `models`, `ptq` and `experiments` is the former code,
and no variant of it lives here. Both processes hold their models on one device, and are timed in
turn. `AR_PTQ_BASELINE_REVISION` names the revision of a checkout without a repository.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from experiments.speed.timing import ratio_interval
from experiments.store.provenance import REVISION
from ptq.spec import ConfigError

BASELINE_REVISION = "AR_PTQ_BASELINE_REVISION"  # what `REVISION` is here, of a checkout
WORKER = Path(__file__).resolve().with_name("baseline_worker.py")
VARIANT = "bf16"  # what speed-ups are counted from


class Baseline:
    """The process that runs a checkout, seen from here."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.revision: str | None = None
        self.variant = VARIANT
        self.prepared: dict[str, int] = {}
        self.owed = 0  # answers that are still to come

    def describe(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"revision": self.revision, "variant": self.variant}

    def begin(self, what: str, overrides: list[str]) -> None:
        """Begin to build the model, while this process builds its own."""
        self._send({"what": what, "variant": self.variant, "overrides": overrides})

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            ConfigError: the process has ended.
        """
        self.wait()
        self._send(request)
        self.owed -= 1
        return self._answer()

    def prepare(self, **sizes: int) -> None:
        """Begin to compile and capture for work of these sizes, unless it was the last so prepared.

        It goes on while this process does the same; `wait` for it before anything is timed.
        """
        if sizes != self.prepared:
            self._send({"prepare": sizes})
            self.prepared = sizes

    def wait(self) -> None:
        """Wait until all that was begun is done.

        Raises:
            ConfigError: the process has ended.
        """
        while self.owed:
            self.owed -= 1
            answer = self._answer()
            self.revision = answer.get("revision", self.revision)

    def time_once(self, seed: int) -> float:
        """Seconds of the prepared work, once."""
        return self.ask(time=seed)["seconds"]

    def _send(self, request: Mapping[str, Any]) -> None:
        self.owed += 1
        with suppress(BrokenPipeError):  # it has no answer then
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise ConfigError(
                "baseline: the checkout cannot run this; what it printed stands above"
            )
        return json.loads(line)


@contextmanager
def start_baseline(
    folder: str | None, what: str, overrides: list[str]
) -> Iterator[Baseline | None]:
    """The process of a checkout, which ends with the context; None without a folder.

    Raises:
        ConfigError: the folder is no checkout.
    """
    if folder is None:
        yield None
        return
    require_checkout(folder)
    root = Path(folder).resolve()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(search_path(root))}
    environment.pop(REVISION, None)  # ours
    if BASELINE_REVISION in environment:
        environment[REVISION] = environment[BASELINE_REVISION]
    process = subprocess.Popen(
        [sys.executable, str(WORKER)],
        cwd=root,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        baseline = Baseline(process)
        baseline.begin(what, overrides)
        yield baseline
    except BaseException:  # interrupted ones do not wait for its compiler
        process.kill()
        raise
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()


def compare_with_baseline(ours: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """How many times as fast as the baseline ours are, round by round, and the baseline's median.

    Both in any unit; nothing without a baseline.
    """
    if not baseline:
        return {}
    ratios = ratio_interval(baseline, ours)
    return {
        "baseline": round(statistics.median(baseline), 4),
        "speedup": ratios["ratio"],
        "speedup_interval": ratios["interval"],
    }


def require_checkout(folder: str) -> None:
    """Refuse a folder that holds no checkout of this project.

    Raises:
        ConfigError: it does not.
    """
    if not (Path(folder) / "experiments" / "speed" / "generate.py").is_file():
        raise ConfigError(f"baseline: {folder} is no checkout of this project")


def search_path(root: Path) -> list[str]:
    """PYTHONPATH of the checkout's process: ours, with the checkout in place of this tree."""
    here = Path(__file__).resolve().parents[2]
    ours = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [entry for entry in ours if entry and Path(entry).resolve() != here]
    return [str(root), *kept]
