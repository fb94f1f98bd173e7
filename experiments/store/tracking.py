"""Tracking of runs: local files are the record, Weights & Biases mirrors them.

Every run writes `metrics.jsonl` line by line. With `wandb_offline` or `wandb` the same figures and
images also go to W&B; if W&B is missing, has no key, or the network is down, the run says so once
and goes on with its files.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlparse

import numpy as np

from experiments.store.files import without_nonfinite
from ptq.files import value_digest
from ptq.spec import require

PROJECT = "ar-ptq"
MODES = ("none", "wandb_offline", "wandb")
TAG_LETTERS = 64  # W&B takes no longer tags
NAME_LETTERS = 128  # nor groups and names


def sync_command(place: Path) -> str | None:
    """The command that uploads the offline runs below a folder; None if there is none."""
    pattern = place / "wandb" / "offline-run-*"
    waiting = [path for path in pattern.parent.glob(pattern.name) if not is_uploaded(path)]
    return f"wandb sync {shlex.quote(str(pattern.parent))}/{pattern.name}" if waiting else None


def is_uploaded(run: Path) -> bool:
    """Whether `wandb sync` has been through the folder of an offline run."""
    return any(run.glob("*.wandb.synced"))


def _reachable(url: str, seconds: float = 2.0) -> bool:
    parts = urlparse(url)
    try:
        with socket.create_connection((parts.hostname, parts.port or 443), timeout=seconds):
            return True
    except OSError:
        return False


def shorten(text: str | None, letters: int) -> str | None:
    """A text of at most so many letters; a cut one ends in a digest, so that it stays unique."""
    if text is None or len(text) <= letters:
        return text
    digest = value_digest(text)
    return f"{text[: letters - len(digest) - 1]}~{digest}"


def _as_media(diagnostics: Mapping[str, Any]) -> dict[str, object]:
    """Tables and histograms as W&B's own."""
    import wandb

    media: dict[str, object] = {}
    for name in ("layers", "blocks"):
        lines = diagnostics[name]
        if lines:
            columns = list(lines[0])
            rows = [[line[column] for column in columns] for line in lines]
            media[name] = wandb.Table(columns=columns, data=rows)
    for site, histogram in diagnostics["histograms"].items():
        bars = (histogram["counts"], histogram["edges"])
        media[f"activations/{site}"] = wandb.Histogram(np_histogram=bars)
    return media


class Tracker:
    """Context manager for one run.

    Args:
        folder: the run's folder.
        place: the folder below which W&B keeps its files, cache and staging area, in `wandb`; the
            run's if left out. Runs that share it are uploaded by one command (`sync_command`).
        mode: none, wandb_offline or wandb.
        config: the resolved config, for W&B.
        group, tags, name, job_type: how W&B files the run; what is too long for it is shortened.
        project, entity: of W&B; without an entity that of the login.
    """

    def __init__(
        self,
        folder: Path,
        mode: str = "none",
        config: Mapping[str, object] | None = None,
        *,
        name: str | None = None,
        group: str | None = None,
        tags: tuple[str, ...] = (),
        job_type: str | None = None,
        project: str = PROJECT,
        entity: str | None = None,
        place: Path | None = None,
    ) -> None:
        require("tracker", mode, MODES)
        self.folder = folder
        self.place = place or folder
        self.mode = mode
        self._init = {
            "project": project,
            "entity": entity,
            "config": dict(config or {}),
            "name": shorten(name, NAME_LETTERS),
            "group": shorten(group, NAME_LETTERS),
            "job_type": shorten(job_type, TAG_LETTERS),
            "tags": [shorten(tag, TAG_LETTERS) for tag in dict.fromkeys(tags) if tag],
        }
        self._run = None
        self._file = None
        self._variables: list[str] = []  # of the environment, set for this run

    def __enter__(self) -> Tracker:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.mode != "none":
            self._run = self._try("start", self._start)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._run is not None:
            self._try("finish", lambda: self._run.finish(exit_code=0 if kind is None else 1))
        for name in self._variables:
            os.environ.pop(name, None)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Append one line of figures; those that are no finite number are null in the file."""
        if self._file is None:
            # appended line by line: a killed run keeps its figures, and a resumed one adds to them
            self._file = (self.folder / "metrics.jsonl").open("a", buffering=1)
        line = {"step": step, "time": round(time.time(), 3), **figures}
        self._file.write(json.dumps(without_nonfinite(line), allow_nan=False) + "\n")
        if self._run is not None:
            self._try("log", lambda: self._run.log(dict(figures), step=step))

    def image(self, name: str, path: Path) -> None:
        """Show a PNG that the run has written."""
        if self._run is not None:
            import wandb

            self._try("log an image", lambda: self._run.log({name: wandb.Image(str(path))}))

    def pairs(self, name: str, images: np.ndarray) -> None:
        """Show uint8 images (N, H, W, 3) one by one."""
        if self._run is not None:
            import wandb

            self._try(
                "log images",
                lambda: self._run.log({name: [wandb.Image(image) for image in images]}),
            )

    def diagnostics(self, found: Mapping[str, Any]) -> None:
        """Show errors per layer and block as tables, and histograms (`run/diagnostics.py`)."""
        if self._run is not None:
            self._try("log tables and histograms", lambda: self._run.log(_as_media(found)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Show a table."""
        if self._run is not None:
            import wandb

            self._try(
                "log a table",
                lambda: self._run.log({name: wandb.Table(columns=list(columns), data=list(rows))}),
            )

    def artifact(self, name: str, kind: str, paths: Sequence[Path]) -> None:
        """Keep files together, under a name that has a version for each time they are kept."""
        if self._run is not None:
            self._try("keep an artifact", lambda: self._keep_artifact(name, kind, paths))

    def _keep_artifact(self, name: str, kind: str, paths: Sequence[Path]) -> None:
        import wandb

        # W&B knows no other signs in a name
        artifact = wandb.Artifact(re.sub(r"[^\w.-]+", "_", name), kind)
        for path in paths:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def summary(self, figures: Mapping[str, object]) -> None:
        """The run's final figures."""
        if self._run is not None:
            self._try("write the summary", lambda: self._run.summary.update(dict(figures)))

    def _start(self) -> object:
        if os.environ.get("WANDB_MODE") == "disabled":
            return None
        # W&B would keep both below the user's home
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            if name not in os.environ:
                os.environ[name] = str(self.place / "wandb")
                self._variables.append(name)
        # may be missing, which `_try` says
        import wandb

        offline = self.mode == "wandb_offline" or os.environ.get("WANDB_MODE") == "offline"
        if not offline:
            url = wandb.Settings().base_url
            if not _reachable(url):
                self._warn(
                    f"{url} cannot be reached; the run is kept offline"
                    " (wandb sync uploads it later)"
                )
                offline = True
        settings = wandb.Settings(
            init_timeout=15, finish_timeout=60, silent=True, x_transaction_log_flush_interval=1.0
        )
        return wandb.init(
            dir=str(self.place),
            mode="offline" if offline else "online",
            settings=settings,
            reinit="finish_previous",  # a grid makes several runs in one process
            **self._init,
        )

    def _try(self, what: str, action: Callable[[], object]) -> object | None:
        """Run a W&B action; on an error, warn once and go on without W&B."""
        try:
            return action()
        except Exception as error:  # whatever the mirror does, the run goes on
            first_line = str(error).partition("\n")[0]
            self._warn(f"could not {what} ({type(error).__name__}: {first_line})")
            self._run = None
            return None

    def _warn(self, message: str) -> None:
        warnings.warn(f"Weights & Biases: {message}", RuntimeWarning, stacklevel=3)
