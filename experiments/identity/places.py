"""Folders of runs, and the identity that each keeps in `identity.json`.

    {"identity_digest", "identity": the whole one, "quantization": digest of the quantized model, or
     null, "digest": of this file's content}

A folder is named by departures from the defaults, so two runs may ask for the same one: before and
after a default has changed, or on two classes of devices. The first has it. The other lies beside
it, with the first digits of its whole identity in the name. Nothing is mixed, and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from experiments.identity.whole import identity_digest, summarize_differences
from experiments.store import files, results
from ptq.errors import say
from ptq.files import DamagedFile, read_sealed
from ptq.types import ConfigError

IDENTITY = "identity.json"
MIGRATION = "python -m experiments.identity.migrate"
BEGUN = ("shards", "trained.safetensors", "trials.json")  # what a killed run leaves in its folder
UNKNOWN = "unknown"


def choose_place(folder: Path, whole: Mapping[str, Any]) -> Path:
    """Where a run belongs: in the folder with its name, or beside it if another run has that.

    Raises:
        ConfigError: what lies there does not say what it is of.
    """
    digest = identity_digest(whole)
    stated = stated_digest(folder)
    if stated in (None, digest):
        return folder
    if stated == UNKNOWN:
        raise ConfigError(
            f"runs: {folder} does not state the whole identity of its run; "
            f"`{migration_of(folder.parent)}` gives it one, or remove it"
        )
    # the hash stays last, where results are compared with it
    stem, _, key = folder.name.rpartition("-")
    beside = folder.with_name(f"{stem}.{digest[:8]}-{key}")
    announce_place(folder, beside, describe_owner(folder, whole))
    return beside


def migration_of(folder: Path) -> str:
    """The command that gives what lies below a folder its identity."""
    return f"{MIGRATION} folders={folder}"


@cache
def announce_place(folder: Path, beside: Path, owner: str) -> None:
    """Say, once per process, that a run's folder is another run's."""
    say(f"{folder}: is of another run ({owner}); this one's is {beside.name}")


def stated_digest(folder: Path) -> str | None:
    """Digest of the whole identity of the run in a folder; None in a free one, `UNKNOWN` where
    there is a run that does not say."""
    kept = read_identity(folder)
    if kept is not None:
        return kept["identity_digest"]
    try:
        result = results.read_result(folder / results.RESULT)
    except results.ResultError:
        # a run of before folders kept their identity, killed before it was finished
        begun = any((folder / name).exists() for name in BEGUN)
        return UNKNOWN if begun else None
    return result["provenance"].get("identity_digest", UNKNOWN)


def read_identity(folder: Path) -> dict[str, Any] | None:
    """What a folder keeps of its run's identity; None without, or if the file is damaged, which is
    said."""
    path = folder / IDENTITY
    if not path.is_file():
        return None
    try:
        return read_sealed(path)
    except DamagedFile as error:
        announce_ignored(str(error))
        return None


@cache
def announce_ignored(line: str) -> None:
    """Say, once per process, that a file does not count: a run looks for its result twice, before
    and after it has its folder to itself."""
    say(f"ignored: {line}")


def announce_former(folder: Path, whole: Mapping[str, Any]) -> None:
    """Say which finished run is made anew because the version of a part has been raised.

    It has another hash, and so another folder, which differs from this one in nothing else.
    """
    stem = folder.name.rpartition("-")[0].partition(".")[0]
    digest = identity_digest(whole)
    for other in sorted(folder.parent.glob(f"{stem}*-*")):
        if not (other / results.RESULT).is_file():
            continue
        kept = read_identity(other)
        if kept is None or kept["identity_digest"] == digest:
            continue
        former = kept["identity"]
        if without_versions(former) == without_versions(whole):
            announce_anew(other, summarize_differences(former, whole))


@cache
def announce_anew(folder: Path, differences: str) -> None:
    """Say, once per process, that a finished run is made anew, and why."""
    say(f"made anew: {folder}: {differences}")


def without_versions(whole: Mapping[str, Any]) -> dict[str, Any]:
    """A whole identity without what is raised when numbers of the code change."""
    rest = files.without_keys(whole, "versions")
    if isinstance(rest.get("calib"), dict):
        rest["calib"] = files.without_keys(rest["calib"], "revision")
    return rest


def describe_owner(folder: Path, whole: Mapping[str, Any]) -> str:
    """In what the run in a folder differs from another one, as far as that is known."""
    kept = read_identity(folder)
    if kept is None:
        return "of other defaults, data, versions or another device"
    return summarize_differences(kept["identity"], whole)


def write_identity(folder: Path, whole: Mapping[str, Any], quantization: str | None = None) -> None:
    """Keep the whole identity of the run in its folder, and the digest of its quantized model.

    Raises:
        ConfigError: the folder is another run's, which took it meanwhile.
    """
    digest = identity_digest(whole)
    # chosen before the lock was held: another run may have begun here since
    stated = stated_digest(folder)
    if stated is None:
        announce_former(folder, whole)
    elif stated != digest:
        raise ConfigError(
            f"runs: {folder} is now of another run ({describe_owner(folder, whole)}); run it again"
        )
    save_identity(folder, whole, quantization)


def save_identity(folder: Path, whole: Mapping[str, Any], quantization: str | None = None) -> None:
    """Write the file of a folder's identity, whatever is there."""
    kept = {
        "identity_digest": identity_digest(whole),
        "identity": dict(whole),
        "quantization": quantization,
    }
    files.write_sealed(folder / IDENTITY, kept)


def require_same_model(folder: Path, quantization: str) -> None:
    """Refuse to continue the images of another quantized model than this one.

    Args:
        folder: of the run.
        quantization: digest of the model.

    Raises:
        ConfigError: the folder holds images, and another digest, or none.
    """
    if not any((folder / "shards").glob("*.npz")):
        return
    kept = read_identity(folder)
    if kept is None or kept["quantization"] != quantization:
        stated = kept and kept["quantization"]
        raise ConfigError(
            f"runs: the images in {folder / 'shards'} are of the quantized model "
            f"{stated or UNKNOWN}, this one is {quantization} (other versions or threads?); "
            "remove the folder to begin again"
        )
