"""Put new results of a table in the place of the committed ones (`experiments/results`)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.identity.results import committed_results
from experiments.store import results
from experiments.store.files import without_keys
from ptq.spec import ConfigError

SIZES = ("images", "sequences")  # of a result, by its provenance


def publish_results(table_results: list[dict[str, Any]], name: str, part: bool = False) -> Path:
    """Commit these results of the table called `name` in the place of the former ones.

    Args:
        part: they are of some cells alone; what is committed of the other cells stays.

    Raises:
        ConfigError: there would be fewer than before, or of fewer images or sequences; the results
            stay where the runs are.
    """
    folder = results.ROOT / name
    restore_interrupted(folder)  # before what is committed is read
    committed = committed_results(name)[0]
    former = len(committed)
    if part:
        renewed = {cell_of(result) for result in table_results}
        others = [result for result in committed if cell_of(result) not in renewed]
        table_results = [*others, *table_results]
    if len(table_results) < former:
        raise ConfigError(
            f"publish: {len(table_results)} results of {name} would replace {former}, "
            "allowed are no fewer"
        )
    require_sizes(table_results, committed, name)
    # whole under another name first: one that is killed meanwhile changes nothing
    temporary = results.ROOT / f".{name}.tmp{os.getpid()}"
    for model, copies in copies_by_model(table_results).items():
        results.write_committed(temporary / f"{model}{results.COMMITTED}", copies)
    replace_folder(folder, temporary)
    return folder


def require_sizes(
    table_results: Sequence[dict[str, Any]], committed: Sequence[dict[str, Any]], name: str
) -> None:
    """Refuse results that say less than those of the same cells: a trial at `eval=tiny`, say.

    Raises:
        ConfigError: one is of fewer images or sequences.
    """
    former: dict[tuple[str, str, int], dict[str, Any]] = {}
    for result in committed:
        former[cell_of(result)] = result["provenance"]
    for result in table_results:
        replaced = former.get(cell_of(result), {})
        for size in SIZES:
            count = result["provenance"].get(size) or 0  # null of analyses
            least = replaced.get(size) or 0
            if count < least:
                raise ConfigError(
                    f"publish: a result of {count} {size} would replace one of {least} in {name}, "
                    "allowed are no fewer"
                )


def cell_of(result: dict[str, Any]) -> tuple[str, str, int]:
    """Which cell of its table a result is of: row, values of model and grid, seed."""
    place = result["table"]
    # the point as text: a mapping has no hash
    return place["row"], json.dumps(place["point"], sort_keys=True), result["seed"]


def restore_interrupted(folder: Path) -> None:
    """Bring back what a publication set aside that was killed between its two renames."""
    for aside in folder.parent.glob(f".{folder.name}.old*"):
        if not folder.exists():  # else both renames were done
            os.replace(aside, folder)


def replace_folder(folder: Path, replacement: Path) -> None:
    """Put a folder in the place of another one, which is removed."""
    aside = folder.with_name(f".{folder.name}.old{os.getpid()}")
    # two renames, since none replaces a folder with files in it
    if folder.exists():
        os.replace(folder, aside)
    os.replace(replacement, folder)
    shutil.rmtree(aside, ignore_errors=True)


def copies_by_model(table_results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Copies of results by their model, in an order that does not depend on who was first."""
    copies: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(table_results, key=cell_of):
        copies.setdefault(result["cell"]["model"], []).append(as_copy(result))
    return copies


def as_copy(result: dict[str, Any]) -> dict[str, Any]:
    """The result without its config and files; `identity`, which decides the numbers, stays."""
    provenance = without_keys(result["provenance"], "config")
    return {**without_keys(result, "files"), "provenance": provenance}
