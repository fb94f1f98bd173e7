"""One job of a table: compose a cell's config, run what measures it, and say what came of it.

A job is a plain value, so that it can be written to a file and done by any process.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.config.compose import configure
from experiments.store.progress import SILENT, ProgressDisplay
from ptq.errors import error_line
from ptq.files import parse_json

Outcome = dict[str, Any]  # a result, or {"error", "traceback"}


@dataclass(frozen=True)
class Job:
    """A cell to be computed.

    Attributes:
        what: "run", "speed" or an analysis, as in the registry.
        overrides: of Hydra.
        options: of the analysis.
        paper: how a released model is sampled and judged (`paper_scale.Judging`); None for twins.
    """

    what: str
    overrides: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, Any] | None = None

    def text(self) -> str:
        """The job as one line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def parse(cls, text: str) -> Job:
        """The job that `text()` wrote."""
        values = parse_json(text)
        values["overrides"] = tuple(values["overrides"])  # JSON made it a list
        return cls(**values)


def run_job(job: Job, wait: bool = True, display: ProgressDisplay = SILENT) -> Outcome | None:
    """Do a job; whatever goes wrong with it is its outcome.

    GPU memory is given back, for the other workers.

    Args:
        wait: for another process that computes the same cell, or else return None.
        display: shows how far it is.
    """
    # imported late: torch is slow to import, and who only lists cells needs none of it
    from experiments.run.peak_memory import release_cuda
    from experiments.store.locks import Busy

    try:
        return dict(measure_cell(job, wait, display))
    except Busy:  # no failure: the worker comes back to it
        return None
    except Exception as error:  # a failed cell is an outcome too: it is shown as failed
        return {"error": error_line(error), "traceback": traceback.format_exc()}
    finally:
        release_cuda()


def measure_cell(job: Job, wait: bool, display: ProgressDisplay) -> Mapping[str, Any]:
    """The result of a job's cell, by what its table asks for.

    Raises:
        Busy: another process computes it and we are not to `wait`. Whatever is wrong with the job.
    """
    # late, as in `run_job`
    from experiments.analyses import measurement
    from experiments.run import cell
    from experiments.speed.result import speed_result
    from experiments.table import paper_scale

    if job.what == "speed":
        return speed_result(job.overrides, wait)
    config = configure(list(job.overrides))
    if job.what != "run":
        return measurement.run_analysis(job.what, config, job.options, display, wait)
    if job.paper is not None:
        judging = paper_scale.Judging(**job.paper)
        return paper_scale.run_cell(config, job.overrides, judging, wait, display)
    return cell.run_cell(config, display, wait)


def tables_folder(runs: str | Path) -> Path:
    """Where tables keep what they make, below the folder of runs."""
    return Path(runs) / "tables"
