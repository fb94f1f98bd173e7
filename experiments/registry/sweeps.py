"""Sweep files for W&B agents, `conf/sweep/<table>.yaml`: the grid of a table, cell by cell.

    python -m experiments.registry.sweeps            # write them from the registry
    wandb sweep conf/sweep/components.yaml  # then, on every machine: wandb agent ...

W&B can only multiply lists, and rows are several overrides each; so an agent calls
`experiments.table`, which knows the rows, with a row and a value of every axis. Calls whose cell
the table leaves out, and full precision at a second value of the grid, find nothing to do. Sweeps
need W&B's server; `experiments.table` runs the same cells without.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from experiments.options import answer_help, refuse_unknown
from experiments.registry.tables import Table, load_tables
from experiments.store.files import write_text
from ptq.config.files import CONF
from ptq.errors import user_errors

FOLDER = CONF / "sweep"
SEEDS = (0, 1, 2)


def sweep_config(table: Table) -> dict[str, Any]:
    """The sweep of a table at scale=twin."""
    axes = {
        "model": table.models["twin"],
        **table.grid,
        "row": list(table.rows),
        # a list of one: a call computes one seed
        "seeds": [f"[{seed}]" for seed in SEEDS[: table.seeds]],
    }
    parameters = {}
    for name, values in axes.items():
        parameters[name] = {"values": list(values)}
    command = [  # what stands in ${} is filled in by the agent
        "${env}",
        "python",
        "-m",
        "experiments.table",
        f"name={table.name}",
        "eval=full",
        "tracker=wandb",
        "${args_no_hyphens}",
    ]
    return {
        "project": "ar-ptq",
        "name": table.name,
        "description": table.title,
        "method": "grid",
        "command": command,
        "parameters": parameters,
    }


def swept_tables() -> dict[str, Table]:
    """The tables that have a sweep: those of runs."""
    return {name: table for name, table in load_tables().items() if table.what == "run"}


def sweep_text(table: Table) -> str:
    """The contents of a table's sweep file."""
    origin = "(written by python -m experiments.registry.sweeps)"
    head = f"# wandb sweep conf/sweep/{table.name}.yaml   {origin}\n"
    return head + yaml.safe_dump(sweep_config(table), sort_keys=False, width=120)


def sweep_path(name: str) -> Path:
    """The sweep file of a table."""
    return FOLDER / f"{name}.yaml"


def write_sweeps() -> None:
    """Write all sweep files."""
    for name, table in swept_tables().items():
        write_text(sweep_path(name), sweep_text(table))


def main() -> None:
    with user_errors():
        answer_help(__doc__, {})
        refuse_unknown(sys.argv[1:], [])
        write_sweeps()


if __name__ == "__main__":
    main()
