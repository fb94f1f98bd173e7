"""A table on a real Slurm: two tasks share the cells, one is killed hard, and the table comes out
as without Slurm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments.cells import ROOT, TINY
from tests.experiments.table.slurm import asked, cluster, lacking, until

TABLE = (sys.executable, "-m", "experiments.table", "name=reproduce", *TINY)


@pytest.mark.slurm
@pytest.mark.skipif(bool(lacking()), reason=lacking())
def test_a_task_killed_in_the_middle_leaves_the_table_finished(
    tmp_path: Path,
) -> None:
    runs = tmp_path / "slurm-runs"
    with cluster(tmp_path / "cluster") as environment:
        options = (
            "engine=slurm",
            "engine.partition=cpu",
            "engine.jobs=2",
            "engine.gpus=0",
            "engine.threads=1",
        )
        with (tmp_path / "log").open("w") as log:
            table = subprocess.Popen(
                [*TABLE, f"runs={runs}", *options],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )
        try:
            until(lambda: list(runs.glob("*/metrics.json")), "no cell was finished", 240)
            tasks = asked(environment, "squeue", "-h", "-r", "-t", "RUNNING", "-o", "%i").split()
            assert len(tasks) == 2
            assert table.poll() is None
            asked(environment, "scancel", "--signal=KILL", "--full", tasks[0])
            until(
                lambda: tasks[0] not in asked(environment, "squeue", "-h", "-r", "-o", "%i"),
                "it lives on",
            )
            assert table.wait(timeout=480) == 0, (tmp_path / "log").read_text()
        finally:
            table.kill()
            table.wait()
    alone = subprocess.run(
        [*TABLE, f"runs={tmp_path / 'runs'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    tables = [folder / "tables" / "reproduce" / "table.csv" for folder in (runs, tmp_path / "runs")]
    assert tables[0].read_bytes() == tables[1].read_bytes()
