"""How two folders of results compare: reading them, figure by figure, and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.identity.whole import describe_differences
from experiments.registry.labels import count_noun
from experiments.render.formats import format_csv
from experiments.render.numbers import deviation_over_seeds, mean_over_seeds
from experiments.store import results
from experiments.store.files import require_writable, without_keys, write_text
from experiments.table.compare.agreement import AGREES, DIFFERS
from experiments.table.compare.measured import (
    Measured,
    compare_metric,
    group_seeds,
    pair_cells,
)
from ptq.errors import say
from ptq.files import read_json
from ptq.spec import ConfigError

COLUMNS = (
    "model",
    "bits",
    "method",
    "metric",
    "A",
    "A std",
    "A seeds",
    "B",
    "B std",
    "B seeds",
    "difference",
    "allowed",
    "verdict",
)
OTHER_SIZES = "other sizes"
ONLY = "only in "
COUNTED = (AGREES, OTHER_SIZES)  # verdicts on figures that are not listed
SIDES = ("A", "B")
IN_SIDES = ("in A", "in B")


def compare_folders(folders: Sequence[str], csv: str | None, show_all: bool) -> bool:
    """Print how two folders compare; says whether they agree.

    Args:
        csv: a file for all figures. show_all: print all of them.

    Raises:
        ConfigError: one is no folder of results, or the file cannot be written.
    """
    if csv is not None:
        require_writable(Path(csv), "csv")
    sides: list[list[Measured]] = []
    for folder in folders:
        sides.append(group_seeds(read_folder(Path(folder))))
    pairs, only_a, only_b = pair_cells(*sides)
    frame = compare_cells(pairs, only_a, only_b)
    if csv is not None:
        write_text(Path(csv), format_csv(frame))
    for side, folder, cells in zip(SIDES, folders, sides):
        print(f"{side}: {folder}, {count_noun(len(cells), 'cell')}")
    for line in describe_conditions(pairs):
        print(line)
    figures = frame[frame["metric"].notna()]
    shown = figures if show_all else figures[~figures["verdict"].isin(COUNTED)]
    if not shown.empty:
        print(f"\n{shown.to_string(index=False, na_rep='', float_format='{:.4g}'.format)}\n")
    for side, cells in zip(SIDES, (only_a, only_b)):
        for line in describe_alone(cells):
            print(f"{ONLY}{side}: {line}")
    print(summarize(frame))
    return not found_difference(frame)


# --- reading


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder that are whole; the others are named.

    Raises:
        ConfigError: there are none.
    """
    if not folder.is_dir():
        raise ConfigError(f"folders: {folder} is not a folder")
    found: list[dict[str, Any]] = []
    for result, fault in read_any(folder):
        if fault:
            say(f"ignored: {fault}")
        elif result["cell"].get("what") != "speed":  # times are of a machine
            found.append(result)
    if not found:
        raise ConfigError(
            f"folders: {folder} holds no results, expected one of runs, a table of runs/tables, or "
            "committed ones"
        )
    return found


