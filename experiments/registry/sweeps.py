"""Sweep files for W&B agents, `conf/sweep/<table>.yaml`: the grid of a table, one cell (or a few)
per agent call.

    python -m experiments.registry.sweeps            # write them from the registry
    wandb sweep conf/sweep/components.yaml  # then, on every machine: wandb agent ...

W&B can only multiply lists, and rows are several overrides each; so an agent calls
`experiments.table`, which knows the rows, with a row and a value of every axis. Calls whose cell
the table leaves out, and full precision at a second value of the grid, find nothing to do. Sweeps
need W&B's server; `experiments.table` runs the same cells without.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from experiments.config.compose import CONF
from experiments.registry.tables import Table, tables

FOLDER = CONF / "sweep"
SEEDS = (0, 1, 2)


def sweep(table: Table) -> dict[str, Any]:
    """The sweep of a table at scale=twin."""
    axes = {"model": table.models["twin"], **table.grid, "row": list(table.rows)}
    seeds = [f"[{s}]" for s in SEEDS[: table.seeds]]
    return {
        "project": "ar-ptq",
        "name": table.name,
        "description": table.title,
        "method": "grid",
        "command": [
            "${env}",
            "python",
            "-m",
            "experiments.table",
            f"name={table.name}",
            "eval=full",
            "tracker=wandb",
            "${args_no_hyphens}",
        ],
        "parameters": {
            name: {"values": list(values)} for name, values in {**axes, "seeds": seeds}.items()
        },
    }


def calls(found: Mapping[str, Any]) -> Iterator[list[str]]:
    """Arguments of `experiments.table` that an agent gives, call by call."""
    given = [part for part in found["command"] if "=" in part and "$" not in part]
    values = {name: parameter["values"] for name, parameter in found["parameters"].items()}
    for chosen in itertools.product(*values.values()):
        yield [*given, *(f"{name}={value}" for name, value in zip(values, chosen))]


def swept() -> dict[str, Table]:
    """The tables that have a sweep: those of runs."""
    return {name: table for name, table in tables().items() if table.what == "run"}


def text(table: Table) -> str:
    """The contents of a table's sweep file."""
    head = f"# wandb sweep conf/sweep/{table.name}.yaml   (written by python -m experiments.registry.sweeps)\n"
    return head + yaml.safe_dump(sweep(table), sort_keys=False, width=120)


def place(name: str) -> Path:
    return FOLDER / f"{name}.yaml"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, table in swept().items():
        place(name).write_text(text(table))


if __name__ == "__main__":
    main()
