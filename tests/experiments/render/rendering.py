"""Made-up results of tables of the registry, as `experiments.table` publishes them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from experiments.registry import tables
from experiments.registry.tables import Cell, Table
from experiments.render.text import TextTable
from experiments.store.results import RESULT_VERSION, write_committed
from experiments.table.publish import copies_by_model
from tests.experiments.identity.identities import made_origin

SIZES = {None: 20e6, "w8a8": 6e6, "w6a6": 5e6, "w4a8": 4e6}


def result(
    table: Table, cell: Cell, version: int = RESULT_VERSION, scale: str = "twin"
) -> dict[str, Any]:
    """A result of a run; its figures depend on row, point and seed, and so does its hash."""
    point = dict(cell.point)
    draw = random.Random(f"{cell.row} {point} {cell.seed}")
    quant = point.get("quant")
    kl = None if quant is None else draw.uniform(0.01, 1)
    fid = draw.uniform(0.1, 2)
    return {
        "schema": 1,
        "seed": cell.seed,
        "cell": {
            "model": point["model"],
            "method": cell.row,
            "quant": quant,
            "calib": quant and "dgc",
            "scope": quant and "paper",
        },
        "metrics": {
            "kl": kl,
            "nll": 3 + (kl or 0),
            "fid": fid,
            "is": 8.0,
            "fid2fp": kl,
            "psnr": None,
        },
        "cost": {
            "calibration_s": None if quant is None else draw.uniform(1, 2),
            "sampling_s": draw.random(),
            "model_bytes": int(SIZES[quant]),
        },
        "provenance": {
            **made_origin(version=version, row=cell.row, point=point, seed=cell.seed),
            "images": 2000,
            "sequences": 50,
            "versions": {"device": "a device", "torch": "2.0"},
        },
        "table": {"name": table.name, "scale": scale, "row": cell.row, "point": point},
    }


def results_of(name: str, seeds: int = 2, scale: str = "twin") -> list[dict[str, Any]]:
    """All results of a table."""
    table = tables.find_table(name)
    cells = tables.table_cells(table, scale, range(seeds))
    return [result(table, cell, scale=scale) for cell in cells]


def rows_of(table: TextTable) -> list[list[str]]:
    """The cells of a table, row by row."""
    return table.cells.to_numpy().tolist()


def commit(root: Path, name: str, found: list[dict[str, Any]]) -> list[Path]:
    """Write results as the committed ones of a table below `root`; the paths of their files."""
    paths = []
    for model, copies in copies_by_model(found).items():
        paths.append(root / name / f"{model}.jsonl")
        write_committed(paths[-1], copies)
    return paths


def sample(runs: Path, found: list[dict[str, Any]]) -> None:
    """Noise in place of the samples of runs."""
    grey = np.random.default_rng(0).integers(0, 255, (30, 32, 32, 1), dtype=np.uint8)
    noise = grey.repeat(3, axis=-1)  # as the twins' samples are
    for r in found:
        folder = runs / f"x-{r['provenance']['hash']}"
        folder.mkdir(parents=True)
        np.savez(folder / "samples.npz", arr_0=noise)
