"""Results that count: whole files (`store.results`) of this code's defaults, data and versions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.identity.places import MIGRATION, announce_ignored, describe_owner
from experiments.identity.whole import identity_digest, version_faults, whole_identity
from experiments.store import folders, results
from experiments.store.results import ResultError, table_label
from models.weights.checkpoints import CheckpointError


def state_identity(whole: Mapping[str, Any]) -> dict[str, str]:
    """What a result says of its whole identity, in its provenance."""
    return {"identity_digest": identity_digest(whole), "device_class": whole["device"]}


def stored_result(
    folder: Path, whole: Mapping[str, Any], contents: bool = False
) -> dict[str, Any] | None:
    """The result in the folder of a run, if there is one of this whole identity, and the files
    beside it are whole.

    A result that does not count is named on stderr, and so is a file that is not whole.

    Args:
        contents: compare the digests of the files, too: they are needed, not the figures alone.
    """
    path = folder / results.RESULT
    if not path.is_file():
        return None
    try:
        result = results.read_result(path)
    except ResultError as error:
        announce_ignored(str(error))
        return None
    if result["provenance"].get("identity_digest") != identity_digest(whole):
        announce_ignored(f"{path}: is of another run ({describe_owner(folder, whole)})")
        return None
    damage = folders.find_damage(folder, result.get("files", {}), contents)
    if damage:
        announce_ignored(f"{damage}; the run is made anew")
        return None
    return result


def find_identity_fault(result: Mapping[str, Any]) -> str:
    """Why this code, its defaults and its data would give other numbers; "" if they would not.

    A result is asked for on the class of devices that it names: those of a GPU count on a machine
    that has none.
    """
    origin = result["provenance"]
    departures = origin["identity"]
    if "identity_digest" not in origin:
        return f"does not state its whole identity; `{MIGRATION}` gives it one"
    try:
        faults = version_faults(departures)
        if faults:
            return "; ".join(faults)
        # its own class of devices, not this machine's
        whole = whole_identity(departures, origin["device_class"])
    except (CheckpointError, KeyError) as error:
        return f"its identity cannot be made whole ({error})"
    if identity_digest(whole) != origin["identity_digest"]:
        judges = "held-out tokens, reference statistics or extractor"
        return f"is of other defaults, or of other {judges}"
    return ""


def read_counting(path: Path) -> dict[str, Any]:
    """The result in the folder of a run.

    Raises:
        ResultError: it does not count.
    """
    result = results.read_result(path)
    fault = find_identity_fault(result)
    if fault:
        raise ResultError(f"{path}: {fault}")
    return result


def committed_results(name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The committed results filed under a name, model by model.

    Beside them a line for every result that is damaged, does not count or is of another table.
    """
    counting = []
    ignored = []
    for path in sorted((results.ROOT / name).glob(f"*{results.COMMITTED}")):
        whole, fault = results.read_committed(path)
        if fault:
            ignored.append(fault)
        for result in whole:
            fault = _table_fault(result, name) or find_identity_fault(result)
            if fault:
                ignored.append(f"{path}: the result of run {result['provenance']['hash']} {fault}")
            else:
                counting.append(result)
    return counting, ignored


def _table_fault(result: Mapping[str, Any], name: str) -> str:
    """Of which other table a result is; "" if it is of the one called `name`."""
    table = result.get("table", {})
    label = table_label(table.get("name", name), table.get("scale", "twin"))
    return "" if label == name else f"is of {label}"
