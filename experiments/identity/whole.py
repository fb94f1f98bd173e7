"""The whole identity of a result: all values that decide its numbers.

Departures name a run, and are made whole by this code's defaults:

    all settings, resolved             departures, and defaults of method, quant, calib and scope
    versions                           of the parts that are used (`identity.parts`)
    data                               digests of held-out tokens, reference statistics, extractor
    device                             cpu or cuda

A result states the digest of its whole identity. When it is read, the digest is made again out of
its departures; if it differs, another default, version or file would give other numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.data import fashion_mnist
from experiments.identity.departures import selector_revision
from experiments.identity.parts import (
    BENCHMARK,
    part_versions,
    stated_version,
)
from experiments.identity.resolved import resolved_values
from models import registry
from models.preset import Preset
from models.weights.checkpoints import CheckpointError, read_checkpoint
from models.weights.digests import remember_digest
from models.weights.pins import require_pinned
from ptq.files import describe_damage, digest_tensors, read_json, value_digest

# side of the images that the shipped extractor and reference judge
JUDGED_SIZE = fashion_mnist.SIZE + 2 * fashion_mnist.PADDING
MOST_DIFFERENCES = 3  # that one line names


def whole_identity(departures: Mapping[str, Any], device: str) -> dict[str, Any]:
    """All values that decide the numbers of a run, an analysis or a benchmark.

    Args:
        departures: what names it.
        device: class of the device, cpu or cuda.

    Raises:
        CheckpointError: its model is not registered, or data are missing.
    """
    whole = resolved_values(departures)
    # of this code, not of the result: else a raised version would go unnoticed
    for stated in ("version", "versions"):
        whole.pop(stated, None)
    if isinstance(whole.get("calib"), dict):
        whole["calib"]["revision"] = selector_revision(whole["calib"]["selector"], whole["model"])
    whole["versions"] = part_versions(departures)
    whole["data"] = data_digests(departures)
    whole["device"] = device
    return whole


def identity_digest(whole: Mapping[str, Any]) -> str:
    """Digest of a whole identity, 16 hex digits."""
    return value_digest(whole, 16)


def data_digests(departures: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the files that a result is judged by."""
    if departures.get("what") == BENCHMARK or "eval" not in departures:
        return {}
    preset = registry.find_preset(departures["model"])
    is_run = not {"what", "judged"} & departures.keys()
    if preset.dataset == "tiny_imagenet":
        return recorded_digests(preset, is_run)
    data = {}
    # held-out images of released models are named by departures
    if preset.weights.shipped:
        data["held_out"] = content_digest(registry.ZOO / preset.heldout_file)
    if preset.image_size == JUDGED_SIZE and is_run:
        data["reference"] = content_digest(registry.ZOO / "reference.safetensors")
        data["extractor"] = content_digest(registry.ZOO / "extractor.safetensors")
    return data


def recorded_digests(preset: Preset, is_run: bool) -> dict[str, str]:
    """Digests of data that do not ship, by the records of their making: results of a natural model
    count where its files are not."""
    data = {"held_out": read_figures(Path(preset.heldout_file).stem)["digest"]}
    if is_run:
        reference = read_figures("natural_reference")
        data["reference"] = reference["digest"]
        data["extractor"] = reference["extractor"]
    return data


def read_figures(recipe: str) -> dict[str, str]:
    """The figures in the record of a recipe of `train_zoo`.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = require_pinned(registry.ZOO / "records" / f"{recipe}.json")
    try:
        return read_json(path)["figures"]
    except FileNotFoundError:
        raise CheckpointError(
            f"record: {path} is missing; python -m experiments.train_zoo model={recipe} makes it"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"record: {path} cannot be read ({describe_damage(error)})"
        ) from error


def content_digest(path: Path) -> str:
    """Digest of a file's tensors, 16 hex digits; made once per process and state of the file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return remember_digest(path, "tensors", lambda: digest_tensors(read_checkpoint(path)))


def version_faults(departures: Mapping[str, Any]) -> list[str]:
    """The parts whose version is another one in this code than departures state, in words."""
    faults = []
    for part, version in part_versions(departures).items():
        stated = stated_version(departures, part)
        if stated != version:
            faults.append(f"is of version {stated} of {part}, this code's is {version}")
    calib = departures.get("calib", {})
    if isinstance(departures.get("method"), dict):
        selector = resolved_values(departures)["calib"]["selector"]
        revision = selector_revision(selector, departures["model"])
        stated = calib.get("revision", 0)
        if stated != revision:
            faults.append(f"is of revision {stated} of {selector}, this code's is {revision}")
    return faults


def describe_differences(
    one: object, other: object, places: tuple[str, str] = ("there", "here"), name: str = ""
) -> Iterator[str]:
    """Where two JSON-able values differ, as "seed is 0 there, 1 here"; `places` are the words for
    the two."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            field = f"{name}.{key}" if name else key
            yield from describe_differences(one.get(key), other.get(key), places, field)
    elif one != other:
        yield f"{name} is {one} {places[0]}, {other} {places[1]}"


def summarize_differences(one: object, other: object) -> str:
    """The first differences of two values in one line."""
    differences = list(describe_differences(one, other))
    shown = differences[:MOST_DIFFERENCES]
    if len(differences) > len(shown):
        shown.append(f"and {len(differences) - len(shown)} more")
    return "; ".join(shown)
