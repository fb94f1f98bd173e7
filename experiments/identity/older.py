"""What was written before there were whole identities, and how it gets one (`identity.migrate`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.config.schema import run_schema, typed_value
from experiments.identity.departures import add_versions, describe_run
from experiments.identity.places import BEGUN, IDENTITY, save_identity
from experiments.identity.resolved import QUANTIZATION, resolved_values
from experiments.identity.results import state_identity
from experiments.identity.whole import (
    describe_differences,
    version_faults,
    whole_identity,
)
from experiments.store import files
from experiments.store.results import RESULT
from models import registry
from models.weights.checkpoints import CheckpointError
from ptq.files import DIGEST, read_json, seal_fault, value_digest
from ptq.int8.exports import export_files
from ptq.types import ConfigError

UNKNOWN_DEVICE = "unknown"  # of killed runs: none of them is continued


class Unmigrated(ValueError):
    """Something cannot be given a whole identity. The message says why, in one line."""


@dataclass
class Report:
    """What a migration has done.

    Attributes:
        done: how many of each kind were given an identity.
        lacks: what is not known of them, and of how many.
        refused: a line for everything that was not given one.
    """

    done: Counter[str] = field(default_factory=Counter)
    lacks: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The report in words."""
        for kind, count in self.done.items():
            yield f"{kind}: {count} given their whole identity"
        for lack, count in self.lacks.items():
            yield f"not known of {count}: {lack}"
        for refusal in self.refused:
            yield f"left as it is: {refusal}"
        if not self.done and not self.refused:
            yield "nothing to do"


def migrate_folders(folders: Sequence[str]) -> Iterator[str]:
    """Migrate everything below some folders; lines that say what was done."""
    report = Report()
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.json")):
            migrate_file(path, report)
        # after the files: a finished run has its identity by now
        for config in sorted(Path(folder).rglob("config.yaml")):
            migrate_killed_run(config.parent, report)
    yield from report.lines()


def migrate_file(path: Path, report: Report) -> None:
    """Give what a JSON file holds its whole identity, if it is of a kind that has one."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return  # a damaged file is named where it is read
    kind, migrate = recognize(path, value)
    if migrate is None:
        return
    try:
        require_undamaged(value)
        lacks = migrate(path, value)
    except (Unmigrated, CheckpointError, ConfigError, KeyError) as error:
        report.refused.append(f"{path}: {error}")
        return
    report.done[kind] += 1
    report.lacks.update(lacks)


def require_undamaged(value: Any) -> None:
    """Refuse what is not what its digest says."""
    if isinstance(value, dict) and value.get("format") != export_files.FORMAT:
        fault = seal_fault(value)
        if fault:
            raise Unmigrated(f"it is damaged ({fault})")


Migrate = Callable[[Path, Any], list[str]]


def recognize(path: Path, value: Any) -> tuple[str, Migrate | None]:
    """What a file is, and what migrates it; None for what needs no migration."""
    match value:
        case {"provenance": {"identity_digest": _}} | {"identity_digest": _}:
            return "", None
        case {"provenance": {"hash": _, "identity": {}}, "metrics": _} if is_of_run(path):
            return "results", migrate_result
        case {"run": _, "identity": {}, "microbatch": _}:
            return "samples", migrate_manifest
        case {"format": export_files.FORMAT, "about": {"run": _, "config": _}}:
            if "identity_digest" in value["about"]:
                return "", None
            return "exports", migrate_export
        case [*_] if path.name == "results.json":
            pending = [entry for entry in value if recognize(path, entry)[1] is migrate_result]
            return "tables", migrate_table if pending else None
    return "", None


def is_of_run(path: Path) -> bool:
    """Whether a result is read where it lies: in the folder of its run, or in a table's list."""
    return path.name in (RESULT, "results.json")


def migrate_result(path: Path, result: dict[str, Any]) -> list[str]:
    """Migrate the file of a result; returns what it lacks."""
    migrated, lacks = migrated_result(result)
    write_again(path, migrated)
    origin = migrated["provenance"]
    save_identity(path.parent, whole_identity(origin["identity"], origin["device_class"]))
    return lacks


