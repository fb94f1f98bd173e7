"""One job of a table: compose the config of a cell, run what measures it, and say what came of it,
whatever it was.

A job is a plain value, so that it can be written to a file and done by any process (`engine.py`).
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.config.compose import configure


@dataclass(frozen=True)
class Job:
    """A cell to be run.

    Attributes:
        what: as in the registry, with `options`. overrides: of Hydra. paper: how released models
            are sampled and judged (`at_scale.Judging`), None for twins.
    """

    what: str
    overrides: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, Any] | None = None

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**{**values, "overrides": tuple(values["overrides"])})


def run(job: Job, wait: bool = True, show: bool = False) -> dict[str, Any] | None:
    """The result of a job, or what went wrong with it: {"error", "traceback"}; None if another
    process is at it.

    `wait` for that process, or else give None. `show` progress bars. GPU memory is given back, for
    the other workers.
    """
    from experiments.config.compose import USER_ERRORS
    from experiments.run.peak_memory import release_cuda

    # torch is slow to import, and who only lists cells needs none of it
    from experiments.store.locks import Busy

    try:
        return dict(result(job, wait, show))
    except Busy:
        return None
    except Exception as error:  # a failed cell is a result too: it is shown as failed
        said = [] if isinstance(error, USER_ERRORS) else [type(error).__name__]
        said += str(error).strip().splitlines()[:1]
        return {"error": ": ".join(said), "traceback": traceback.format_exc()}
    finally:
        release_cuda()


def result(job: Job, wait: bool, show: bool) -> Mapping[str, Any]:
    """The result of a job.

    Raises:
        Busy: another process is at it and we are not to `wait`. Whatever is wrong with the job.
    """
    from experiments.analyses import measurement
    from experiments.run import cell
    from experiments.speed.result import speed_result
    from experiments.store.progress import progress_bar
    from experiments.table import paper_scale

    if job.what == "speed":
        return speed_result(job.overrides, wait)
    config = configure(list(job.overrides))
    track = progress_bar if show else lambda it, what: it
    if job.what != "run":
        return measurement.run(job.what, config, job.options, track, wait)
    if job.paper is not None:
        return paper_scale.run(config, job.overrides, paper_scale.Judging(**job.paper), wait)
    return cell.run_cell(config, track, wait)


def folder_of(runs: str) -> Path:
    """Where tables keep what they make, below the folder of runs."""
    return Path(runs) / "tables"