def read_any(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every result in a folder, or why it is none."""
    pattern = f"*{results.COMMITTED}"
    for path in sorted([*folder.glob(pattern), *folder.glob(f"*/{pattern}")]):
        # a run's log has such a name, too
        if (path.parent / "config.yaml").is_file():
            continue
        whole, fault = results.read_committed(path)
        for result in whole:
            yield result, ""
        if fault:
            yield {}, fault
    runs = [*folder.glob(results.RESULT), *folder.glob(f"*/{results.RESULT}")]
    for path in sorted(runs):
        try:
            yield results.read_result(path), ""
        except results.ResultError as error:
            yield {}, str(error)
    if not runs:
        tables = [*folder.glob("results.json"), *folder.glob("*/results.json")]
        for path in sorted(tables):
            yield from read_table(path)


def read_table(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every result of a table that ran here, or why it is none."""
    try:
        entries = read_json(path)
    except (OSError, ValueError) as error:
        yield {}, f"{path}: cannot be read ({error})"
        return
    for entry in entries if isinstance(entries, list) else [entries]:
        is_failed = isinstance(entry, dict) and "error" in entry
        fault = entry["error"] if is_failed else results.find_fault(entry)
        yield (entry, f"{path}: {fault}" if fault else "")


# --- comparing


def compare_cells(
    pairs: Sequence[tuple[Measured, Measured]],
    only_a: Sequence[Measured],
    only_b: Sequence[Measured],
) -> pd.DataFrame:
    """One row per figure that both have, and one per cell that one has alone (`COLUMNS`)."""
    records = []
    for ours, theirs in pairs:
        names = dict.fromkeys([*ours.metrics, *theirs.metrics])
        for metric in names:
            record = compare_figure(ours, theirs, metric)
            if record is not None:
                records.append(record)
    for side, cells in zip(SIDES, (only_a, only_b)):
        for cell in cells:
            records.append({**place_of(cell), "verdict": f"{ONLY}{side}"})
    return pd.DataFrame(records, columns=list(COLUMNS))


def compare_figure(ours: Measured, theirs: Measured, metric: str) -> dict[str, Any] | None:
    """The row of a metric; None where neither side has it, or one has too few images for it."""
    one = ours.values(metric)
    other = theirs.values(metric)
    if not one and not other:
        return None
    record = {**place_of(ours), "metric": metric}
    for side, values in zip(SIDES, (one, other)):
        record |= figures_of(side, values)
    if ours.size(metric) != theirs.size(metric):
        return {**record, "verdict": OTHER_SIZES}
    for side, values in zip(SIDES, (other, one)):
        if not values:
            return {**record, "verdict": f"{ONLY}{side}"}
    agreement = compare_metric(ours, theirs, metric)
    record["difference"] = agreement.difference
    record["allowed"] = agreement.allowed
    return {**record, "verdict": agreement.verdict}


def place_of(cell: Measured) -> dict[str, Any]:
    """The columns that say of which cell a row is."""
    return {"model": cell.model, "bits": cell.bits, "method": cell.label}


def figures_of(side: str, values: Sequence[float]) -> dict[str, Any]:
    """The columns of one side: mean, deviation, seeds."""
    mean = mean_over_seeds(values) if values else None
    deviation = deviation_over_seeds(values) if values else None
    return {side: mean, f"{side} std": deviation, f"{side} seeds": len(values)}


# --- saying


def describe_conditions(pairs: Sequence[tuple[Measured, Measured]]) -> Iterator[str]:
    """In what the results of compared cells differ besides their figures, and in how many."""
    counts: Counter[str] = Counter()
    for ours, theirs in pairs:
        counts.update(describe_differences(conditions_of(ours), conditions_of(theirs), IN_SIDES))
    for difference, count in counts.items():
        among = count_noun(len(pairs), "cell")
        cells = "all cells" if count == len(pairs) else f"{count} of {among}"
        yield f"{cells}: {difference}"


def conditions_of(cell: Measured) -> dict[str, Any]:
    """What results of a cell are of, besides what was asked: departures, device, code."""
    origin = cell.origin
    departures = without_keys(origin["identity"], "seed")
    if isinstance(departures.get("calib"), dict):
        departures["calib"] = cell.question["calib"]
    return {
        **departures,
        "device": origin.get("versions", {}).get("device"),
        "torch": origin.get("versions", {}).get("torch"),
        "revision": origin.get("revision"),
    }


def describe_alone(cells: Sequence[Measured]) -> Iterator[str]:
    """Cells that one side has alone, a line for each model and bit width."""
    by_model: dict[str, list[str]] = {}
    for cell in cells:
        by_model.setdefault(f"{cell.model} {cell.bits}", []).append(cell.label)
    for name, labels in by_model.items():
        yield f"{name}: {', '.join(labels)}"


def summarize(frame: pd.DataFrame) -> str:
    """How many figures agree, and what became of the others."""
    is_cell = frame["metric"].isna()
    counts = frame.loc[~is_cell, "verdict"].value_counts()  # the most frequent first
    words = []
    for verdict, count in counts.items():
        words.append(f"{count} {verdict}")
    if is_cell.any():
        words.append(f"{count_noun(is_cell.sum(), 'cell')} in one folder alone")
    return f"figures: {', '.join(words) or 'none'}"


def found_difference(frame: pd.DataFrame) -> bool:
    """Whether a figure differs beyond the spread, or a cell or a figure stands in one alone."""
    verdicts = frame["verdict"]
    return bool((verdicts == DIFFERS).any() or verdicts.str.startswith(ONLY).any())