def migrated_result(result: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A result with its whole identity, and what it lacks."""
    origin = result["provenance"]
    departures = origin["identity"]
    if value_digest(departures) != origin["hash"]:
        raise Unmigrated("its hash is not that of its identity")
    require_same_settings(departures, origin.get("config"))
    device = device_class(origin)
    whole = make_whole(departures, device)
    provenance = {}
    for key, value in origin.items():
        provenance[key] = value
        if key == "identity":
            provenance |= state_identity(whole)
    return {**result, "provenance": provenance}, list(missing_facts(origin))


def migrate_table(path: Path, entries: list[dict[str, Any]]) -> list[str]:
    """Migrate the results of a table that ran here; failed cells stay as they are."""
    migrated = []
    lacks: list[str] = []
    for entry in entries:
        if recognize(path, entry)[1] is migrate_result:
            entry, entry_lacks = migrated_result(entry)
            lacks += entry_lacks
        migrated.append(entry)
    files.write_json(path, migrated)
    return lacks


def migrate_manifest(path: Path, manifest: dict[str, Any]) -> list[str]:
    """Migrate what is said of a folder of samples; returns what it lacks."""
    departures = manifest["identity"]
    if value_digest(departures) != manifest["run"]:
        raise Unmigrated("its hash is not that of its identity")
    origin = manifest["provenance"]
    require_same_settings(departures, origin.get("config"))
    # of the machine that sampled last
    whole = make_whole(departures, device_class({"versions": origin["versions"][-1]}))
    write_again(path, {**manifest, "whole": whole, **state_identity(whole)})
    return list(missing_facts(origin))


def migrate_export(path: Path, plain: dict[str, Any]) -> list[str]:
    """Migrate the description of an export; returns what it lacks."""
    about = plain["about"]
    departures = departures_of_config(about["config"], about["weights"])
    if value_digest(departures) != about["run"]:
        raise Unmigrated(f"its config is not that of the run {about['run']}")
    whole = make_whole(departures, device_class(about))
    export_files.replace_about(path, {**about, **state_identity(whole)})
    return list(missing_facts(about))


def migrate_killed_run(folder: Path, report: Report) -> None:
    """Give what a killed run left its identity: on an unknown device, so that none continues it."""
    begun = any((folder / name).exists() for name in BEGUN)
    if not begun or (folder / IDENTITY).is_file() or (folder / RESULT).is_file():
        return
    try:
        plain = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        weights = registry.weights_digests(
            plain["model"]["name"], plain["model"]["weights"], plain["model"]["tokenizer_weights"]
        )
        departures = departures_of_config(plain, weights["transformer"] + weights["tokenizer"])
        save_identity(folder, make_whole(departures, UNKNOWN_DEVICE))
    except (Unmigrated, CheckpointError, ConfigError, OSError, KeyError) as error:
        report.refused.append(f"{folder}: {error}")
        return
    report.done["killed runs"] += 1
    report.lacks["device and quantized model of a killed run, so it begins anew beside it"] += 1


def write_again(path: Path, value: Mapping[str, Any]) -> None:
    """Write a changed object, with a digest of its content if it had one."""
    write = files.write_sealed if DIGEST in value else files.write_json
    write(path, value)


def make_whole(departures: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The whole identity, of parts that have not changed since."""
    faults = version_faults(departures)
    if faults:
        raise Unmigrated("; ".join(faults))
    return whole_identity(departures, device)


def departures_of_config(plain: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """The departures of a run of which the config is kept."""
    try:
        config = typed_value(run_schema(), plain)
    except (KeyError, TypeError) as error:
        raise Unmigrated(f"its config is of another schema ({error!r})") from error
    preset = registry.find_preset(config.model.name)
    settings = {**preset.samplers[config.sampler.name], **config.sampler.settings}
    return add_versions(describe_run(config, weights, settings))


def require_same_settings(departures: Mapping[str, Any], config: Mapping[str, Any] | None) -> None:
    """Refuse what was made under other defaults than this code's, where its config is kept."""
    resolved = resolved_values(departures)
    for group in QUANTIZATION:
        if config is None or not isinstance(resolved.get(group), dict):
            continue
        # what both name: of its config those that something reads, of ours those that it knew
        known = restricted(config[group], resolved[group])
        settings = restricted(resolved[group], known)
        differences = list(describe_differences(known, settings))
        if differences:
            raise Unmigrated(f"{group}.{differences[0]}")


def restricted(settings: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The settings whose names another mapping has."""
    kept = {}
    for key, value in settings.items():
        if key in known:
            kept[key] = restricted(value, known[key]) if isinstance(value, dict) else value
    return kept


def device_class(origin: Mapping[str, Any]) -> str:
    """The class of the device that a result names in words."""
    name = (origin.get("versions") or {}).get("device")
    if not name:
        raise Unmigrated("the device that it was made on is not known")
    return "cpu" if "CPU" in name else "cuda"


def missing_facts(origin: Mapping[str, Any]) -> Iterator[str]:
    """What is not known of a result."""
    revision = origin.get("revision")
    if not revision:
        yield "the code's revision"
    elif revision.endswith("+"):
        yield "the code: its tree had uncommitted changes"
